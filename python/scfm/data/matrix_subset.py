"""Some rows, or some columns, of a count matrix that stays where it is.

A backed view of an AnnData is rows of a file; a 10x file's genes are some of its features. Both are read
through the whole matrix's own reader, so nothing is loaded or copied beforehand, and its read-ahead stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from scfm.data.matrix import CountMatrix, CsrParts
from scfm.data.number_types import Array
from scfm.errors import FormatError

__all__ = ["ChosenColumns", "ChosenRows"]


class ChosenRows(CountMatrix):
    """Row ``i`` is row ``rows[i]`` of the matrix. Its errors name the whole matrix's rows."""

    def __init__(self, matrix: CountMatrix, rows: NDArray[np.int64]) -> None:
        super().__init__(
            name=matrix.name, dataset=matrix.dataset, num_cells=len(rows), num_genes=matrix.num_genes
        )
        self.dense, self.cheap_rows, self.reader = matrix.dense, matrix.cheap_rows, matrix.reader
        self.mean_values = matrix.mean_values
        self._matrix = matrix
        self._rows = rows

    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        return self._matrix.read(self._rows[rows])

    def stream(self, requests: Iterable[NDArray[np.int64]]) -> Generator[CsrParts, None, None]:
        yield from self._matrix.stream(self._rows[rows] for rows in requests)

    def sample_values(self, num_values: int) -> Array:
        return self._matrix.sample_values(num_values)


class ChosenColumns(CountMatrix):
    """The matrix without its other columns; ``columns`` ascends. Row sums count the chosen columns only."""

    def __init__(self, matrix: CountMatrix, columns: NDArray[np.int64]) -> None:
        super().__init__(
            name=matrix.name, dataset=matrix.dataset, num_cells=matrix.num_cells, num_genes=len(columns)
        )
        self.dense, self.cheap_rows, self.reader = matrix.dense, matrix.cheap_rows, matrix.reader
        self.mean_values = matrix.mean_values
        self._matrix = matrix
        self._new_column = np.full(matrix.num_genes, -1, dtype=np.int32)
        self._new_column[columns] = np.arange(len(columns), dtype=np.int32)

    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        return self._chosen(self._matrix.read(rows), rows)

    def stream(self, requests: Iterable[NDArray[np.int64]]) -> Generator[CsrParts, None, None]:
        asked: deque[NDArray[np.int64]] = deque()

        def remembered() -> Iterator[NDArray[np.int64]]:
            for rows in requests:
                asked.append(rows)
                yield rows

        with closing(self._matrix.stream(remembered())) as stream:
            for parts in stream:
                yield self._chosen(parts, asked.popleft())

    def sample_values(self, num_values: int) -> Array:
        return self._matrix.sample_values(num_values)

    def _chosen(self, parts: CsrParts, rows: NDArray[np.int64]) -> CsrParts:
        """The parts renumbered. Columns out of bounds are refused here: a lookup would wrap or crash."""
        wrong = (parts.indices < 0) | (parts.indices >= len(self._new_column))
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            row = int(np.searchsorted(parts.indptr, position, side="right")) - 1
            raise FormatError(
                f"column index {int(parts.indices[position])} is outside 0..{len(self._new_column) - 1}",
                path=self.name,
                where=f"{self.dataset}, row {int(rows[row])}",
                hint="The file is damaged; write it again.",
            )
        columns = self._new_column[parts.indices]
        kept = columns >= 0
        passed = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64, copy=False)
        return CsrParts(passed[parts.indptr], columns[kept], parts.data[kept])
