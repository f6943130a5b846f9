"""check_csr against a numpy definition: the first fault by position, or the facts of sound cells."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from blocks import DATA_TYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scfm import _native as native

Array = np.ndarray[Any, np.dtype[Any]]


def facts(indptr: Array, indices: Array, data: Array, num_genes: int) -> dict[str, Any]:
    """What check_csr must say of a block whose indptr is sound."""
    for row in range(indptr.size - 1):
        for position in range(indptr[row], indptr[row + 1]):
            column, value = int(indices[position]), data[position]
            place = {"row": row, "position": position, "column": column}
            if not 0 <= column < num_genes:
                return {"error": "index_range", **place}
            if not np.isfinite(value):
                return {"error": "not_finite", **place}
            if value < 0:
                return {"error": "negative", **place}
    rows = [indices[a:b] for a, b in pairwise(indptr)]
    noninteger = data.astype(np.float64) % 1 != 0
    places = np.flatnonzero(noninteger)
    return {
        "error": "",
        "sorted": all(bool(np.all(np.diff(r) >= 0)) for r in rows),
        "duplicates": sum(np.unique(r).size < r.size for r in rows),
        "num_zeros": int(np.sum(data == 0)),
        "num_nonintegers": places.size,
        "first_noninteger": int(np.searchsorted(indptr, places[0], side="right") - 1) if places.size else -1,
        "max_value": float(data.max(initial=0)),
    }


def assert_facts(indptr: Array, indices: Array, data: Array, num_genes: int) -> None:
    found = native.check_csr(indptr, indices, data, num_genes)
    expected = facts(indptr, indices, data, num_genes)
    assert {name: getattr(found, name) for name in expected} == expected, repr(found)


@st.composite
def cells(draw: st.DrawFn) -> tuple[Array, Array, Array, int]:
    """Rows with now and then a fault in them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(0, 80), max_size=5))
    num_genes = draw(st.integers(1, 300))
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    size = int(indptr[-1])
    data_type = np.dtype(draw(st.sampled_from(DATA_TYPES)))
    indices = rng.integers(num_genes, size=size)
    if draw(st.booleans()):
        for a, b in pairwise(indptr):
            indices[a:b] = np.sort(indices[a:b])
    indices = indices.astype(draw(st.sampled_from(["i4", "i8"])))
    data = rng.integers(0, 9, size=size).astype(data_type)
    if size and data_type.kind == "f":
        some = rng.integers(size)
        data[some] = draw(st.sampled_from([0.5, -0.0, 1e-30, 2.0**23 + 1, 2.0**22 + 0.5, 3e38, 1.0]))
        if draw(st.booleans()):
            data[rng.integers(size)] = draw(st.sampled_from([np.nan, np.inf, -np.inf, -1.0, -1e-30]))
    elif size and data_type.kind == "i" and draw(st.booleans()):
        data[rng.integers(size)] = -1
    if size and draw(st.integers(0, 3)) == 0:
        indices[rng.integers(size)] = draw(st.sampled_from([-1, num_genes, 2**31 - 1, -(2**31)]))
    return indptr, indices, data, num_genes


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block=cells())
def test_facts(isa: str, block: tuple[Array, Array, Array, int]) -> None:
    assert_facts(*block)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_first_fault_of_many(isa: str, data_type: str, threads: int) -> None:
    native.set_num_threads(threads)
    rng = np.random.default_rng(0)
    indptr = np.arange(0, 40_001, 100)
    indices = np.tile(np.arange(100, dtype=np.int32), 400)
    data = rng.integers(0, 100, size=40_000).astype(data_type)
    assert_facts(indptr, indices, data, 100)
    for position in (39_000, 20_001, 555):
        indices[position] = 100
        found = native.check_csr(indptr, indices, data, 100)
        assert (found.error, found.position, found.row) == ("index_range", position, position // 100)


@pytest.mark.parametrize(
    ("indptr", "error", "row"),
    [
        ([], "indptr_start", -1),
        ([1, 3], "indptr_start", 0),
        ([-1, 3], "indptr_start", 0),
        ([0, 2, 1, 3], "indptr_decreasing", 1),
        ([0, 5, -9, 3], "indptr_decreasing", 1),
        ([0, 2], "indptr_end", 1),
        ([0, 4], "indptr_end", 1),
        ([0, 2**62], "indptr_end", 1),
    ],
)
def test_broken_indptr(indptr: list[int], error: str, row: int) -> None:
    found = native.check_csr(np.array(indptr, np.int64), np.arange(3), np.ones(3), 5)
    assert (found.error, found.row) == (error, row)


def test_lengths_that_differ() -> None:
    found = native.check_csr(np.array([0, 3]), np.arange(2), np.ones(3), 5)
    assert (found.error, found.value) == ("length", 2)


def test_columns_beyond_32_bits() -> None:
    wide = np.array([2**40, 2**33])
    assert_facts(np.array([0, 2]), wide, np.ones(2), 2**41)
    assert_facts(np.array([0, 2]), wide, np.ones(2), 2**40)
    assert_facts(np.array([0, 2]), np.array([2**33, 2**33]), np.ones(2), 2**40)


def test_nothing_is_sound() -> None:
    found = native.check_csr(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), 0)
    assert (found.error, found.sorted, found.max_value) == ("", True, 0.0)


def test_unsigned_maximum() -> None:
    data = np.array([2**64 - 1, 3], np.uint64)
    assert native.check_csr(np.array([0, 2]), np.array([0, 1]), data, 2).max_value == 2.0**64
