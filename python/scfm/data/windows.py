"""Windows: some cells of several parts, in an asked order, read with one request a part.

A selection that hops between files, and a shuffled epoch, want cells in an order that no file has. Reading
cell by cell would decode every stored chunk again and again, so an order is cut into windows: in each
window every part is asked once for all its cells there, and each cell comes with its place in the window.
Requests go lazily into one stream a part, so that a part can read ahead while the window before is used.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from scfm.data.csr import CountsReport, CsrBlock

if TYPE_CHECKING:
    from scfm.data.source import CellSource

__all__ = ["Piece", "Window", "WindowPlan", "read_windows"]

# Streams hold open files, threads and buffers. Above this many parts each window opens its parts anew,
# which costs the reading ahead and keeps the rest bounded.
_MAX_STREAMS = 64
# Windows whose cells are remembered by part: more than any stream reads ahead.
_WINDOWS_IN_HAND = 64


@dataclass(frozen=True)
class Piece:
    """One part's cells of a window, in the window's order.

    part: number in the source's ``parts``; block: their checked counts; cells: int64, their positions in
    the part; slots: int64, ascending, their places in the window.
    """

    part: int
    block: CsrBlock
    cells: NDArray[np.int64]
    slots: NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Some cells in the asked order. cursor: cells of the whole order up to this window's end; cells: int64,
    their positions in the source, in that order; pieces: their counts, a piece a part.
    """

    cursor: int
    cells: NDArray[np.int64]
    pieces: list[Piece]


class WindowPlan(Protocol):
    """An order of cells, cut into windows."""

    @property
    def numbers(self) -> Sequence[int]:
        """The windows to read, ascending."""

    def joined(self, number: int) -> NDArray[np.int64]:
        """The window's cells, in order, as positions in the parts laid end to end; there may be none."""

    def touching(self, part: int) -> Sequence[int]:
        """Ascending, of ``numbers`` at least those that hold a cell of the part."""


def read_windows(
    parts: Sequence[CellSource], plan: WindowPlan, *, empty_bad_cells: bool = False
) -> Generator[tuple[int, list[Piece]], None, None]:
    """Each window's number and pieces. The parts' reports start anew; warnings come after the last window."""
    reports = [CountsReport() for _ in parts]
    for source, report in zip(parts, reports, strict=True):
        source.report = report
    ends = np.cumsum([len(source) for source in parts])

    @lru_cache(maxsize=_WINDOWS_IN_HAND)
    def split(number: int) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return _by_part(plan.joined(number), ends)

    def blocks_of(part: int, numbers: Sequence[int]) -> Generator[CsrBlock, None, None]:
        requests = (split(number)[part][0] for number in numbers if part in split(number))
        return parts[part].gather(requests, reports[part], empty_bad_cells=empty_bad_cells)

    with ExitStack() as opened:
        streams: dict[int, Generator[CsrBlock, None, None]] = {}
        for number in plan.numbers:
            pieces = []
            for part, (cells, slots) in split(number).items():
                if len(parts) > _MAX_STREAMS:
                    with closing(blocks_of(part, [number])) as stream:
                        block = next(stream)
                else:
                    if part not in streams:
                        streams[part] = opened.enter_context(closing(blocks_of(part, plan.touching(part))))
                    block = next(streams[part])
                pieces.append(Piece(part, block, cells, slots))
            yield number, pieces
    for source, report in zip(parts, reports, strict=True):
        source.tell(report)


def _by_part(
    joined: NDArray[np.int64], ends: NDArray[np.int64]
) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Part number to its cells (positions in the part) and their slots, both in the window's order."""
    if not len(joined):
        return {}
    part_of = np.searchsorted(ends, joined, side="right")
    slots = np.argsort(part_of, kind="stable")
    present, firsts = np.unique(part_of[slots], return_index=True)
    starts = np.concatenate([[0], ends])
    return {
        int(part): (joined[mine] - starts[part], mine)
        for part, mine in zip(present, np.split(slots, firsts[1:]), strict=True)
    }
