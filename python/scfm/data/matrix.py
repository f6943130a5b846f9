"""Where counts lie: one small interface, and its forms in memory (CSR, CSC, dense).

A ``CountMatrix`` gives any rows as plain CSR parts and knows nothing of genes' names, of selections or of
what counts should look like. Row pointers of a whole matrix are checked when it is made; column indices
and values are checked block by block in ``csr.validate_block``, before anything computes with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.available_memory import require_memory
from scfm.data.csr import CountsReport, CsrBlock, check_indptr, gather_rows, validate_block
from scfm.data.number_types import Array, check_value_type, plain_indices, plain_values
from scfm.errors import FormatError

__all__ = [
    "CountMatrix",
    "CscInMemory",
    "CsrInMemory",
    "CsrParts",
    "DenseInMemory",
    "csc_to_csr",
    "dense_to_csr",
    "validated",
]

# Dense rows are turned into CSR in pieces of about this many bytes, so that a block never exists dense as
# a whole.
DENSE_PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class CsrParts:
    """Rows in CSR form: indptr int64 from 0, indices int32/int64, data of a native number type.

    facts: a CsrCheck without fault where the reader has already looked at every value, else None.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32] | NDArray[np.int64]
    data: Array
    facts: Any | None = None


class CountMatrix(ABC):
    """Cells x genes. ``name`` is the file or "AnnData", ``dataset`` the place in it, for messages.

    dense: stored dense; cheap_rows: reading a few rows does not read the whole matrix; reader: by what means
    the values are read, for reports; mean_values: stored values a cell, where that is known.
    """

    dense = False
    cheap_rows = True
    reader = "memory"
    mean_values: float | None = None

    def __init__(self, *, name: str, dataset: str, num_cells: int, num_genes: int) -> None:
        self.name = name
        self.dataset = dataset
        self.num_cells = num_cells
        self.num_genes = num_genes

    @contextmanager
    def opened(self) -> Iterator[Callable[[NDArray[np.int64]], CsrParts]]:
        """A function that reads the given rows, in that order, repeats allowed; files stay open inside."""
        yield self.read

    @abstractmethod
    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        """The given rows (int64 positions, already within bounds)."""

    def stream(self, requests: Iterable[NDArray[np.int64]]) -> Generator[CsrParts, None, None]:
        """The rows of one request after another, in order; ``requests`` may be asked some way ahead."""
        with self.opened() as read:
            for rows in requests:
                yield read(rows)

    def sample_values(self, num_values: int) -> Array:
        """Some stored values without regard to rows; only for matrices without cheap rows."""
        raise NotImplementedError


class CsrInMemory(CountMatrix):
    """The three arrays of a scipy CSR matrix; nothing is copied until rows are read."""

    def __init__(
        self,
        indptr: Array,
        indices: Array,
        data: Array,
        *,
        num_cells: int,
        num_genes: int,
        name: str,
        dataset: str,
    ) -> None:
        super().__init__(name=name, dataset=dataset, num_cells=num_cells, num_genes=num_genes)
        check_value_type(data.dtype, name=name, dataset=dataset)
        self._indptr = plain_indices(indptr, name=name, dataset=dataset).astype(np.int64, copy=False)
        if len(data) != len(indices):
            raise FormatError(
                f"{len(data):,} values, {len(indices):,} column indices", path=name, where=dataset
            )
        # scipy allows spare room behind the last row.
        used = int(self._indptr[-1]) if len(self._indptr) else 0
        check_indptr(
            self._indptr,
            num_rows=num_cells,
            num_values=used if 0 <= used <= len(data) else len(data),
            num_columns=num_genes,
            name=name,
            dataset=dataset,
        )
        self._indices = indices
        self._data = data
        self.mean_values = used / max(num_cells, 1)

    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        if _contiguous(rows):
            first, last = int(rows[0]), int(rows[-1]) + 1
            start, stop = self._indptr[first], self._indptr[last]
            indptr = self._indptr[first : last + 1] - start
            indices, data = self._indices[start:stop], self._data[start:stop]
        else:
            indptr, positions = gather_rows(self._indptr, rows)
            indices, data = self._indices[positions], self._data[positions]
        return CsrParts(
            indptr,
            plain_indices(indices, name=self.name, dataset=f"{self.dataset}/indices"),
            plain_values(data, name=self.name, dataset=f"{self.dataset}/data"),
        )


