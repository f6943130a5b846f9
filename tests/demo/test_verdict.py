"""The demo's words follow its numbers: planted wins, losses and draws each get their own sentence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scfm.demo.scores import OURS, RANDOM, embedding_report
from scfm.demo.verdict import plain_verdict, zero_shot_verdict
from scfm.evaluate import Interval, Metric, Report, Row, stratified_split

LABELS = np.repeat(["a", "b", "c"], 100)


def embedding(noise, seed=0):
    rng = np.random.default_rng(seed)
    return (np.eye(3)[np.repeat(np.arange(3), 100)] + noise * rng.normal(size=(300, 3))).astype(np.float32)


def reports(ours, pca, bigram_gain=-0.5, random_gain=2.0):
    train, test = stratified_split(LABELS, seed=0)
    scored = embedding_report(
        embedding(ours), embedding(9.0, 1), {"PCA-50": embedding(pca, 2)}, LABELS, train, test, seed=0
    )
    names = {"neighbour-bigram": ("baseline", bigram_gain), RANDOM: ("control", random_gain)}
    gains = {
        (name, metric): Interval(gain, gain - 0.1, gain + 0.1)
        for name, (_, gain) in names.items()
        for metric in ("loss where hidden", "loss, all targets")
    }
    values = {"loss where hidden": 4.0, "loss, all targets": 4.0}
    rows = [Row(OURS, "ours", values)]
    rows += [
        Row(name, role, {m: v + gain for m, v in values.items()}) for name, (role, gain) in names.items()
    ]
    metrics = tuple(Metric(name, "lower", "nats") for name in values)
    return Report("masked", metrics, tuple(rows), "by cell", 240, 60, 0, gains=gains), scored


def words(**options):
    return plain_verdict(*reports(**options), num_parameters=1234)


def test_a_loss_to_pca_is_the_first_thing_said():
    text = words(ours=2.0, pca=0.1)
    assert text.startswith(
        "A model this small (1,234 parameters, 240 training cells) loses to PCA here: kNN accuracy"
    )


def test_a_win_over_pca_is_not_called_a_loss():
    text = words(ours=0.1, pca=2.0)
    assert "is ahead of PCA here" in text.splitlines()[0] and "loses to PCA" not in text


def test_neither_is_called_neither():
    masked, scored = reports(ours=0.45, pca=0.45)
    rows = [row for row in scored.rows if row.name != "PCA-50"]

    def first_words(knn, nmi, interval):
        values = scored.ours.values | {
            "kNN accuracy": scored.ours.values["kNN accuracy"] - knn,
            "NMI": scored.ours.values["NMI"] - nmi,
        }
        gains = scored.gains | {("PCA-50", "kNN accuracy"): interval}
        other = replace(scored, rows=(*rows, Row("PCA-50", "baseline", values)), gains=gains)
        return plain_verdict(masked, other, num_parameters=1).splitlines()[0]

    wide = Interval(0.0, -0.1, 0.1)
    assert "is level with PCA here" in first_words(0.0, 0.0, wide)
    mixed = first_words(0.01, -0.1, wide)
    assert "does not beat PCA here" in mixed and "ahead on kNN accuracy, behind on NMI" in mixed
    assert "loses to PCA here" in (lost := first_words(-0.01, -0.1, wide)) and "cannot tell from none" in lost
    assert "is ahead of PCA here" in (won := first_words(0.01, 0.1, wide)) and "cannot tell from none" in won
    assert "ahead only on NMI" in first_words(-0.2, 0.1, Interval(-0.2, -0.3, -0.1))


@pytest.mark.parametrize(
    ("gain", "sentence"),
    [
        (-0.5, "Yet counting which genes stand next to each other predicts hidden genes better"),
        (0.5, "predicts hidden genes better than counted neighbours, by 0.50 nats"),
        (0.0, "about as well as counting"),
    ],
)
def test_the_bigram_sentence_follows_its_interval(gain, sentence):
    assert sentence in words(ours=1.0, pca=0.1, bigram_gain=gain)


def test_training_that_taught_nothing_is_said():
    assert "Training taught it nothing" in words(ours=1.0, pca=0.1, random_gain=-0.05)
    assert "Training did teach it" in words(ours=1.0, pca=0.1)


def test_neighbours_no_better_than_random_weights_are_said():
    assert "not clearly better than those of random weights" in words(ours=9.0, pca=0.1)
    assert "agree with labels better" in words(ours=0.2, pca=0.1)


def test_what_a_larger_model_is_for_is_always_said():
    assert "What a larger one is for" in words(ours=1.0, pca=0.1)


def test_scores_show_the_majority_beside_them():
    _, scored = reports(ours=0.1, pca=0.1)
    common = next(row for row in scored.rows if row.name == "commonest label")
    assert common.values["kNN accuracy"] == pytest.approx(1 / 3)
    assert common.values["kNN macro-F1"] == pytest.approx((2 / 4) / 3)


def zero_shot(ours, pca):
    train, test = stratified_split(LABELS, seed=0)
    points = {"PCA-50": embedding(pca, 2)}
    scored = embedding_report(
        embedding(ours),
        embedding(9.0, 1),
        points,
        LABELS,
        train,
        test,
        seed=0,
        name="mini",
        fitted="to nothing",
    )
    assert scored.ours.name == "mini" and "to nothing" in scored.notes
    return zero_shot_verdict(scored, num_parameters=1234)


def test_a_model_of_other_cells_is_named_and_its_loss_said_first():
    text = zero_shot(ours=2.0, pca=0.1)
    assert text.startswith("mini (1,234 parameters, trained on other cells) loses to PCA here: kNN accuracy")
    assert zero_shot(ours=0.1, pca=2.0).startswith(
        "mini (1,234 parameters, trained on other cells) is ahead of PCA"
    )


def test_whether_what_it_learned_serves_follows_from_random_weights():
    assert "What it learned there serves here" in zero_shot(ours=0.2, pca=0.1)
    assert "does not show here" in zero_shot(ours=9.0, pca=0.1)
