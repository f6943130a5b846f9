"""A report shows its baselines and never hides a loss; the bootstrap covers what it should."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scfm.errors import InvalidArgumentError
from scfm.evaluate import Interval, Metric, Report, Row, paired_bootstrap, verdict

ACCURACY = Metric("accuracy")
LOSS = Metric("loss", "lower", "nats", digits=2)


def report(rows=None, **changes):
    rows = rows or (
        Row("ours", "ours", {"accuracy": 0.7, "loss": 3.0}),
        Row("PCA", "baseline", {"accuracy": 0.8}),
        Row("unigram", "baseline", {"loss": 6.0}),
        Row("shuffled | labels", "control", {"accuracy": 0.2, "loss": float("nan")}),
    )
    return Report("A test", (ACCURACY, LOSS), tuple(rows), "by cell", 80, 20, 0, **changes)


def test_a_report_without_baseline_is_refused():
    with pytest.raises(InvalidArgumentError, match="at least one baseline"):
        report([Row("ours", "ours", {"accuracy": 1.0}), Row("random", "control", {"accuracy": 0.1})])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row("a", "baseline", {})], "exactly one row"),
        ([Row("a", "ours", {}), Row("b", "ours", {}), Row("c", "baseline", {})], "exactly one row"),
        ([Row("a", "ours", {}), Row("a", "baseline", {})], "repeat"),
        ([Row("a", "ours", {"speed": 1.0}), Row("b", "baseline", {})], "unknown metrics \\['speed'\\]"),
    ],
)
def test_inconsistent_reports_are_refused(rows, message):
    with pytest.raises(InvalidArgumentError, match=message):
        report(rows)


def test_text_and_markdown_hold_every_number_and_the_setting():
    made = report(notes=("a remark",))
    for text in (made.to_text(), made.to_markdown()):
        for part in (
            "A test",
            "80 train and 20 test cells",
            "by cell",
            "seed 0",
            "0.700",
            "0.800",
            "3.00",
            "6.00",
            "accuracy ↑",
            "loss (nats) ↓",
            "a remark",
            "ours (ours)",
            "(control)",
        ):
            assert part in text
    lines = [line for line in made.to_markdown().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}
    body = made.to_text().splitlines()[3:8]
    assert len({line.index("↑") for line in body if "↑" in line}) == 1
    assert body[2].index("0.700") == body[3].index("0.800")


def test_dict_is_json_and_says_the_verdicts():
    made = report(gains={("PCA", "accuracy"): Interval(-0.1, -0.2, -0.01)})
    content = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert content["rows"][3]["values"]["loss"] is None
    assert content["gains_over"] == [
        {"row": "PCA", "metric": "accuracy", "gain": -0.1, "low": -0.2, "high": -0.01}
    ]
    assert content["verdicts"]["accuracy"] == verdict(made, "accuracy")


def test_a_loss_is_said_first():
    text = verdict(report(), "accuracy")
    assert text.index("loses to PCA (0.800)") < text.index("beats shuffled | labels (0.200)")
    assert "Not compared: unigram" in text


def test_lower_is_better_where_it_is():
    assert "beats unigram (6.00)" in verdict(report(), "loss")


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(-0.1, -0.2, -0.01), "loses to PCA"),
        (Interval(-0.1, -0.2, 0.01), "is not clearly different from PCA"),
        (Interval(0.1, -0.01, 0.2), "is not clearly different from PCA"),
        (Interval(0.1, 0.01, 0.2), "beats PCA"),
    ],
)
def test_a_win_or_loss_needs_an_interval_without_zero(interval, words):
    other = 0.7 - interval.estimate
    rows = [Row("ours", "ours", {"accuracy": 0.7}), Row("PCA", "baseline", {"accuracy": other})]
    text = verdict(report(rows, gains={("PCA", "accuracy"): interval}), "accuracy")
    assert words in text and f"{interval.estimate:+.3f}" in text


def test_level_scores_are_not_a_win():
    rows = [Row("ours", "ours", {"accuracy": 0.7}), Row("PCA", "baseline", {"accuracy": 0.7})]
    assert "beats" not in verdict(report(rows), "accuracy")


def test_unknown_metric_and_missing_score():
    with pytest.raises(InvalidArgumentError, match="no metric 'speed'"):
        verdict(report(), "speed")
    rows = [Row("ours", "ours", {}), Row("PCA", "baseline", {"accuracy": 0.7})]
    assert "nothing can be said" in verdict(report(rows), "accuracy")


def test_bootstrap_covers_the_true_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits, widths = 0, []
    for seed in range(1000):
        noise = 10.0 * rng.normal(size=100)  # shared by both sides: pairing must remove it
        found = paired_bootstrap(noise + 0.3 + rng.normal(size=100), noise, seed=seed, num_resamples=400)
        hits += found.low <= 0.3 <= found.high
        widths.append(found.high - found.low)
    assert 915 <= hits <= 970
    assert np.mean(widths) == pytest.approx(2 * 1.96 / np.sqrt(100), rel=0.05)


def test_groups_widen_the_interval_when_items_repeat():
    values = np.random.default_rng(1).normal(size=40)
    repeated, cells = np.repeat(values, 25), np.repeat(np.arange(40), 25)
    zero = np.zeros(repeated.size)
    naive, grouped = paired_bootstrap(repeated, zero), paired_bootstrap(repeated, zero, groups=cells)
    assert naive.estimate == pytest.approx(grouped.estimate) == pytest.approx(values.mean())
    assert 3.5 < (grouped.high - grouped.low) / (naive.high - naive.low) < 6.5


def test_bootstrap_is_keyed_and_checked():
    values = np.random.default_rng(2).normal(size=30)
    assert paired_bootstrap(values, values * 0, seed=1) == paired_bootstrap(values, values * 0, seed=1)
    assert paired_bootstrap(values, values * 0, seed=1) != paired_bootstrap(values, values * 0, seed=2)
    with pytest.raises(InvalidArgumentError, match="paired items"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(InvalidArgumentError, match="paired items"):
        paired_bootstrap([], [])
