"""log_bins against whole-number arithmetic, for every shape, type and instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from blocks import DATA_TYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm import _native as native

NUM_GENES = 70


def make(
    seed: int, lengths: list[int], data_type: str = "f4", index_type: str = "i4", tidy: bool = True
) -> dict[str, Any]:
    """Counts of cells with some large ones, a fifth of the columns off the panel, the panel in another order."""
    rng = np.random.default_rng(seed)
    rows = [
        np.sort(rng.choice(NUM_GENES, size=length, replace=False))
        if tidy
        else rng.integers(NUM_GENES, size=length)
        for length in lengths
    ]
    indices = np.concatenate([*rows, np.empty(0, np.int64)]).astype(index_type)
    highest = 100 if data_type.endswith("1") else 30_000
    data = np.where(
        rng.random(indices.size) < 0.2,
        rng.integers(0, highest, indices.size),
        rng.integers(0, 4, indices.size),
    ).astype(data_type)
    position = np.full(NUM_GENES, -1, np.int32)
    known = rng.random(NUM_GENES) < 0.8
    position[known] = rng.permutation(200)[: known.sum()]
    return {
        "indptr": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "indices": indices,
        "data": data,
        "column_position": position,
        "panel_size": 200,
        "already_logged": False,
    }


def bins_of_counts(counts: list[int]) -> list[int]:
    total = sum(counts)
    return [sum(count * 10_000 >= (2**k - 1) * total for k in range(1, 6)) for count in counts]


def expected_cell(cells: dict[str, Any], row: int) -> tuple[list[int], list[int], int, int]:
    """Positions and bins, genes on the panel, and the panel's total, in Python's whole numbers."""
    span = slice(cells["indptr"][row], cells["indptr"][row + 1])
    on_panel: dict[int, int] = {}
    for column, count in zip(cells["indices"][span].tolist(), cells["data"][span].tolist(), strict=True):
        position = int(cells["column_position"][column])
        if position >= 0:
            on_panel[position] = on_panel.get(position, 0) + int(count)
    places = sorted(place for place, count in on_panel.items() if count)
    bins = bins_of_counts([on_panel[place] for place in places])
    kept = [(place, level) for place, level in zip(places, bins, strict=True) if level]
    return [place for place, _ in kept], [level for _, level in kept], len(places), sum(on_panel.values())


def check(cells: dict[str, Any]) -> None:
    found = native.log_bins(**cells)
    assert found.cu_seqlens[-1] == len(found.token_ids) == len(found.values)
    for row in range(len(cells["indptr"]) - 1):
        span = slice(found.cu_seqlens[row], found.cu_seqlens[row + 1])
        places, bins, num_genes, total = expected_cell(cells, row)
        assert found.token_ids[span].tolist() == places
        assert found.values[span].tolist() == bins
        assert found.num_panel_genes[row] == num_genes
        assert found.mapped_counts[row] == total
        whole = slice(cells["indptr"][row], cells["indptr"][row + 1])
        assert found.total_counts[row] == float(cells["data"][whole].astype(np.float64).sum())


@pytest.mark.parametrize("index_type", ["i4", "i8"])
@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_every_type(isa: str, data_type: str, index_type: str) -> None:
    check(make(1, [0, 1, 7, 70, 33, 0, 12], data_type, index_type))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 70), max_size=6), tidy=st.booleans())
def test_any_cells(seed: int, lengths: list[int], tidy: bool) -> None:
    check(make(seed, lengths, tidy=tidy))


def test_edges_are_exact() -> None:
    """Counts that meet an edge exactly, just miss it, and totals at which float32 is wrong."""
    for total in (10_000, 30_000, 373_871, 70_000_003, 2**40):
        for factor in (1, 3, 7, 15, 31):
            edge = -(-factor * total // 10_000)
            counts = [edge, edge - 1, total - 2 * edge + 1]
            if min(counts) <= 0:
                continue
            cells = {
                "indptr": np.array([0, 3]),
                "indices": np.arange(3, dtype=np.int32),
                "data": np.array(counts, dtype=np.float64),
                "column_position": np.arange(3, dtype=np.int32),
                "panel_size": 3,
                "already_logged": False,
            }
            check(cells)


def test_values_that_are_not_whole_go_through_float32() -> None:
    rng = np.random.default_rng(3)
    data = rng.gamma(0.5, 3.0, 50).astype(np.float32)
    cells = make(2, [50])
    cells |= {"data": data, "column_position": np.arange(NUM_GENES, dtype=np.int32), "panel_size": NUM_GENES}
    found = native.log_bins(**cells)
    total = np.float32(data.astype(np.float64).sum())
    logged = np.log1p(data / (total / np.float32(1e4))) / np.float32(np.log(2))
    wanted = np.minimum(logged, 5).astype(int)
    assert found.values.tolist() == wanted[wanted > 0].tolist()
    assert found.token_ids.tolist() == cells["indices"][wanted > 0].tolist()


def test_logarithms_are_only_cut() -> None:
    cells = make(4, [6]) | {"already_logged": True}
    cells["data"] = np.array([0.2, 0.999, 1.0, 4.99, 5.0, 17.3], dtype=np.float32)
    cells["column_position"] = np.arange(NUM_GENES, dtype=np.int32)
    found = native.log_bins(**cells)
    assert found.values.tolist() == [1, 4, 5, 5]
    assert found.num_panel_genes.tolist() == [6]


def test_threads_and_blocks_change_nothing() -> None:
    cells = make(5, [40] * 3000)
    native.set_num_threads(1)
    one = native.log_bins(**cells)
    native.set_num_threads(4)
    four = native.log_bins(**cells)
    for name in ("token_ids", "values", "cu_seqlens", "mapped_counts"):
        assert np.array_equal(getattr(one, name), getattr(four, name))


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_impossible_values_name_their_row(value: float) -> None:
    cells = make(6, [3, 5, 4])
    cells["data"][cells["indptr"][1]] = value
    with pytest.raises(ValueError, match="row 1 has a value"):
        native.log_bins(**cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"panel_size": 0}, "panel_size = 0"),
        ({"column_position": np.array([0, 200] + [-1] * 68, dtype=np.int32)}, r"column_position\[1\] = 200"),
        ({"column_position": np.array([3, -2] + [-1] * 68, dtype=np.int32)}, r"column_position\[1\] = -2"),
        ({"column_position": np.array([3, 3] + [-1] * 68, dtype=np.int32)}, "an earlier column"),
        ({"column_position": np.zeros(2, dtype=np.int32) - 1}, "out of range for 2 genes"),
        ({"indptr": np.array([0, 9, 3])}, "indptr falls"),
        ({"indptr": np.array([0, 3])}, "indptr ends at 3"),
        ({"indices": np.full(12, -5, dtype=np.int32)}, "out of range"),
        ({"indices": np.full(11, 1, dtype=np.int32)}, "indices has 11"),
    ],
)
def test_arrays_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.log_bins(**(make(7, [3, 5, 4]) | change))


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="column_position"):
        native.log_bins(**(make(8, [3]) | {"column_position": np.zeros(70, dtype=np.int64)}))
    with pytest.raises(TypeError, match="indices"):
        native.log_bins(**(make(8, [3]) | {"indices": None}))
