"""The plan of an epoch: which cells make up each microbatch, the same for any number of ranks.

Cells come in the canonical shuffled order (scfm.data.shuffle), window by window. A window's cells are packed into
microbatches of at most ``token_budget`` tokens, each to the first that has room for it, longest cells first. Of the
microbatches that stay short of the budget some are taken apart again and their cells packed with the next window's, so
almost nothing is unused; a cell is put off once at most. The window's microbatches are then permuted, because the
longest cells came first. All draws are raw Philox words keyed by (seed, purpose) and counted by (window, epoch), so the
plan is fixed by (lengths, seed, epoch, budget, block, window) for ever and knows nothing of ranks.

Nothing but the place where each window begins is kept: a window is packed again when its cells are asked for, and
50 million cells need their lengths and a few numbers a window.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm import _native
from scfm.data.shuffle import ShuffleOrder, keyed_permutation
from scfm.errors import ConfigError

__all__ = ["MicrobatchPlan", "PlannedWindow"]

_PURPOSE_MICROBATCHES = 5
# More than any part's stream reads ahead.
_WINDOWS_IN_HAND = 64
# A microbatch that uses this share of the budget is as good as full.
_FULL = 0.99
# Of a window's microbatches at most this share is put off, so that a corpus that cannot be packed well still moves on.
_MOST_PUT_OFF = 1 / 8
_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class PlannedWindow:
    """The microbatches that a window gives. first: number in the epoch of its first one; cells: int64, those of all its
    microbatches end to end; bounds: int64 (num_microbatches + 1,), where each begins.
    """

    first: int
    cells: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @property
    def num_microbatches(self) -> int:
        return len(self.bounds) - 1


class MicrobatchPlan:
    """Microbatches of one epoch.

    lengths: (cells,), positions that are computed for each cell of the parts laid end to end, 0 for cells that are not
    trained on; num_cells: of each part; row_label: names a cell in messages. Raises ConfigError for a cell that no
    microbatch can hold.
    """

    def __init__(
        self,
        lengths: NDArray[np.unsignedinteger],
        num_cells: Sequence[int],
        *,
        seed: int,
        epoch: int,
        token_budget: int,
        block_size: int = 64,
        window: int = 4096,
        row_label: Callable[[int], str] = str,
    ) -> None:
        expect_cells_fit(lengths, token_budget, row_label)
        self.order = ShuffleOrder(num_cells, seed=seed, epoch=epoch, block_size=block_size, window=window)
        self.epoch = epoch
        self.token_budget = token_budget
        self._seed = seed
        self._lengths = lengths
        # Of the windows packed so far and of the next one: microbatches before it, and cells put off into it.
        self._first = [0]
        self._put_off = [_NOTHING]
        self._packed: OrderedDict[int, PlannedWindow] = OrderedDict()

    @property
    def num_windows(self) -> int:
        return self.order.num_windows

    @property
    def num_microbatches(self) -> int:
        """Of the epoch; the first time this packs all windows."""
        self._pack_until(self.num_windows)
        return self._first[-1]

    @property
    def unused_share(self) -> float:
        """Of the budget of all microbatches, what no token fills."""
        room = self.num_microbatches * self.token_budget
        return 1.0 - int(self._lengths.sum(dtype=np.int64)) / room if room else 0.0

    def microbatch(self, number: int) -> NDArray[np.int64]:
        """The cells of a microbatch, as positions in the parts laid end to end."""
        window = self.window_with(number)
        if window is None:
            raise IndexError(f"microbatch {number} of {self.num_microbatches}")
        planned = self.window(window)
        place = number - planned.first
        return planned.cells[planned.bounds[place] : planned.bounds[place + 1]]

    def window_with(self, number: int) -> int | None:
        """The window that a microbatch belongs to; None behind the epoch's last."""
        while self._first[-1] <= number and len(self._first) <= self.num_windows:
            self._pack_until(len(self._first))
        return bisect_right(self._first, number) - 1 if 0 <= number < self._first[-1] else None

    def window(self, number: int) -> PlannedWindow:
        """The microbatches of a window, in order; there may be none."""
        self._pack_until(number + 1)
        if number in self._packed:
            self._packed.move_to_end(number)
            return self._packed[number]
        return self._pack(number)[0]

    def windows_of(self, part: int) -> NDArray[np.int64]:
        """Ascending numbers of windows, among them all that have microbatches with cells of a part."""
        own = self.order.windows_of(part)
        after = own + 1
        return np.union1d(own, after[after < self.num_windows])

    def _pack_until(self, stop: int) -> None:
        for number in range(len(self._first) - 1, stop):
            planned, put_off = self._pack(number)
            self._first.append(planned.first + planned.num_microbatches)
            self._put_off.append(put_off)

    def _pack(self, number: int) -> tuple[PlannedWindow, NDArray[np.int64]]:
        """The window's microbatches, and the cells that are put off into the next one."""
        new = self.order.window(number)
        new = new[self._lengths[new] > 0]
        cells = np.concatenate([self._put_off[number], new])
        lengths = self._lengths[cells].astype(np.int64)
        holder = self._holder_of(lengths, len(self._put_off[number]))
        used = np.bincount(holder, weights=lengths).astype(np.int64)
        kept = np.ones(len(used), dtype=bool)
        if number < self.num_windows - 1:
            kept[self._put_off_of(used, holder, len(self._put_off[number]))] = False
        # Where each microbatch goes: those that are put off in front, to be cut off, then the others as drawn.
        draws = keyed_permutation(int(kept.sum()), (self._seed, _PURPOSE_MICROBATCHES), (number, self.epoch))
        place = np.zeros(len(used), dtype=np.int32)
        place[np.flatnonzero(kept)[draws]] = np.arange(1, len(draws) + 1)
        place_of_cell = place[holder]
        in_order = cells[np.argsort(place_of_cell, kind="stable")]
        bounds = np.cumsum(np.bincount(place_of_cell, minlength=len(draws) + 1))
        planned = PlannedWindow(self._first[number], in_order[bounds[0] :], bounds - bounds[0])
        self._packed[number] = planned
        if len(self._packed) > _WINDOWS_IN_HAND:
            self._packed.popitem(last=False)
        return planned, in_order[: bounds[0]].copy()

    def _holder_of(self, lengths: NDArray[np.int64], num_old: int) -> NDArray[np.int64]:
        """The microbatch of each cell. Cells that were put off come first, so that others fill up what holds them."""
        shortness = self.token_budget - lengths
        if self.token_budget <= np.iinfo(np.uint16).max:
            shortness = shortness.astype(np.uint16)  # these sort several times faster
        old, new = (np.argsort(part, kind="stable") for part in np.split(shortness, [num_old]))
        order = np.concatenate([old, new + num_old])
        holder = np.empty(len(lengths), dtype=np.int64)
        holder[order] = _native.first_fit(lengths[order], self.token_budget)
        return holder

    def _put_off_of(
        self, used: NDArray[np.int64], holder: NDArray[np.int64], num_old: int
    ) -> NDArray[np.int64]:
        """The emptiest of the microbatches that are not full and hold no cell that was put off before."""
        free = used < _FULL * self.token_budget
        free[holder[:num_old]] = False
        most = max(int(len(used) * _MOST_PUT_OFF), 1)
        emptiest = np.argsort(used, kind="stable")
        return emptiest[free[emptiest]][:most]


def expect_cells_fit(
    lengths: NDArray[np.unsignedinteger], token_budget: int, row_label: Callable[[int], str]
) -> None:
    """Raise ConfigError naming the longest cell if it alone is more than a microbatch."""
    if not len(lengths) or int(lengths.max()) <= token_budget:
        return
    longest = int(lengths.argmax())
    num_long = int((lengths > token_budget).sum())
    raise ConfigError(
        f"{token_budget:,}, but the longest cell, {row_label(longest)}, has {int(lengths[longest]):,} positions "
        f"({num_long:,} such cells)",
        where="token_budget",
        hint=f"Give at least {int(lengths[longest]):,}, or shorten the cells (max_tokens, or fewer genes).",
    )
