"""Random words counted by keys, for whole arrays at once: Philox4x32-10, as csrc/base/philox.hpp has it.

A word depends on its counter and key only, so what is drawn for a gene of a cell is the same in any batch. numpy's own
Philox gives one stream a generator, which would mean a Python object for every cell. Source: Salmon et al., SC 2011.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["words_at"]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


def words_at(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: int) -> NDArray[np.uint32]:
    """The first word of each counter, uint32 (N,).

    counter: four whole numbers below 2^32 each, arrays (N,) or single ones; key: 64 bits.
    """
    first, second, third, fourth = (
        np.atleast_1d(np.asarray(part)).astype(np.uint64) & _LOW for part in counter
    )
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        one, other = _MULTIPLIERS[0] * first, _MULTIPLIERS[1] * third
        first, third = (other >> _HIGH) ^ second ^ np.uint64(low), (one >> _HIGH) ^ fourth ^ np.uint64(high)
        second, fourth = other & _LOW, one & _LOW
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return first.astype(np.uint32)
