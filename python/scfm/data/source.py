"""CellSource: raw counts of cells, wherever they lie, read block by block.

Everything downstream (tokenizers, embedding, training) sees cells only through this class: a number of
cells, the genes' and cells' tables, and validated CSR blocks. A selection is a CellSource too, and
remembers where each of its cells stands in the original, so that results and errors can always be traced
to a row of the user's file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.csr import CountsReport, CsrBlock
from scfm.data.matrix import CountMatrix, validated
from scfm.errors import FormatError, InvalidArgumentError, ScfmWarning

__all__ = ["CellSource"]

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
        self.is_counts = is_counts
        self.report = CountsReport()
        self._matrix = matrix
        self._load_genes = genes
        self._load_obs = obs
        self._assume_counts = assume_counts
        self._rows = rows
        self._genes: pd.DataFrame | None = None
        self._obs: pd.DataFrame | None = None
        self._told: set[str] = set()

    def __len__(self) -> int:
        return self._matrix.num_cells if self._rows is None else len(self._rows)

    @property
    def num_cells(self) -> int:
        return len(self)

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

    def blocks(self, block_size: int = 4096, *, empty_bad_cells: bool = False) -> Iterator[CsrBlock]:
        """Checked blocks of at most ``block_size`` cells, in order, raw counts.

        empty_bad_cells: a cell with NaN, infinite or negative counts comes out empty, and a warning counts
        them, instead of a BadCellError.

        Raises FormatError, BadCellError or NotCountsError naming the row. Warns once a source, after the last
        block, about repeated columns, accepted non-integers and counts beyond 2^24.
        """
        if isinstance(block_size, bool) or not isinstance(block_size, int | np.integer) or block_size < 1:
            raise InvalidArgumentError(f"is {block_size!r}, expected a positive integer", where="block_size")
        return self._blocks(int(block_size), empty_bad_cells)

    def _blocks(self, block_size: int, empty_bad_cells: bool) -> Iterator[CsrBlock]:
        # A fresh report each time round, or a second epoch would double every number.
        self.report = report = CountsReport()
        with self._matrix.opened() as read:
            for start in range(0, len(self), block_size):
                stop = min(start + block_size, len(self))
                if self._rows is None:
                    rows = np.arange(start, stop, dtype=np.int64)
                else:
                    rows = self._rows[start:stop]
                yield validated(
                    read(rows),
                    self._matrix,
                    rows,
                    start,
                    gene_names=self._gene_names,
                    report=report,
                    assume_counts=self._assume_counts,
                    empty_bad_cells=empty_bad_cells,
                )
        for kind, message in report.messages().items():
            if kind not in self._told:
                self._told.add(kind)
                warnings.warn(f"{self.name}: {self.counts_from}: {message}", ScfmWarning, stacklevel=3)

    def _gene_names(self) -> Sequence[Any]:
        return list(self.genes.index)

    def select(self, rows: RowSelection) -> CellSource:
        """These cells in this order: a slice, a boolean mask, or positions (negative ones from the end).

        Positions count this source's cells; repeats are allowed. Nothing is read. Raises
        InvalidArgumentError.
        """
        chosen = _positions(rows, len(self))
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
        return source

    def __repr__(self) -> str:
        return (
            f"CellSource({self.name!r}: {len(self):,} cells x {self.num_genes:,} genes, "
            f"counts from {self.counts_from})"
        )


def _positions(rows: RowSelection, num_cells: int) -> NDArray[np.int64]:
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
