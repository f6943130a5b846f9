"""First fit against its definition, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm import _native


def first_fit(lengths: list[int], capacity: int) -> list[int]:
    rooms: list[int] = []
    found = []
    for length in lengths:
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[fitting[0]] -= length
        found.append(fitting[0])
    return found


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.data())
def test_it_is_the_definition(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    found = _native.first_fit(np.array(lengths, dtype=np.int64), capacity)
    assert found.dtype == np.int64 and found.tolist() == first_fit(lengths, capacity)


@pytest.mark.parametrize("length", [1, 2**40], ids=["one token", "beyond 32 bits"])
def test_equal_items_fill_bins_one_after_another(length: int) -> None:
    found = _native.first_fit(np.full(1000, length, dtype=np.int64), 3 * length)
    np.testing.assert_array_equal(found, np.arange(1000) // 3)


@pytest.mark.parametrize(
    ("lengths", "capacity", "named"),
    [
        ([1, 7], 6, r"lengths\[1\] = 7"),
        ([0], 6, r"lengths\[0\] = 0"),
        ([-(2**62)], 6, "lengths"),
        ([], 0, "capacity = 0"),
        ([1], -3, "capacity = -3"),
    ],
)
def test_what_no_bin_can_hold_is_refused(lengths: list[int], capacity: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _native.first_fit(np.array(lengths, dtype=np.int64), capacity)


def test_other_arrays_are_refused() -> None:
    for wrong in (
        np.ones(3, dtype=np.int32),
        np.ones((2, 2), dtype=np.int64),
        np.ones(8, dtype=np.int64)[::2],
    ):
        with pytest.raises((TypeError, ValueError), match="lengths"):
            _native.first_fit(wrong, 4)