class CscInMemory(CountMatrix):
    """A CSC matrix, turned into CSR at the first read: cells cannot be had one by one from columns."""

    cheap_rows = False

    def __init__(
        self,
        indptr: Array,
        indices: Array,
        data: Array,
        *,
        num_cells: int,
        num_genes: int,
        name: str,
        dataset: str,
    ) -> None:
        super().__init__(name=name, dataset=dataset, num_cells=num_cells, num_genes=num_genes)
        check_value_type(data.dtype, name=name, dataset=dataset)
        self._arrays = (indptr, indices, data)
        self._csr: CsrInMemory | None = None

    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        if self._csr is None:
            self._csr = csc_to_csr(*self._arrays, matrix=self)
        return self._csr.read(rows)

    def sample_values(self, num_values: int) -> Array:
        data = self._arrays[2]
        step = max(len(data) // max(num_values, 1), 1)
        return plain_values(data[::step], name=self.name, dataset=f"{self.dataset}/data")


def csc_to_csr(indptr: Array, indices: Array, data: Array, *, matrix: CountMatrix) -> CsrInMemory:
    """A checked CSR copy of a CSC matrix. Raises what the CSR check raises, and ResourceError beforehand.

    The columns are first checked as if they were the rows of a CSR matrix, because scipy's conversion trusts
    its input.
    """
    from scipy.sparse import csc_matrix

    name, dataset = matrix.name, matrix.dataset
    num_cells, num_genes = matrix.num_cells, matrix.num_genes
    # Converted arrays, and the checked ones where types had to change.
    require_memory(
        len(data) * (data.dtype.itemsize + 8) * 2,
        purpose=f"turning {len(data):,} values from columns (CSC) into rows (CSR)",
        name=name,
        where=dataset,
        hint="Save the matrix as CSR once (adata.X = adata.X.tocsr()) on a machine with more memory.",
    )
    columns = plain_indices(indptr, name=name, dataset=f"{dataset}/indptr").astype(np.int64, copy=False)
    used = int(columns[-1]) if len(columns) else 0
    check_indptr(
        columns,
        num_rows=num_genes,
        num_values=used if 0 <= used <= len(data) else len(data),
        num_columns=num_cells,
        name=name,
        dataset=dataset,
        line="column",
    )
    block = CsrBlock(
        indptr=columns,
        indices=plain_indices(indices[:used], name=name, dataset=f"{dataset}/indices"),
        data=plain_values(data[:used], name=name, dataset=f"{dataset}/data"),
        row_start=0,
        num_genes=num_cells,
        rows=np.arange(num_genes, dtype=np.int64),
    )
    _check_cell_indices(block, name=name, dataset=dataset)
    rows = csc_matrix((block.data, block.indices, block.indptr), shape=(num_cells, num_genes)).tocsr()
    return CsrInMemory(
        rows.indptr,
        rows.indices,
        rows.data,
        num_cells=num_cells,
        num_genes=num_genes,
        name=name,
        dataset=dataset,
    )


def _check_cell_indices(block: CsrBlock, *, name: str, dataset: str) -> None:
    """Cell indices of columns within bounds. Values are left to the row-wise check, which can name the
    cell."""
    if not len(block.indices):
        return
    low, high = int(block.indices.min()), int(block.indices.max())
    if low < 0 or high >= block.num_genes:
        wrong = (block.indices < 0) | (block.indices >= block.num_genes)
        position = int(np.flatnonzero(wrong)[0])
        column = int(np.searchsorted(block.indptr, position, side="right")) - 1
        raise FormatError(
            f"row index {int(block.indices[position])} is outside 0..{block.num_genes - 1}",
            path=name,
            where=f"{dataset}, column {column}",
            hint="The file is damaged; write it again.",
        )


class DenseInMemory(CountMatrix):
    """A dense array of any memory order; only the rows being read are ever copied."""

    dense = True

    def __init__(self, values: Array, *, name: str, dataset: str) -> None:
        if values.ndim != 2:
            raise FormatError(f"has {values.ndim} dimensions, expected 2", path=name, where=dataset)
        check_value_type(values.dtype, name=name, dataset=dataset)
        num_cells, num_genes = values.shape
        super().__init__(name=name, dataset=dataset, num_cells=num_cells, num_genes=num_genes)
        self._values = values

    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        def fetch(chosen: NDArray[np.int64]) -> Array:
            return self._values[chosen[0] : chosen[-1] + 1] if _contiguous(chosen) else self._values[chosen]

        return dense_to_csr(fetch, rows, self, self._values.dtype.itemsize)


def dense_to_csr(
    fetch: Callable[[NDArray[np.int64]], Array],
    rows: NDArray[np.int64],
    matrix: CountMatrix,
    itemsize: int,
    *,
    multiple_of: int = 1,
) -> CsrParts:
    """Non-zero entries of dense rows that ``fetch`` delivers piece by piece. NaN counts as non-zero.

    multiple_of: rows a stored chunk holds; whole chunks are fetched at a time where that stays small.
    """
    per_piece = max(DENSE_PIECE_BYTES // max(matrix.num_genes * itemsize, 1), 1)
    if per_piece > multiple_of:
        per_piece -= per_piece % multiple_of
    lengths = np.zeros(len(rows), dtype=np.int64)
    # The empty piece gives the arrays their type when there are no rows.
    indices = [np.empty(0, dtype=np.int32)]
    data: list[Array] = []
    for start in range(0, max(len(rows), 1), per_piece):
        piece = rows[start : start + per_piece]
        values = fetch(piece) if len(piece) else np.empty((0, matrix.num_genes), dtype=np.uint8)
        values = plain_values(np.asarray(values), name=matrix.name, dataset=matrix.dataset)
        expressed = values != 0
        lengths[start : start + len(piece)] = np.count_nonzero(expressed, axis=1)
        indices.append(np.nonzero(expressed)[1].astype(np.int32))
        data.append(values[expressed])
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=indptr[1:])
    return CsrParts(indptr, np.concatenate(indices), np.concatenate(data))


def _contiguous(rows: NDArray[np.int64]) -> bool:
    return len(rows) > 0 and bool((np.diff(rows) == 1).all())


def validated(
    parts: CsrParts,
    matrix: CountMatrix,
    rows: NDArray[np.int64],
    row_start: int,
    *,
    gene_names: Callable[[], Any],
    report: CountsReport,
    assume_counts: bool,
    empty_bad_cells: bool = False,
) -> CsrBlock:
    """The parts as a checked block."""
    block = CsrBlock(
        indptr=parts.indptr,
        indices=parts.indices,
        data=parts.data,
        row_start=row_start,
        num_genes=matrix.num_genes,
        rows=rows,
    )
    return validate_block(
        block,
        name=matrix.name,
        dataset=matrix.dataset,
        gene_names=gene_names,
        report=report,
        assume_counts=assume_counts,
        empty_bad_cells=empty_bad_cells,
        facts=parts.facts,
    )
