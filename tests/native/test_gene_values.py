"""Keys of gene values and their merging against numpy, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from blocks import DATA_TYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm import _native


def block(seed: int, lengths: list[int], data_type: str = "f4", index_type: str = "i4") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    size = sum(lengths)
    return {
        "indptr": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "indices": rng.integers(30, size=size).astype(index_type),
        "data": rng.integers(0, 9, size=size).astype(data_type),
        "column_gene": rng.integers(-1, 12, size=30).astype(np.int32),
        "library_size": rng.gamma(2, 500, size=len(lengths)) + 1,
        "counted": (rng.random(len(lengths)) < 0.7).astype(np.uint8),
    }


def expected(given: dict[str, Any]) -> np.ndarray:
    row = np.repeat(np.arange(len(given["library_size"])), np.diff(given["indptr"]))
    genes = given["column_gene"][given["indices"]]
    kept = (genes >= 0) & (given["data"] != 0)
    if len(given["counted"]):
        kept &= given["counted"][row] != 0
    with np.errstate(all="ignore"):
        values = given["data"].astype(np.float64) / given["library_size"][row] * 1e4
    bits = values.astype(np.float32).view(np.uint32)
    return ((genes.astype(np.uint64) << np.uint64(32)) | bits)[kept]


@pytest.mark.parametrize("data_type", DATA_TYPES)
@pytest.mark.parametrize("index_type", ["i4", "i8"])
def test_keys_are_the_formula_for_every_type(data_type: str, index_type: str) -> None:
    arguments = block(1, [5, 0, 17, 1, 40], data_type, index_type)
    np.testing.assert_array_equal(_native.gene_values(**arguments), expected(arguments))
    arguments["counted"] = np.empty(0, dtype=np.uint8)
    np.testing.assert_array_equal(_native.gene_values(**arguments), expected(arguments))


def test_a_cell_that_does_not_count_may_lack_a_library_size() -> None:
    arguments = block(2, [4, 4])
    arguments["library_size"][1] = 0
    arguments["counted"] = np.array([1, 0], dtype=np.uint8)
    np.testing.assert_array_equal(_native.gene_values(**arguments), expected(arguments))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"indices": np.full(8, 30, dtype=np.int32)}, "row 0 has column 30"),
        ({"indices": np.full(8, -1, dtype=np.int64)}, "row 0 has column -1"),
        ({"indices": np.zeros(7, dtype=np.int32)}, "indices has 7 entries, expected 8"),
        ({"library_size": np.ones(3)}, "library_size has 3 entries, expected 2"),
        ({"library_size": np.array([1.0, np.nan])}, "row 1 has counts and the library size"),
        ({"counted": np.ones(1, dtype=np.uint8)}, "counted has 1 entries"),
        ({"indptr": np.array([0, 9, 8])}, "indptr falls"),
        ({"indptr": np.array([0, 4, 9])}, "indptr ends at 9"),
        ({"column_gene": np.empty(0, dtype=np.int32)}, "column"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], named: str) -> None:
    whole = block(3, [4, 4]) | {
        "data": np.ones(8, dtype=np.float32),
        "column_gene": np.zeros(30, dtype=np.int32),
        "counted": np.ones(2, dtype=np.uint8),
    }
    with pytest.raises(ValueError, match=named):
        _native.gene_values(**(whole | change))
    with pytest.raises(TypeError, match="indices is None"):
        _native.gene_values(**(whole | {"indices": None}))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 40), unique=True).map(sorted),
    st.lists(st.integers(0, 40)).map(sorted),
    st.integers(0, 7),
)
def test_merged_keys_are_all_keys_counted(keys: list[int], more: list[int], num_bits: int) -> None:
    numbers = np.arange(1, len(keys) + 1)
    everything = np.concatenate(
        [np.repeat(np.array(keys, dtype=np.uint64), numbers), np.array(more, dtype=np.uint64)]
    )
    shift = np.uint64(num_bits)
    merged = np.unique(everything.astype(np.uint64) >> shift << shift, return_counts=True)
    found = _native.merge_keys(
        np.array(keys, dtype=np.uint64), numbers, np.array(more, dtype=np.uint64), num_bits
    )
    for one, other in zip(found, merged, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (found[0].dtype, found[1].dtype) == (np.uint64, np.int64)


@pytest.mark.parametrize(
    ("keys", "numbers", "more", "num_bits", "named"),
    [
        ([1, 1], [1, 1], [], 0, "keys does not ascend at 1"),
        ([1], [1], [5, 4], 0, "more does not ascend at 1"),
        ([1, 2], [1], [], 0, "differ in length"),
        ([], [], [], 64, "num_bits = 64"),
        ([], [], [], -1, "num_bits = -1"),
    ],
)
def test_keys_that_cannot_be_merged_are_refused(keys, numbers, more, num_bits: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _native.merge_keys(
            np.array(keys, dtype=np.uint64),
            np.array(numbers, dtype=np.int64),
            np.array(more, dtype=np.uint64),
            num_bits,
        )
