"""First-fit-decreasing: items into bins of one capacity, the longest items first, each into the first bin with room.

Never more than 11/9 of the fewest possible bins, and of hundreds of items nearly the fewest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["first_fit_decreasing"]


def first_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """int64 (items,): the bin of each item; bins are numbered as they are opened, equal items keep their order.

    lengths: from 1 to ``capacity``.
    """
    room = np.full(len(lengths), capacity, dtype=np.int64)
    holder = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    for item in np.argsort(-lengths, kind="stable"):
        length = lengths[item]
        fitting = room[: num_bins + 1] >= length
        bin_number = int(fitting.argmax())
        num_bins = max(num_bins, bin_number + 1)
        room[bin_number] -= length
        holder[item] = bin_number
    return holder
