"""CellSource: raw counts of cells, wherever they lie, read block by block.

Everything downstream (tokenizers, embedding, training) sees cells only through this class: a number of
cells, the genes' and cells' tables, and validated CSR blocks. A selection is a CellSource too, and
remembers where each of its cells stands in the original, so that results and errors can always be traced
to a row of the user's file.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.cell_table import CellTable, TableInMemory
from scfm.data.csr import CountsReport, CsrBlock
from scfm.data.matrix import CountMatrix, validated
from scfm.data.windows import Piece, Window
from scfm.errors import FormatError, InvalidArgumentError, ScfmWarning

if TYPE_CHECKING:
    from scfm.data.shuffle import ShuffledCells

__all__ = ["CellSource"]

_COMFORTABLE_VALUES = 1 << 21

RowSelection = slice | range | Sequence[int] | Sequence[bool] | NDArray[Any]


class CellSource:
    """Cells with raw counts.

    name: the file's path, or "AnnData"; counts_from: "X", "raw.X", "layers['counts']", ...; dense: the
    counts are stored dense; is_counts: a sample of the values looked like raw counts (False only after
    assume_counts); rows: int64 (num_cells,), each cell's position in the file or AnnData; report: what
    the checks saw so far. ``scfm.read`` makes one.
    """

    def __init__(
        self,
        matrix: CountMatrix,
        *,
        counts_from: str,
        genes: Callable[[], pd.DataFrame],
        obs: Callable[[], pd.DataFrame],
        is_counts: bool = True,
        assume_counts: bool = False,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.name = matrix.name
        self.counts_from = counts_from
        self.dense = matrix.dense
        self.reader = matrix.reader
        self.is_counts = is_counts
        self.report = CountsReport()
        self._matrix = matrix
        self._load_genes = genes
        self._load_obs = obs if isinstance(obs, CellTable) else TableInMemory(obs)
        self._assume_counts = assume_counts
        self._rows = rows
        self._genes: pd.DataFrame | None = None
        self._obs: pd.DataFrame | None = None
        self._told: set[str] = set()
        self._fractions_expected = False

    def __len__(self) -> int:
        return self._matrix.num_cells if self._rows is None else len(self._rows)

    @property
    def num_cells(self) -> int:
        return len(self)

    @property
    def parts(self) -> list[CellSource]:
        """The sources of one matrix each that this one is made of: itself, unless it is a list."""
        return [self]

    @property
    def num_genes(self) -> int:
        return self._matrix.num_genes

    @property
    def rows(self) -> NDArray[np.int64]:
        """Position of each cell in the file or AnnData."""
        if self._rows is None:
            return np.arange(self._matrix.num_cells, dtype=np.int64)
        return self._rows

    @property
    def genes(self) -> pd.DataFrame:
        """The table of genes (var), one row a column of the counts; read when first asked for."""
        if self._genes is None:
            table = self._load_genes()
            if len(table) != self.num_genes:
                raise FormatError(
                    f"{len(table)} genes are described, the counts have {self.num_genes} columns",
                    path=self.name,
                    where=self.counts_from,
                )
            self._genes = table
        return self._genes

    @property
    def obs(self) -> pd.DataFrame:
        """The table of these cells, in their order; read when first asked for."""
        if self._obs is None:
            table = self._load_obs()
            if len(table) != self._matrix.num_cells:
                raise FormatError(
                    f"{len(table)} cells are described, the counts have {self._matrix.num_cells} rows",
                    path=self.name,
                    where="obs",
                )
            self._obs = table if self._rows is None else table.iloc[self._rows]
        return self._obs

    @property
    def obs_column_names(self) -> list[str]:
        """The columns of obs, without its index; no values are read."""
        return self._load_obs.names()

    def obs_column(self, name: str) -> pd.Series | None:
        """One column of obs for these cells, in their order and numbered from 0; None where it is absent.

        Nothing else of the table is read, so damage elsewhere in it does not matter. Raises FormatError.
        """
        column = self._load_obs.column(name)
        if column is None:
            return None
        if len(column) != self._matrix.num_cells:
            raise FormatError(
                f"has {len(column)} entries, the counts have {self._matrix.num_cells} rows",
                path=self.name,
                where=f"obs[{name!r}]",
            )
        return column if self._rows is None else column.iloc[self._rows].reset_index(drop=True)

    @property
    def comfortable_block_size(self) -> int:
        """Cells a block of some two million values: it stays near the processor, and keeps all threads busy."""
        mean = self._matrix.mean_values
        return 4096 if mean is None else int(np.clip(_COMFORTABLE_VALUES / max(mean, 1.0), 256, 16_384))

    def row_labels(self, cells: NDArray[np.int64]) -> list[str]:
        """How messages name these of the source's cells: by their rows in the file."""
        return [str(row) for row in (cells if self._rows is None else self._rows[cells])]

    def blocks(self, block_size: int = 4096, *, empty_bad_cells: bool = False) -> Iterator[CsrBlock]:
        """Checked blocks of at most ``block_size`` cells, in order, raw counts.

        empty_bad_cells: a cell with NaN, infinite or negative counts comes out empty, and a warning counts
        them, instead of a BadCellError.

        Raises FormatError, BadCellError or NotCountsError naming the row. Warns once a source, after the last
        block, about repeated columns, accepted non-integers and counts beyond 2^24.
        """
        return self._blocks(positive(block_size, "block_size"), empty_bad_cells)

    def _blocks(self, block_size: int, empty_bad_cells: bool) -> Iterator[CsrBlock]:
        # A fresh report each time round, or a second epoch would double every number.
        self.report = report = CountsReport()
        starts = range(0, len(self), block_size)
        requests = (np.arange(start, min(start + block_size, len(self))) for start in starts)
        with closing(self.gather(requests, report, empty_bad_cells=empty_bad_cells)) as blocks:
            yield from blocks
        self.tell(report)

    def gather(
        self, requests: Iterable[NDArray[np.int64]], report: CountsReport, *, empty_bad_cells: bool = False
    ) -> Generator[CsrBlock, None, None]:
        """A checked block for each request: at least one of this source's cells, in any order, repeats allowed.

        ``row_start`` is the first of them. Requests are asked some way ahead of the blocks; what the checks
        see is added to ``report``, and ``tell`` warns of it.
        """
        asked: deque[tuple[int, NDArray[np.int64]]] = deque()

        def rows_of_requests() -> Iterator[NDArray[np.int64]]:
            for cells in requests:
                rows = cells if self._rows is None else self._rows[cells]
                asked.append((int(cells[0]), rows))
                yield rows

        with closing(self._matrix.stream(rows_of_requests())) as stream:
            for parts in stream:
                row_start, rows = asked.popleft()
                yield validated(
                    parts,
                    self._matrix,
                    rows,
                    row_start,
                    gene_names=self._gene_names,
                    report=report,
                    assume_counts=self._assume_counts,
                    empty_bad_cells=empty_bad_cells,
                )

    def tell(self, report: CountsReport) -> None:
        """Warn of what the checks saw, each kind once a source."""
        for kind, message in report.messages().items():
            if kind not in self._told and not (kind == "nonintegers" and self._fractions_expected):
                self._told.add(kind)
                warnings.warn(f"{self.name}: {self.counts_from}: {message}", ScfmWarning, stacklevel=4)

    def expect_fractions(self) -> None:
        """For models that take any values from 0: no warning says that these are no raw counts."""
        for part in self.parts:
            part._fractions_expected = True

    def windows(self, block_size: int = 4096, *, empty_bad_cells: bool = False) -> Iterator[Window]:
        """The cells of ``blocks(block_size)`` in the form that any order of any parts has."""
        for block in self.blocks(block_size, empty_bad_cells=empty_bad_cells):
            slots = np.arange(block.num_cells)
            cells = slots + block.row_start
            yield Window(block.row_start + block.num_cells, cells, [Piece(0, block, cells, slots)])

    def shuffled(
        self,
        *,
        seed: int,
        epoch: int = 0,
        block_size: int = 64,
        window: int = 4096,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> ShuffledCells:
        """The cells of one training epoch in shuffled order, read window by window; see scfm.data.shuffle.

        The order depends on the lengths of ``parts``, seed, epoch, block_size and window only. start: cells
        of that order already done with; rank, world_size: which of the windows are read here.
        Raises InvalidArgumentError.
        """
        from scfm.data.shuffle import ShuffledCells

        return ShuffledCells(
            self,
            seed=seed,
            epoch=epoch,
            block_size=block_size,
            window=window,
            start=start,
            rank=rank,
            world_size=world_size,
        )

    def place_of(self, joined: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in this source of cells that are given by their place in ``parts`` laid end to end."""
        return joined

    def _gene_names(self) -> Sequence[Any]:
        return list(self.genes.index)

    def select(self, rows: RowSelection) -> CellSource:
        """These cells in this order: a slice, a boolean mask, or positions (negative ones from the end).

        Positions count this source's cells; repeats are allowed. Nothing is read. Raises
        InvalidArgumentError.
        """
        chosen = selected_positions(rows, len(self))
        source = CellSource(
            self._matrix,
            counts_from=self.counts_from,
            genes=self._load_genes,
            obs=self._load_obs,
            is_counts=self.is_counts,
            assume_counts=self._assume_counts,
            rows=chosen if self._rows is None else self._rows[chosen],
        )
        source._genes = self._genes
        source._fractions_expected = self._fractions_expected
        return source

    def __repr__(self) -> str:
        return (
            f"CellSource({self.name!r}: {len(self):,} cells x {self.num_genes:,} genes, "
            f"counts from {self.counts_from})"
        )


def positive(value: int, name: str) -> int:
    """The value, if it is a whole number from 1; raises InvalidArgumentError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InvalidArgumentError(f"is {value!r}, expected a positive integer", where=name)
    return int(value)


def selected_positions(rows: RowSelection, num_cells: int) -> NDArray[np.int64]:
    """A selection among ``num_cells`` cells as positions from 0. Raises InvalidArgumentError."""
    if isinstance(rows, slice):
        return np.arange(num_cells, dtype=np.int64)[rows]
    chosen = np.asarray(rows)
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "biu"):
        raise InvalidArgumentError(
            f"has {chosen.ndim} dimensions of type {chosen.dtype}; expected a slice, a boolean mask or "
            "integer positions",
            where="select(rows)",
        )
    if chosen.dtype == np.bool_:
        if len(chosen) != num_cells:
            raise InvalidArgumentError(
                f"the mask has {len(chosen)} entries, the source {num_cells} cells", where="select(rows)"
            )
        return np.flatnonzero(chosen).astype(np.int64, copy=False)
    if chosen.size and (int(chosen.min()) < -num_cells or int(chosen.max()) >= num_cells):
        wrong = int(chosen.max()) if int(chosen.max()) >= num_cells else int(chosen.min())
        raise InvalidArgumentError(
            f"position {wrong} is outside the source's {num_cells} cells", where="select(rows)"
        )
    chosen = chosen.astype(np.int64)
    return np.where(chosen < 0, chosen + num_cells, chosen)
