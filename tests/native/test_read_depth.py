"""read_depth against numpy's arithmetic on dense rows; thinning against the binomial distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from blocks import DATA_TYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, chisquare, kstest

from scfm import _native as native

DEFAULTS: dict[str, Any] = {
    "values": "per_total",
    "total": "inputs",
    "totals": None,
    "target_sum": 1e4,
    "total_is_logged": True,
    "target": "fixed",
    "target_number": 4.0,
    "single": False,
}


def block(seed: int, lengths: list[int], num_genes: int = 60, data_type: str = "f4", index_type: str = "i4"):
    """indptr, indices, data, column_position of rows of the given lengths; some columns share a position."""
    rng = np.random.default_rng(seed)
    indices = np.concatenate([rng.integers(num_genes, size=n) for n in lengths] + [np.empty(0, np.int64)])
    data = rng.negative_binomial(1, 0.2, size=indices.size).astype(data_type)
    if data_type.startswith("f") and rng.random() < 0.5:
        data *= data.dtype.type(0.37)
    position = rng.integers(-1, num_genes + 20, size=num_genes).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return indptr, indices.astype(index_type), data, position, num_genes + 20


def run(arrays, **options: Any):
    indptr, indices, data, position, num_positions = arrays
    return native.read_depth(indptr, indices, data, position, num_positions, **(DEFAULTS | options))


def oracle(arrays, **options: Any) -> list[tuple[list[int], np.ndarray]]:
    """Each cell's positions and values from its dense row, as the authors' code makes them."""
    o = DEFAULTS | options
    indptr, indices, data, position, num_positions = arrays
    real = np.float32 if o["single"] else np.float64
    cells = []
    for row in range(len(indptr) - 1):
        span = slice(indptr[row], indptr[row + 1])
        dense = np.zeros(num_positions)
        columns, values = indices[span], data[span].astype(np.float64)
        if data.dtype == np.float32:  # repeated columns are one column of float32
            values = np.bincount(columns, values, minlength=len(position)).astype(np.float32)
            columns, values = np.arange(len(position)), values.astype(np.float64)
        known = position[columns] >= 0
        np.add.at(dense, position[columns[known]], values[known])
        with np.errstate(all="ignore"):
            total = real(dense.sum())
            x = dense.astype(real)
            if o["values"] == "per_total":
                out = np.log1p((x / total * real(1e4)).astype(np.float64))
            elif o["values"] == "per_median":
                out = np.log1p((x / (total / real(o["target_sum"]))).astype(np.float64))
            else:
                out = dense
            if o["total"] == "listed":
                total = real(o["totals"][row])
            elif o["total"] == "outputs":
                total = real(out[dense > 0].sum())
            s = np.float32(np.log10(np.float64(total)) if o["total_is_logged"] else total)
            t = {
                "fixed": lambda: o["target_number"],
                "times": lambda total=total: np.log10(np.float64(total * real(o["target_number"]))),
                "plus": lambda total=total: real(np.log10(np.float64(total))) + real(o["target_number"]),
                "same": lambda s=s: s,
            }[o["target"]]()
            whole = np.concatenate([out.astype(np.float32), [np.float32(t), s]])
        kept = np.flatnonzero(whole > 0)
        if len(kept) < 3 or kept[0] >= num_positions:
            kept = kept[:0]
        cells.append((kept.tolist(), whole[kept]))
    return cells


def expect_equal(arrays, **options: Any) -> None:
    found, want = run(arrays, **options), oracle(arrays, **options)
    offsets = found.cu_seqlens
    for cell, (positions, values) in enumerate(want):
        tokens = slice(offsets[cell], offsets[cell + 1])
        assert found.token_ids[tokens].tolist() == positions, cell
        # numpy's and the C library's logarithms may differ in their last bit, as float64.
        np.testing.assert_allclose(found.values[tokens], values, rtol=1.3e-7)
        genes = sum(position < arrays[4] for position in positions)
        assert found.num_gene_tokens[cell] == genes
    assert offsets[-1] == len(found.token_ids) == len(found.values)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_dense_arithmetic(data) -> None:
    arrays = block(
        data.draw(st.integers(0, 2**32 - 1)),
        data.draw(st.lists(st.integers(0, 90), max_size=6)),
        data_type=data.draw(st.sampled_from(DATA_TYPES)),
        index_type=data.draw(st.sampled_from(["i4", "i8"])),
    )
    num_cells = len(arrays[0]) - 1
    total = data.draw(st.sampled_from(["inputs", "outputs", "listed"]))
    expect_equal(
        arrays,
        values=data.draw(st.sampled_from(["per_total", "per_median", "given"])),
        total=total,
        totals=np.arange(num_cells) * 700.0 if total == "listed" else None,
        target_sum=data.draw(st.sampled_from([37.5, 1e4])),
        total_is_logged=data.draw(st.booleans()),
        target=data.draw(st.sampled_from(["fixed", "times", "plus", "same"])),
        target_number=data.draw(st.sampled_from([4.0, 0.5, 1.0, -1.5])),
        single=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("values", ["per_total", "per_median", "given"])
def test_every_instruction_set(isa: str, values: str) -> None:
    arrays = block(3, [500, 0, 17, 3000, 1], num_genes=2000)
    expect_equal(arrays, values=values)


def test_threads_and_company_change_nothing() -> None:
    lengths = np.random.default_rng(0).integers(0, 400, size=300).tolist()
    arrays = block(1, lengths, num_genes=500)
    whole = run(arrays)
    native.set_num_threads(1)
    alone = run(arrays)
    for name in ("token_ids", "values", "cu_seqlens", "source_depth", "target_depth"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(alone, name))
    indptr, indices, data, position, num_positions = arrays
    for cell in (0, 7, 299):
        span = slice(indptr[cell], indptr[cell + 1])
        one = run((np.array([0, span.stop - span.start]), indices[span], data[span], position, num_positions))
        tokens = slice(whole.cu_seqlens[cell], whole.cu_seqlens[cell + 1])
        np.testing.assert_array_equal(one.token_ids, whole.token_ids[tokens])
        np.testing.assert_array_equal(one.values, whole.values[tokens])


def test_the_order_of_columns_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    data = rng.gamma(1.0, 2.0, size=400)
    order = rng.permutation(400)
    place = np.empty(400, np.int32)
    place[order] = np.arange(400)
    indptr = np.array([0, 400])
    straight = run((indptr, np.arange(400), data, np.arange(400, dtype=np.int32), 400))
    shuffled = run((indptr, place.astype(np.int64), data, order.astype(np.int32), 400))
    np.testing.assert_array_equal(straight.token_ids, shuffled.token_ids)
    np.testing.assert_array_equal(straight.values, shuffled.values)


def test_a_depth_that_is_not_above_zero_is_no_token() -> None:
    position = np.arange(3, dtype=np.int32)

    def cell(counts: list[float], **options: Any):
        return run((np.array([0, 3]), np.arange(3), np.array(counts), position, 3), **options)

    whole = cell([2.0, 0.0, 3.0])
    assert whole.token_ids.tolist() == [0, 2, 3, 4] and whole.values[2] == 4.0
    assert whole.values[3] == np.float32(np.log10(5.0))
    # log10(1) = 0: S is none; a gene and T are too few to read the last two tokens behind a gene
    single = cell([1.0, 0.0, 0.0])
    assert single.cu_seqlens.tolist() == [0, 0] and single.num_gene_tokens.tolist() == [0]
    assert single.source_depth[0] == 0.0 and single.mapped_counts[0] == 1.0
    given_logs = cell([0.2, 0.3, 0.1], values="given")
    assert given_logs.token_ids.tolist() == [0, 1, 2, 3] and given_logs.source_depth[0] < 0
    shallow = cell([2.0, 0.0, 3.0], target="plus", target_number=-2.0)
    assert shallow.token_ids.tolist() == [0, 2, 4] and shallow.target_depth[0] < 0
    empty = cell([0.0, 0.0, 0.0])
    assert empty.cu_seqlens.tolist() == [0, 0] and np.isneginf(empty.source_depth[0])


def test_counts_beyond_the_remembered_ones() -> None:
    counts = np.array([1.0, 1023.0, 1024.0, 1025.0, 5e6, 2.0**40, 0.5])
    expect_equal((np.array([0, 7]), np.arange(7), counts, np.arange(7, dtype=np.int32), 7))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 1e39])
def test_impossible_values_name_their_row(bad: float) -> None:
    arrays = (
        np.array([0, 1, 3]),
        np.array([0, 0, 1]),
        np.array([1.0, 2.0, bad]),
        np.arange(2, dtype=np.int32),
        2,
    )
    with pytest.raises(ValueError, match="row 1 has a value"):
        run(arrays)


def test_hostile_arguments_are_named() -> None:
    indptr, indices, data, position, num_positions = block(0, [5, 5])
    good = {"indptr": indptr, "indices": indices, "data": data, "column_position": position}
    for name, wrong, message in [
        ("indptr", np.array([0, 7, 5]), "indptr"),
        ("indptr", np.array([0, 5, 11]), "indptr"),
        ("indices", indices[:-1], "indices has 9"),
        ("indices", indices + 100, "out of range"),
        ("column_position", position + 1000, r"column_position\["),
        ("num_positions", 0, "num_positions"),
        ("values", "raw", "values"),
        ("total", "all", "total"),
        ("target", "t4", "target"),
        ("target_number", np.nan, "target_number"),
        ("target_sum", 0.0, "target_sum"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.read_depth(**({**good, "num_positions": num_positions, **DEFAULTS} | {name: wrong}))
    for totals, message in [(np.ones(1), "totals has 1"), (np.array([1.0, -2.0]), r"totals\[1\]")]:
        with pytest.raises(ValueError, match=message):
            run((indptr, indices, data, position, num_positions), total="listed", totals=totals)
    with pytest.raises(TypeError, match="totals"):
        run((indptr, indices, data, position, num_positions), total="listed")


# ---- thinning ----------------------------------------------------------------------------------------------------


def thinned(
    counts: np.ndarray, share: float, *, seed: int = 0, epoch: int = 0, first_cell: int = 0
) -> np.ndarray:
    """counts: (cells, genes), all stored."""
    cells, genes = counts.shape
    out = native.thin_counts(
        np.arange(cells + 1, dtype=np.int64) * genes,
        np.tile(np.arange(genes, dtype=np.int32), cells),
        counts.ravel(),
        np.arange(first_cell, first_cell + cells),
        np.full(cells, share),
        seed,
        epoch,
    )
    return out.reshape(cells, genes)


@pytest.mark.parametrize(
    ("count", "share"), [(1, 0.3), (7, 0.5), (64, 0.1), (65, 0.1), (500, 0.73), (10**6, 0.4)]
)
def test_thinning_is_binomial(count: int, share: float) -> None:
    draws = thinned(np.full((200, 100), float(count)), share).ravel()
    law = binom(count, share)
    edges = np.unique(law.ppf(np.linspace(0, 1, 13)[1:-1]))
    expected = np.diff(np.concatenate([[0.0], law.cdf(edges), [1.0]])) * len(draws)
    seen = np.bincount(np.searchsorted(edges, draws), minlength=len(expected))
    kept = expected > 5
    p = chisquare(seen[kept], expected[kept] * seen[kept].sum() / expected[kept].sum()).pvalue
    assert p > 1e-4, (p, seen, expected)
    assert draws.min() >= 0 and draws.max() <= count


def test_thinning_is_keyed_by_cell_gene_seed_and_epoch() -> None:
    counts = np.random.default_rng(0).integers(0, 200, size=(40, 30)).astype(np.float64)
    whole = thinned(counts, 0.5)
    np.testing.assert_array_equal(thinned(counts[7:9], 0.5, first_cell=7), whole[7:9])
    native.set_num_threads(1)
    np.testing.assert_array_equal(thinned(counts, 0.5), whole)
    one_gene = native.thin_counts(
        np.array([0, 1]), np.array([12], np.int32), counts[5, 12:13], np.array([5]), np.array([0.5]), 0, 0
    )
    assert one_gene[0] == whole[5, 12]
    for other in ({"seed": 1}, {"epoch": 1}, {"seed": 1 << 40}, {"first_cell": 1 << 33}):
        assert (thinned(counts, 0.5, **other) != whole).mean() > 0.3
    np.testing.assert_array_equal(thinned(counts, 1.0), counts)
    assert not thinned(counts, 0.0).any()


def test_shares_are_beta_for_half_of_the_deep_cells() -> None:
    cells = np.arange(20_000)
    totals = np.where(cells % 2, 5000.0, 999.0)
    shares = native.draw_shares(totals, cells, 1000.0, 0.5, 3, 1)
    assert (shares[::2] == 1).all()
    drawn = shares[1::2][shares[1::2] < 1]
    assert abs(len(drawn) / 10_000 - 0.5) < 0.02
    assert kstest(drawn, beta(2, 2).cdf).pvalue > 1e-4
    np.testing.assert_array_equal(native.draw_shares(totals[5:9], cells[5:9], 1000.0, 0.5, 3, 1), shares[5:9])


@pytest.mark.parametrize("bad", [0.5, -1.0, np.nan, np.inf, 2.0**54])
def test_only_counts_are_thinned(bad: float) -> None:
    with pytest.raises(ValueError, match="row 0 has"):
        thinned(np.array([[1.0, bad]]), 0.5)


def test_hostile_thinning_arguments() -> None:
    arguments = [np.array([0, 1]), np.array([0]), np.ones(1), np.array([0]), np.array([0.5]), 0, 0]
    for place, wrong, message in [
        (0, np.array([0, 2]), "indptr"),
        (1, np.array([0, 1]), "indices has 2"),
        (3, np.array([0, 1]), "cell_ids"),
        (4, np.array([1.5]), r"shares\[0\]"),
        (4, np.array([np.nan]), r"shares\[0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.thin_counts(*arguments[:place], wrong, *arguments[place + 1 :])
    with pytest.raises(ValueError, match="totals has 2"):
        native.draw_shares(np.ones(2), np.array([0]), 1.0, 0.5, 0, 0)
    with pytest.raises(ValueError, match="probability"):
        native.draw_shares(np.ones(1), np.array([0]), 1.0, 1.5, 0, 0)
