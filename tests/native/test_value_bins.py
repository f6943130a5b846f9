"""value_bins against its numpy definition, for every shape, type, rule and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocks import DATA_TYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from value_bins_oracle import Cells, edge_counts, encode_cell

from scfm import _native as native


def make_cells(
    seed: int,
    lengths: list[int],
    num_genes: int = 60,
    data_type: str = "f4",
    index_type: str = "i4",
    kind: str = "counts",
    shared_slots: bool = False,
    tidy: bool = True,
    **options: Any,
) -> Cells:
    """Rows of the given lengths. kind: "counts", "logged" (as many ties, no whole numbers) or "distinct"."""
    rng = np.random.default_rng(seed)
    rows = [
        np.sort(rng.choice(num_genes, size=length, replace=False))
        if tidy and length <= num_genes
        else rng.integers(num_genes, size=length)
        for length in lengths
    ]
    indices = np.concatenate([*rows, np.empty(0, np.int64)]).astype(index_type)
    data = rng.negative_binomial(1, 0.3, size=indices.size).astype(data_type)
    if kind == "logged" and data_type.startswith("f"):
        data = np.log1p(data * data.dtype.type(3.7))
    if kind == "distinct" and data_type.startswith("f"):
        data = rng.gamma(1.0, 2.0, size=indices.size).astype(data_type)
    known = rng.random(num_genes) < 0.8
    column_slot = np.full(num_genes, -1, np.int32)
    column_slot[known] = np.arange(known.sum())
    num_slots = int(known.sum())
    if shared_slots and num_slots:
        num_slots = max(num_slots // 2, 1)
        column_slot[known] = rng.integers(num_slots, size=int(known.sum()))
    return Cells(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        indices=indices,
        data=data,
        column_slot=column_slot,
        slot_token=rng.integers(0, 60_697, size=num_slots).astype(np.int32),
        **options,
    )


def with_draws(cells: Cells, seed: int = 0) -> Cells:
    """The rule "given", with a draw for each value that is binned."""
    raw = cells.run(quantiles=np.empty(0), rule="left", max_tokens=-1, prefix_token=-1)
    expressed = np.concatenate([[0], np.cumsum(raw.values != 0)])
    offsets = expressed[raw.cu_seqlens].astype(np.int64)
    draws = np.random.default_rng(seed).random(int(offsets[-1]))
    return replace(cells, rule="given", draws=draws, draw_offsets=offsets)


def assert_matches_oracle(cells: Cells) -> Any:
    result = cells.run()
    assert result.cu_seqlens.size == cells.indptr.size
    assert result.token_ids.size == result.values.size == result.cu_seqlens[-1]
    for row in range(cells.indptr.size - 1):
        tokens, values, num_genes = encode_cell(cells, row)
        here = slice(result.cu_seqlens[row], result.cu_seqlens[row + 1])
        np.testing.assert_array_equal(result.token_ids[here], tokens)
        np.testing.assert_array_equal(result.values[here], values)
        assert result.num_gene_tokens[row] == num_genes
        span = slice(cells.indptr[row], cells.indptr[row + 1])
        data, known = cells.data[span].astype(float), cells.column_slot[cells.indices[span]] >= 0
        np.testing.assert_allclose(result.mapped_counts[row], data[known].sum(), rtol=1e-6)
        np.testing.assert_allclose(result.total_counts[row], data.sum(), rtol=1e-6)
    return result


@st.composite
def any_cells(draw: st.DrawFn) -> Cells:
    """Any block that check_csr would pass, and any options."""
    cells = make_cells(
        seed=draw(st.integers(0, 2**32 - 1)),
        lengths=draw(st.lists(st.integers(0, 130), max_size=5)),
        num_genes=draw(st.integers(1, 90)),
        data_type=draw(st.sampled_from(DATA_TYPES)),
        index_type=draw(st.sampled_from(["i4", "i8"])),
        kind=draw(st.sampled_from(["counts", "logged", "distinct"])),
        shared_slots=draw(st.booleans()),
        tidy=draw(st.booleans()),
    )
    cells = replace(
        cells,
        quantiles=np.linspace(0, 1, draw(st.sampled_from([0, 1, 2, 10, 50]))),
        rule=draw(st.sampled_from(["left", "seeded"])),
        kept=draw(st.sampled_from(["any", "largest"])),
        max_tokens=draw(st.one_of(st.just(-1), st.integers(2, 90))),
        prefix_token=draw(st.sampled_from([-1, 60_695])),
        prefix_value=draw(st.sampled_from([-2.0, 0.0])),
        with_zeros=draw(st.booleans()),
        seed=draw(st.integers(0, 2**64 - 1)),
        epoch=draw(st.integers(0, 2**32 - 1)),
    )
    return with_draws(cells) if draw(st.booleans()) else cells


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=any_cells())
def test_any_block(isa: str, cells: Cells) -> None:
    assert_matches_oracle(cells)


@pytest.mark.parametrize("kind", ["counts", "logged", "distinct"])
@pytest.mark.parametrize("data_type", ["f4", "f8", "i4", "u2"])
def test_large_rows(isa: str, data_type: str, kind: str) -> None:
    cells = make_cells(7, [2000, 0, 1, 3999, 17], 4000, data_type, kind=kind, max_tokens=1200, prefix_token=9)
    assert_matches_oracle(cells)


@pytest.mark.parametrize("length", range(36))
def test_short_rows(isa: str, length: int) -> None:
    assert_matches_oracle(make_cells(length, [length, 0, length], prefix_token=2, prefix_value=-2.0))


@pytest.mark.parametrize(
    "kind", ["equal", "large counts", "one outlier", "tiny and huge", "many distinct then equal"]
)
def test_hard_distributions(isa: str, kind: str) -> None:
    """Counts too large to tally, the hash table given up half way, one value, the ends of float32."""
    rng = np.random.default_rng(3)
    x = {
        "equal": np.full(3000, 0.7),
        "large counts": rng.integers(1, 10**7, 3000),
        "one outlier": np.concatenate([np.ones(2999), [1e30]]),
        "tiny and huge": 10.0 ** rng.uniform(-44, 38, 3000),
        "many distinct then equal": np.concatenate([1 + rng.random(700), np.full(2300, 1.5)]),
    }[kind].astype(np.float32)
    genes = np.arange(x.size, dtype=np.int32)
    cells = Cells(np.array([0, x.size]), genes, x, genes, genes)
    assert_matches_oracle(cells)
    left, right = edge_counts(x, cells.quantiles)
    edges, found_left, found_right = native.value_edges(x, np.array([0, x.size]), cells.quantiles)
    np.testing.assert_array_equal(edges[0], np.quantile(x, cells.quantiles))
    np.testing.assert_array_equal(found_left, left)
    np.testing.assert_array_equal(found_right, right)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(20))
def test_edges_are_numpys_to_the_bit(isa: str, seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    x = rng.lognormal(0, 3, int(rng.integers(1, 400))).astype(dtype)
    for num_bins in (2, 3, 11, 51, 128):
        quantiles = np.linspace(0, 1, num_bins - 1)
        edges, left, right = native.value_edges(x, np.array([0, x.size]), quantiles)
        np.testing.assert_array_equal(edges[0], np.quantile(x, quantiles))
        np.testing.assert_array_equal((left, right), edge_counts(x, quantiles))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(isa: str, threads: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 300, size=700).tolist()
    cells = make_cells(1, lengths, 400, max_tokens=128, prefix_token=3)
    native.set_num_threads(threads)
    result = cells.run()
    native.set_num_threads(1)
    again = cells.run()
    for name in ("token_ids", "values", "cu_seqlens", "num_gene_tokens", "mapped_counts", "total_counts"):
        np.testing.assert_array_equal(getattr(result, name), getattr(again, name))


@pytest.mark.parametrize("data_type", ["f4", "f8"])
def test_instruction_sets_agree_to_the_bit(data_type: str) -> None:
    cells = make_cells(3, [1500] * 20, 3000, data_type, kind="distinct", max_tokens=700)
    results = []
    for name in native.available_isas():
        native.set_isa(name)
        results.append(cells.run())
    for result in results[1:]:
        for name in ("token_ids", "values", "mapped_counts", "total_counts"):
            assert getattr(result, name).tobytes() == getattr(results[0], name).tobytes()


def test_a_cell_is_known_by_what_it_holds(isa: str) -> None:
    """Neither its row, nor its company, nor unknown genes, nor the type of its values change its tokens."""
    cells = make_cells(5, [300] * 6, 500, max_tokens=100, prefix_token=1)
    whole = cells.run()
    rows = np.split(whole.values, whole.cu_seqlens[1:-1])
    order = [4, 0, 5]
    spans = [slice(cells.indptr[row], cells.indptr[row + 1]) for row in order]
    part = replace(
        cells,
        indptr=np.arange(4) * 300,
        indices=np.concatenate([cells.indices[span] for span in spans]),
        data=np.concatenate([cells.data[span] for span in spans]).astype(np.int16),
    ).run()
    for row, values in zip(order, np.split(part.values, part.cu_seqlens[1:-1]), strict=True):
        np.testing.assert_array_equal(values, rows[row])
    assert (cells.run(seed=1).values != whole.values).mean() > 0.3
    assert (cells.run(epoch=1).values != whole.values).mean() > 0.3


def test_swapped_values_are_another_cell() -> None:
    """The fingerprint tells apart two cells with the same genes and the same values, exchanged."""
    genes = np.arange(200, dtype=np.int32)
    x = np.ones(200, np.float32)
    x[[3, 4]] = 7, 9
    y = x.copy()
    y[[3, 4]] = 9, 7
    cells = Cells(np.array([0, 200, 400]), np.tile(genes, 2), np.concatenate([x, y]), genes, genes)
    values = cells.run().values
    assert (values[:200] != values[200:]).mean() > 0.3


def many_draws(x: np.ndarray, num_draws: int, **options: Any) -> list[Any]:
    genes = np.arange(x.size, dtype=np.int32)
    cells = Cells(np.array([0, x.size]), genes, x.astype(np.float32), genes, genes, **options)
    return [cells.run(seed=seed) for seed in range(num_draws)]


def test_bins_are_uniform_over_those_possible(isa: str) -> None:
    x = np.repeat([1, 2, 3, 9], [60, 25, 10, 5])
    left, right = edge_counts(x.astype(np.float32), np.linspace(0, 1, 50))
    drawn = np.stack([result.values for result in many_draws(x, 400)])
    for value in (1, 2, 3, 9):
        of = drawn[:, x == value]
        low, high = right[x == value][0] + 1, left[x == value][0]
        counts = np.bincount(of.astype(int).ravel(), minlength=51)
        assert counts[:low].sum() == counts[high + 1 :].sum() == 0
        assert chisquare(counts[low : high + 1]).pvalue > 1e-4
    # Neighbours are drawn apart: no correlation along the cell.
    ones = drawn[:, :60] - drawn[:, :60].mean()
    assert abs((ones[:, 1:] * ones[:, :-1]).mean() / ones.var()) < 0.03


def test_every_set_of_tokens_is_equally_likely(isa: str) -> None:
    results = many_draws(np.arange(1, 7), 6000, max_tokens=3)
    found = Counter(tuple(result.token_ids.tolist()) for result in results)
    assert set(found) == set(combinations(range(6), 3))
    assert chisquare(list(found.values())).pvalue > 1e-4


def test_which_tokens_stay_and_their_bins_are_drawn_apart() -> None:
    results = many_draws(np.ones(2), 4000, max_tokens=1, quantiles=np.linspace(0, 1, 2))
    found = Counter((int(result.token_ids[0]), int(result.values[0])) for result in results)
    assert len(found) == 4 and chisquare(list(found.values())).pvalue > 1e-4


def test_no_cells_and_no_genes() -> None:
    nothing = Cells(
        np.zeros(1, np.int64),
        np.empty(0, np.int32),
        np.empty(0, np.float32),
        np.empty(0, np.int32),
        np.empty(0, np.int32),
        prefix_token=1,
    )
    assert assert_matches_oracle(nothing).cu_seqlens.tolist() == [0]
    for with_zeros in (False, True):
        three = replace(nothing, indptr=np.zeros(4, np.int64), with_zeros=with_zeros)
        assert assert_matches_oracle(three).cu_seqlens.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, 1e300])
def test_impossible_values_name_their_row(isa: str, bad: float) -> None:
    cells = make_cells(1, [20, 20, 20], 30, "f8")
    cells.data[47] = bad
    with pytest.raises(ValueError, match="row 2 has a value that is negative or not finite"):
        cells.run()
    values = np.where(cells.data > 1e299, np.inf, cells.data)
    with pytest.raises(ValueError, match=r"values\[47\] = .* in cell 2"):
        native.bin_values(values, cells.indptr, None, cells.quantiles, "left", None, 0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"column_slot": np.array([0, 99], np.int32)}, r"column_slot\[1\] = 99, expected -1 to 1"),
        ({"column_slot": np.array([0, -2], np.int32)}, r"column_slot\[1\] = -2"),
        ({"slot_token": np.array([4, -1], np.int32)}, r"slot_token\[1\] = -1"),
        ({"indices": np.array([0, 2], np.int32)}, "out of range for 2 genes"),
        ({"indices": np.array([0, -1], np.int32)}, "out of range for 2 genes"),
        ({"indices": np.array([0], np.int32)}, "indices has 1 entries, expected 2"),
        ({"indptr": np.array([0, 3], np.int64)}, "indptr ends at 3"),
        ({"quantiles": np.array([0.0, 1.1])}, r"quantiles\[1\] = 1.1"),
        ({"quantiles": np.array([0.0, np.nan])}, r"quantiles\[1\]"),
        ({"quantiles": np.array([0.5, 0.2])}, r"quantiles\[0\] = 0.5"),
        ({"quantiles": np.zeros(40_000)}, "quantiles has 40000 entries"),
        ({"max_tokens": 0}, "max_tokens = 0, expected -1 or at least 1"),
        ({"max_tokens": 1, "prefix_token": 3}, "max_tokens = 1, expected -1 or at least 2"),
        ({"prefix_token": -5}, "prefix_token = -5"),
        ({"rule": "mine"}, 'rule = "mine"'),
        ({"kept": "mine"}, 'kept = "mine"'),
        ({"rule": "given", "draws": np.zeros(2), "draw_offsets": np.array([0, 1])}, "ends at 1"),
        (
            {"rule": "given", "draws": np.zeros(1), "draw_offsets": np.array([0, 1])},
            "row 0 has 1 draws, expected 2",
        ),
        (
            {"rule": "given", "draws": np.array([0.1, 1.0]), "draw_offsets": np.array([0, 2])},
            r"draws\[1\] = 1.0",
        ),
        ({"rule": "given", "draws": np.zeros(2), "draw_offsets": np.array([0, 1, 2])}, "draw_offsets has 3"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], words: str) -> None:
    cells = Cells(
        indptr=np.array([0, 2]),
        indices=np.array([0, 1], np.int32),
        data=np.ones(2, np.float32),
        column_slot=np.array([0, 1], np.int32),
        slot_token=np.array([4, 5], np.int32),
    )
    with pytest.raises(ValueError, match=words):
        cells.run(**change)


def test_bins_of_packed_values_are_those_of_the_block(isa: str) -> None:
    cells = replace(make_cells(2, [90] * 5, 200, kind="logged"), seed=4)
    whole = cells.run()
    raw = cells.run(quantiles=np.empty(0))
    for rule in ("seeded", "left"):
        again = native.bin_values(
            raw.values, raw.cu_seqlens, raw.token_ids, cells.quantiles, rule, None, 4, 0
        )
        np.testing.assert_array_equal(
            again, whole.values if rule == "seeded" else cells.run(rule=rule).values
        )
    given_rule = with_draws(cells)
    again = native.bin_values(
        raw.values, raw.cu_seqlens, None, cells.quantiles, "given", given_rule.draws, 0, 0
    )
    np.testing.assert_array_equal(again, given_rule.run().values)


def test_chosen_tokens_are_a_set_of_the_right_size_at_random(isa: str) -> None:
    offsets = np.array([0, 0, 1, 7, 12], np.int32)
    ids = np.array([5, 6, 7, 2**40], np.int64)
    wanted = np.array([0, 0, 2, 4], np.int32)
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(3000):
        chosen = native.choose_tokens(offsets, ids, wanted, 1, seed, 0, 77)
        assert chosen[[0, 1, 7]].sum() == 0
        assert chosen[8:].all()
        found[tuple(np.flatnonzero(chosen[1:7]).tolist())] += 1
    assert set(found) == set(combinations(range(1, 6), 2))
    assert chisquare(list(found.values())).pvalue > 1e-4
    alone = native.choose_tokens(offsets[2:4] - 1, ids[2:3], wanted[2:3], 1, 9, 0, 77)
    np.testing.assert_array_equal(alone, native.choose_tokens(offsets, ids, wanted, 1, 9, 0, 77)[1:7])
    with pytest.raises(ValueError, match=r"num_chosen\[2\] = 6 of 6 tokens, 1 of them spared"):
        native.choose_tokens(offsets, ids, np.array([0, 0, 6, 0], np.int32), 1, 0, 0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_nothing_is_read_past_the_end_of_an_array(isa: str) -> None:
    script = Path(__file__).with_name("guard_page_probe_value_bins.py")
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "SCFM_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "ok", f"exit {run.returncode}: {run.stderr}"
