"""SourceList: several sources as one, each with its own genes.

No joint matrix is ever built. The list knows its parts and the order of its cells; whatever depends on
genes (mapping, dense arithmetic, library sizes) is worked out by part. Cells are counted through the list,
so the result for a list is the results of its parts end to end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.csr import CountsReport, CsrBlock
from scfm.data.source import CellSource, RowSelection, positive, selected_positions
from scfm.data.windows import Piece, Window, read_windows
from scfm.errors import InvalidArgumentError

__all__ = ["PartBlock", "SourceList"]


@dataclass(frozen=True)
class PartBlock(CsrBlock):
    """A block of a list: ``row_start`` counts through the list, ``rows`` are positions in the part's file,
    columns are the part's genes. part: number in ``parts``.
    """

    part: int


class SourceList(CellSource):
    """The cells of several sources, one source after another, or any selection of them in any order.

    sources: CellSources, lists among them are taken apart; the same source may stand several times. ``parts``
    are the ordinary sources; a selection keeps all of them, with the chosen cells of each. ``rows`` are
    positions in each part's own file. ``dense`` and ``is_counts`` tell whether all parts are.
    Raises InvalidArgumentError for an empty list.
    """

    def __init__(self, sources: Iterable[CellSource]) -> None:
        given = list(sources)
        for i, source in enumerate(given):
            if not isinstance(source, CellSource):
                raise InvalidArgumentError(
                    f"item {i} is a {type(source).__qualname__}, expected a CellSource",
                    where="SourceList",
                    hint="Open it with scfm.read first.",
                )
        if not given:
            raise InvalidArgumentError("is empty", where="SourceList", hint="Give at least one source.")
        orders = [source._order if isinstance(source, SourceList) else None for source in given]
        order = None
        if any(one is not None for one in orders):
            firsts = np.cumsum([0, *map(len, given)])
            whole = (np.arange(len(s)) if one is None else one for s, one in zip(given, orders, strict=True))
            order = np.concatenate([cells + first for cells, first in zip(whole, firsts, strict=False)])
        self._set([part for source in given for part in source.parts], order)

    def _set(self, parts: list[CellSource], order: NDArray[np.int64] | None) -> None:
        """order: place of each cell in the parts laid end to end; None: that very order."""
        self._parts = _each_its_own(parts)
        self._order = order
        self._place: NDArray[np.int64] | None = None
        self._ends = np.cumsum([len(part) for part in parts])
        self._firsts = self._ends - [len(part) for part in parts]
        self.name = _some([part.name for part in parts])
        self.counts_from = ", ".join(dict.fromkeys(part.counts_from for part in parts))
        self.reader = ", ".join(dict.fromkeys(part.reader for part in parts))
        self.dense = all(part.dense for part in parts)
        self.is_counts = all(part.is_counts for part in parts)
        self._obs = None

    @property
    def parts(self) -> list[CellSource]:
        return list(self._parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def report(self) -> CountsReport:  # type: ignore[override]
        """What the checks saw so far in all parts."""
        return _joined_report([part.report for part in self._parts])

    @property
    def rows(self) -> NDArray[np.int64]:
        """Position of each cell in its part's file or AnnData."""
        return self._in_order(np.concatenate([part.rows for part in self._parts]))

    @property
    def comfortable_block_size(self) -> int:
        return min(part.comfortable_block_size for part in self._parts)

    def row_labels(self, cells: NDArray[np.int64]) -> list[str]:
        """Row and file of each cell."""
        joined = cells if self._order is None else self._order[cells]
        part_of = np.searchsorted(self._ends, joined, side="right")
        labels = []
        for part, cell in zip(part_of.tolist(), joined - self._firsts[part_of], strict=True):
            labels.append(f"{self._parts[part].row_labels(np.array([cell]))[0]} of {self._parts[part].name}")
        return labels

    @property
    def num_genes(self) -> int:
        return len(self.genes)

    @property
    def genes(self) -> pd.DataFrame:
        """The table of genes, if all parts have the same genes in the same order.

        The table of a union is not built: raises InvalidArgumentError where genes differ.
        """
        first = self._parts[0].genes
        for part in self._parts[1:]:
            if not part.genes.index.equals(first.index):
                raise InvalidArgumentError(
                    f"the parts have different genes: {self._parts[0].name} has {len(first):,}, {part.name} "
                    f"has {len(part.genes):,}, not the same in the same order",
                    where="genes of a list of sources",
                    hint="Look at source.parts[i].genes; tokenizers map the genes of each part by themselves.",
                )
        return first

    @property
    def obs(self) -> pd.DataFrame:
        """All columns of all parts; a cell has NaN in a column that its part does not have.

        Categories are united. The index is the parts' own, repeats kept.
        """
        if self._obs is None:
            tables = [part.obs for part in self._parts]
            names = dict.fromkeys(name for table in tables for name in table.columns)
            lengths = [len(table) for table in tables]
            columns = {
                name: _joined_column([_column(table, name) for table in tables], lengths) for name in names
            }
            # Given before the index is: a table of no columns would lose its cells.
            joined = pd.DataFrame(columns, index=pd.RangeIndex(sum(lengths)))
            joined.index = tables[0].index.append([table.index for table in tables[1:]])
            self._obs = joined if self._order is None else joined.iloc[self._order]
        return self._obs

    @property
    def obs_column_names(self) -> list[str]:
        return list(dict.fromkeys(name for part in self._parts for name in part.obs_column_names))

    def obs_column(self, name: str) -> pd.Series | None:
        """One column, numbered from 0, NaN in the parts without it; None where no part has it."""
        columns = [part.obs_column(name) for part in self._parts]
        if all(column is None for column in columns):
            return None
        joined = _joined_column(columns, [len(part) for part in self._parts])
        return joined if self._order is None else joined.iloc[self._order].reset_index(drop=True)

    def place_of(self, joined: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in this list of cells that are given by their place in the parts laid end to end."""
        if self._order is None:
            return joined
        if self._place is None:
            self._place = np.argsort(self._order)
        return self._place[joined]

    def blocks(self, block_size: int = 4096, *, empty_bad_cells: bool = False) -> Iterator[PartBlock]:
        """Checked blocks of at most ``block_size`` cells, in order, each of one part.

        Where the order hops between parts, every hop begins a block; ``windows`` puts up with hops better.
        """
        size = positive(block_size, "block_size")
        if self._order is not None:
            return _runs(self.windows(size, empty_bad_cells=empty_bad_cells))
        return self._blocks_of_parts(size, empty_bad_cells)

    def _blocks_of_parts(self, block_size: int, empty_bad_cells: bool) -> Iterator[PartBlock]:
        for part in self._parts:
            part.report = CountsReport()
        for number, part in enumerate(self._parts):
            first = int(self._firsts[number])
            for block in part.blocks(block_size, empty_bad_cells=empty_bad_cells):
                yield _part_block(block, 0, block.num_cells, first + block.row_start, number)

    def windows(self, block_size: int = 4096, *, empty_bad_cells: bool = False) -> Iterator[Window]:
        size = positive(block_size, "block_size")
        if self._order is None:
            for block in self._blocks_of_parts(size, empty_bad_cells):
                slots = np.arange(block.num_cells)
                cells = slots + block.row_start
                piece = Piece(block.part, block, cells - self._firsts[block.part], slots)
                yield Window(block.row_start + block.num_cells, cells, [piece])
            return
        plan = _InOrder(self._order, size)
        for number, pieces in read_windows(self._parts, plan, empty_bad_cells=empty_bad_cells):
            start = number * size
            stop = min(start + size, len(self))
            yield Window(stop, np.arange(start, stop), pieces)

    def select(self, rows: RowSelection) -> SourceList:
        chosen = selected_positions(rows, len(self))
        joined = chosen if self._order is None else self._order[chosen]
        part_of = np.searchsorted(self._ends, joined, side="right")
        by_part = np.argsort(part_of, kind="stable")
        counts = np.bincount(part_of, minlength=len(self._parts))
        groups = np.split(by_part, np.cumsum(counts)[:-1])
        parts = [
            part.select(joined[group] - first)
            for part, group, first in zip(self._parts, groups, self._firsts, strict=True)
        ]
        selection = SourceList.__new__(SourceList)
        selection._set(parts, None if bool((np.diff(part_of) >= 0).all()) else np.argsort(by_part))
        return selection

    def _in_order(self, joined: NDArray[Any]) -> NDArray[Any]:
        return joined if self._order is None else joined[self._order]

    def __repr__(self) -> str:
        return f"SourceList({len(self._parts)} parts: {self.name}: {len(self):,} cells)"


@dataclass(frozen=True)
class _InOrder:
    """The plan of windows of ``size`` cells of a given order."""

    order: NDArray[np.int64]
    size: int

    @property
    def numbers(self) -> Sequence[int]:
        return range(-(-len(self.order) // self.size))

    def joined(self, number: int) -> NDArray[np.int64]:
        return self.order[number * self.size : (number + 1) * self.size]

    def touching(self, part: int) -> Sequence[int]:
        return self.numbers


def _each_its_own(parts: list[CellSource]) -> list[CellSource]:
    """The parts, a source that stands several times copied: each has its own report of what was seen."""
    seen: set[int] = set()
    own = []
    for part in parts:
        if id(part) in seen:
            part = copy.copy(part)
            part.report = CountsReport()
        seen.add(id(part))
        own.append(part)
    return own


def _runs(windows: Iterator[Window]) -> Iterator[PartBlock]:
    """The windows' cells in order, a block for each run of cells of one part."""
    for window in windows:
        num_cells = len(window.cells)
        piece_of = np.empty(num_cells, dtype=np.int64)
        within = np.empty(num_cells, dtype=np.int64)
        for number, piece in enumerate(window.pieces):
            piece_of[piece.slots] = number
            within[piece.slots] = np.arange(len(piece.slots))
        hops = np.flatnonzero(np.diff(piece_of)) + 1
        for start, stop in pairwise([0, *hops.tolist(), num_cells]):
            piece = window.pieces[piece_of[start]]
            first = int(within[start])
            row_start = int(window.cells[start])
            yield _part_block(piece.block, first, first + stop - start, row_start, piece.part)


def _part_block(block: CsrBlock, start: int, stop: int, row_start: int, part: int) -> PartBlock:
    """Cells ``start`` to ``stop`` of a block."""
    low, high = block.indptr[start], block.indptr[stop]
    return PartBlock(
        indptr=block.indptr[start : stop + 1] - low,
        indices=block.indices[low:high],
        data=block.data[low:high],
        row_start=row_start,
        num_genes=block.num_genes,
        rows=block.rows[start:stop],
        part=part,
    )


def _column(table: pd.DataFrame, name: str) -> pd.Series | None:
    if name not in table.columns:
        return None
    column = table[name]
    return column if isinstance(column, pd.Series) else column.iloc[:, 0]


def _joined_column(columns: Sequence[pd.Series | None], lengths: Sequence[int]) -> pd.Series:
    """The columns end to end, numbered from 0; None stands for ``length`` missing values."""
    present = [column for column in columns if column is not None]
    # A column of no cells says nothing about the type of the others.
    present = [column for column in present if len(column)] or present[:1]
    if all(isinstance(column.dtype, pd.CategoricalDtype) for column in present):
        dtype = _united([column.dtype for column in present])
        present = [column.astype(dtype) for column in present]
    values = present[0] if len(present) == 1 else pd.concat(present)
    values = values.reset_index(drop=True)
    if all(column is not None or not length for column, length in zip(columns, lengths, strict=True)):
        return values
    # Labels that do not exist become missing values of a type that can hold the rest.
    here = np.repeat([column is not None for column in columns], lengths)
    return values.reindex(np.where(here, np.cumsum(here) - 1, -1)).reset_index(drop=True)


def _united(dtypes: Sequence[Any]) -> Any:
    """All categories in order of first appearance; ordered only where all agree on one order."""
    if all(dtype == dtypes[0] for dtype in dtypes):
        return dtypes[0]
    categories = dtypes[0].categories
    for dtype in dtypes[1:]:
        categories = categories.append(dtype.categories.difference(categories, sort=False))
    return pd.CategoricalDtype(categories)


def _joined_report(reports: Sequence[CountsReport]) -> CountsReport:
    """Sums; what belongs to one part alone (rows to look at) is left to that part's report."""
    return CountsReport(
        num_cells=sum(report.num_cells for report in reports),
        num_values=sum(report.num_values for report in reports),
        num_zeros=sum(report.num_zeros for report in reports),
        num_nonintegers=sum(report.num_nonintegers for report in reports),
        num_duplicate_rows=sum(report.num_duplicate_rows for report in reports),
        max_value=max(report.max_value for report in reports),
        num_bad_cells=sum(report.num_bad_cells for report in reports),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
