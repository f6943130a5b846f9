"""Keyed block shuffle: an epoch's order of cells that is nearly random and still cheap to read.

The cells of each part are cut into blocks of ``block_size`` consecutive cells (a block never crosses parts;
a part's last block may be smaller). All blocks of all parts are permuted; each run of
``window // block_size`` permuted blocks is a window, and the cells of a window are permuted. Reading a
window touches few places of the files, and neighbours in the order come from all over them.

Every permutation is the stable order of sort keys, and the keys are raw Philox4x64-10 words: key
(seed, purpose), counter (i, window, epoch, 0). So the order is fixed by (lengths of the parts, seed, epoch,
block_size, window) for ever, whatever library draws it, and any part of it can be had without the rest.
Memory grows by the permuted blocks only, 8 bytes a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.data.windows import Window, read_windows
from scfm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from scfm.data.source import CellSource

__all__ = ["ShuffleOrder", "ShuffledCells", "keyed_permutation"]

_PURPOSE_BLOCKS = 3
_PURPOSE_CELLS = 4


class ShuffleOrder:
    """The order of one epoch over parts of the given lengths laid end to end.

    bounds: int64 (num_windows + 1,), how many cells of the order come before each window.
    """

    def __init__(
        self, lengths: Sequence[int], *, seed: int, epoch: int, block_size: int, window: int
    ) -> None:
        _within(seed, "seed", 0, 2**64 - 1)
        _within(epoch, "epoch", 0, 2**64 - 1)
        _within(block_size, "block_size", 1, None)
        _within(window, "window", block_size, None)
        self._seed = seed
        self._epoch = epoch
        self._block_size = block_size
        self._blocks_a_window = window // block_size
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._first_cell = _offsets(self._lengths)
        self._first_block = _offsets(-(-self._lengths // block_size))
        self._blocks = keyed_permutation(int(self._first_block[-1]), (seed, _PURPOSE_BLOCKS), (0, epoch))
        _, sizes = self._extent(self._blocks)
        cuts = np.arange(0, len(sizes), self._blocks_a_window)
        self.bounds = _offsets(np.add.reduceat(sizes, cuts) if len(cuts) else sizes)

    @property
    def num_windows(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_cells(self) -> int:
        return int(self.bounds[-1])

    def window(self, number: int) -> NDArray[np.int64]:
        """The cells of a window, in order, as positions in the parts laid end to end."""
        blocks = self._blocks[number * self._blocks_a_window : (number + 1) * self._blocks_a_window]
        starts, sizes = self._extent(blocks)
        before = _offsets(sizes)
        cells = np.repeat(starts - before[:-1], sizes) + np.arange(before[-1])
        return cells[keyed_permutation(len(cells), (self._seed, _PURPOSE_CELLS), (number, self._epoch))]

    def windows_of(self, part: int) -> NDArray[np.int64]:
        """Ascending numbers of the windows that hold cells of a part."""
        mine = (self._blocks >= self._first_block[part]) & (self._blocks < self._first_block[part + 1])
        return np.unique(np.flatnonzero(mine) // self._blocks_a_window)

    def _extent(self, blocks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each block starts in the parts laid end to end, and how many cells it has."""
        part = np.searchsorted(self._first_block[1:], blocks, side="right")
        within = (blocks - self._first_block[part]) * self._block_size
        return self._first_cell[part] + within, np.minimum(self._block_size, self._lengths[part] - within)


class ShuffledCells:
    """An epoch of a source's cells in shuffled order; ``CellSource.shuffled`` makes one.

    The order is the same for every rank and world size. A *cursor* counts the cells of that order that are
    done with. Rank r of W reads the windows whose number leaves the remainder r when divided by W, in order:
    taken together by number, the ranks' windows are the order. Iterating reads this rank's windows from the
    cursor ``start`` on; where it falls inside a window of this rank, that window comes without its first
    cells.

    To resume with the same world size give each rank the cursor of its own last window; to resume with
    another, let all ranks finish a round (one window each) and give every rank the largest of their cursors.
    """

    def __init__(
        self,
        source: CellSource,
        *,
        seed: int,
        epoch: int = 0,
        block_size: int = 64,
        window: int = 4096,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source = source
        self._parts = source.parts
        self.order = ShuffleOrder(
            [len(part) for part in self._parts],
            seed=seed,
            epoch=epoch,
            block_size=block_size,
            window=window,
        )
        _within(start, "start", 0, self.order.num_cells)
        _within(world_size, "world_size", 1, None)
        _within(rank, "rank", 0, world_size - 1)
        self._start = start
        self._rank = rank
        self._world_size = world_size
        # The first window that is not wholly before the cursor, moved up to this rank's next.
        first = int(np.searchsorted(self.order.bounds[1:], start, side="right"))
        first += (rank - first) % world_size
        self.numbers = range(first, self.order.num_windows, world_size)

    def __len__(self) -> int:
        """Cells that iterating gives."""
        bounds = self.order.bounds
        mine = np.asarray(self.numbers, dtype=np.int64)
        return int((bounds[mine + 1] - np.maximum(bounds[mine], self._start)).sum())

    def positions(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Cells ``start`` to ``stop`` of the whole order, every rank's, as positions in the source."""
        bounds = self.order.bounds
        stop = self.order.num_cells if stop is None else stop
        _within(stop, "stop", 0, self.order.num_cells)
        _within(start, "start", 0, stop)
        first = int(np.searchsorted(bounds[1:], start, side="right"))
        last = int(np.searchsorted(bounds[:-1], stop, side="left"))
        windows = [self.order.window(number) for number in range(first, last)]
        cells = np.concatenate([*windows, np.empty(0, dtype=np.int64)])
        before = int(bounds[first])
        return self.source.place_of(cells[start - before : stop - before])

    def __iter__(self) -> Iterator[Window]:
        return self.windows()

    def windows(self, *, empty_bad_cells: bool = False) -> Iterator[Window]:
        """This rank's windows from ``start`` on, read and checked; errors and warnings as of ``blocks``."""
        for number, pieces in read_windows(self._parts, self, empty_bad_cells=empty_bad_cells):
            cells = self.source.place_of(self.joined(number))
            yield Window(int(self.order.bounds[number + 1]), cells, pieces)

    def joined(self, number: int) -> NDArray[np.int64]:
        """What is left of a window from ``start`` on, as positions in the parts laid end to end."""
        return self.order.window(number)[max(self._start - int(self.order.bounds[number]), 0) :]

    def touching(self, part: int) -> list[int]:
        """This rank's windows with cells of a part."""
        return [number for number in self.order.windows_of(part).tolist() if number in self.numbers]


def keyed_permutation(size: int, key: tuple[int, int], counter: tuple[int, int]) -> NDArray[np.int64]:
    """int64: positions 0..size-1 in the order of their sort keys; equal keys keep their order.

    key: (seed, purpose), counter: (number, epoch) of the Philox words that are the sort keys.
    """
    philox = np.random.Philox(
        key=np.array(key, dtype=np.uint64), counter=np.array([0, *counter, 0], dtype=np.uint64)
    )
    return np.argsort(philox.random_raw(size), kind="stable").astype(np.int64, copy=False)


def _offsets(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 and the running sums."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64, copy=False)


def _within(value: int, name: str, low: int, high: int | None) -> None:
    ok = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not ok or value < low or (high is not None and value > high):
        limits = f"from {low:,}" if high is None else f"from {low:,} to {high:,}"
        raise InvalidArgumentError(f"is {value!r}, expected a whole number {limits}", where=name)
