"""Counts inside an HDF5 file, read a block of rows at a time: CSR, CSC and dense, of h5ad and loom alike.

Rows that lie close together are read in one stretch, since HDF5 inflates whole chunks anyway; the wanted
rows are cut out at once, so memory stays that of the block. Shapes, lengths and types are compared before
anything is allocated; only row pointers are read as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from scfm.data.available_memory import require_memory
from scfm.data.csr import check_indptr, gather_rows
from scfm.data.h5_chunks import chunk_table
from scfm.data.h5_file import Hdf5File, check_dataset, locate, read_whole, reading
from scfm.data.h5_filters import check_chunk_sizes
from scfm.data.matrix import DENSE_PIECE_BYTES, CountMatrix, CscInMemory, CsrParts, dense_to_csr
from scfm.data.native_csr import NativeCsr, native_obstacle
from scfm.data.number_types import Array, check_value_type, plain_indices, plain_values
from scfm.data.stored_array import StoredArray
from scfm.errors import FormatError, ScfmError

__all__ = ["CscInHdf5", "CsrInHdf5", "DenseInHdf5"]

# A stretch of a CSR matrix read at once: at most this many values.
_MAX_STRETCH = 1 << 24


class _Hdf5Matrix(CountMatrix):
    reader = "h5py"

    def __init__(self, file: Hdf5File, dataset: str, *, label: str, num_cells: int, num_genes: int) -> None:
        super().__init__(name=file.path, dataset=label, num_cells=num_cells, num_genes=num_genes)
        self._file = file
        self._place = dataset

    @contextmanager
    def opened(self) -> Iterator[Callable[[NDArray[np.int64]], CsrParts]]:
        with self._file.opened() as handle:
            yield lambda rows: self._read_unchanged(handle, rows)

    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        with self._file.opened() as handle:
            return self._read_unchanged(handle, rows)

    def _read_unchanged(self, handle: h5py.File, rows: NDArray[np.int64]) -> CsrParts:
        """The rows, if the file is still what it was: a writer at work looks like damage, or like nothing."""
        try:
            parts = self._read(handle, rows)
        except ScfmError:
            self._file.check_unchanged()
            raise
        self._file.check_unchanged()
        return parts

    def _read(self, handle: h5py.File, rows: NDArray[np.int64]) -> CsrParts:
        raise NotImplementedError

    def _dataset(self, handle: h5py.File, place: str) -> h5py.Dataset:
        dataset = locate(handle, place, path=self.name)
        if not isinstance(dataset, h5py.Dataset):
            raise FormatError("is missing or not a dataset", path=self.name, where=place)
        check_dataset(dataset, path=self.name)
        return dataset


def _value_arrays(matrix: _Hdf5Matrix, handle: h5py.File, place: str) -> tuple[h5py.Dataset, h5py.Dataset]:
    """The data and indices of a sparse group: one-dimensional, of equal length, data of a number type."""
    data = matrix._dataset(handle, f"{place}/data")
    indices = matrix._dataset(handle, f"{place}/indices")
    for dataset in (data, indices):
        if dataset.ndim != 1:
            raise FormatError(
                f"has shape {dataset.shape}, expected one dimension", path=matrix.name, where=dataset.name
            )
    if data.shape != indices.shape:
        raise FormatError(
            f"{data.shape[0]:,} values in data, {indices.shape[0]:,} in indices",
            path=matrix.name,
            where=place,
            hint="The file is damaged; write it again.",
        )
    with reading(matrix.name, f"{place}/data"):
        check_value_type(data.dtype, name=matrix.name, dataset=f"{place}/data")
    return data, indices


class CsrInHdf5(_Hdf5Matrix):
    """A group with data, indices, indptr; rows are cells."""

    def __init__(self, file: Hdf5File, dataset: str, *, label: str, num_cells: int, num_genes: int) -> None:
        super().__init__(file, dataset, label=label, num_cells=num_cells, num_genes=num_genes)
        with file.opened() as handle:
            data, indices = _value_arrays(self, handle, dataset)
            where = f"{dataset}/indptr"
            pointers = read_whole(
                locate(handle, where, path=self.name),
                path=self.name,
                where=where,
                num_values=num_cells + 1,
            )
            num_values = int(data.shape[0])
            self._chunk = data.chunks[0] if data.chunks else 4096
            tables = self._chunk_tables(data, indices)
        self._indptr = plain_indices(pointers, name=self.name, dataset=where).astype(np.int64, copy=False)
        check_indptr(
            self._indptr,
            num_rows=num_cells,
            num_values=num_values,
            num_columns=num_genes,
            name=self.name,
            dataset=dataset,
        )
        self.mean_values = num_values / max(num_cells, 1)
        self._native: NativeCsr | None = None
        if isinstance(tables, str):
            self.reader = f"h5py ({tables})"
        else:
            self._native = NativeCsr(
                *tables,
                self._indptr,
                name=self.name,
                dataset=self.dataset,
                num_cells=num_cells,
                num_genes=num_genes,
                check_unchanged=file.check_unchanged,
                fallback=self,
            )
            self.reader = self._native.reader

    def _chunk_tables(
        self, data: h5py.Dataset, indices: h5py.Dataset
    ) -> tuple[StoredArray, StoredArray] | str:
        """What the native reader needs, or why it must be h5py."""
        if not self._file.is_local:
            return "not a local file"
        values = chunk_table(data, path=self.name)
        columns = chunk_table(indices, path=self.name)
        if isinstance(values, str) or isinstance(columns, str):
            return values if isinstance(values, str) else str(columns)
        return native_obstacle(values, columns, num_genes=self.num_genes) or (values, columns)

    def stream(self, requests: Iterable[NDArray[np.int64]]) -> Generator[CsrParts, None, None]:
        return super().stream(requests) if self._native is None else self._native.stream(requests)

    def _read(self, handle: h5py.File, rows: NDArray[np.int64]) -> CsrParts:
        data, indices = _value_arrays(self, handle, self._place)
        lengths = self._indptr[rows + 1] - self._indptr[rows]
        require_memory(
            int(lengths.sum()) * (data.dtype.itemsize + 8) * 2,
            purpose=f"reading {len(rows):,} cells",
            name=self.name,
            where=self._place,
            hint="Read fewer cells at a time.",
        )
        # Each stored row is read once, in file order; asked-for order and repeats come last.
        stored, inverse = np.unique(rows, return_inverse=True)
        pieces_of_indices = [plain_indices(np.empty(0, indices.dtype), name=self.name, dataset=self._place)]
        pieces_of_data = [plain_values(np.empty(0, data.dtype), name=self.name, dataset=self._place)]
        for stretch in self._stretches(stored):
            start, stop = int(self._indptr[stretch[0]]), int(self._indptr[stretch[-1] + 1])
            with reading(self.name, f"{indices.name}[{start}:{stop}]"):
                check_chunk_sizes(indices, path=self.name, start=start, stop=stop)
                columns = indices[start:stop]
            with reading(self.name, f"{data.name}[{start}:{stop}]"):
                check_chunk_sizes(data, path=self.name, start=start, stop=stop)
                values = data[start:stop]
            if len(stretch) <= stretch[-1] - stretch[0]:
                _, wanted = gather_rows(self._indptr, stretch)
                columns, values = columns[wanted - start], values[wanted - start]
            pieces_of_indices.append(plain_indices(columns, name=self.name, dataset=str(indices.name)))
            pieces_of_data.append(plain_values(values, name=self.name, dataset=str(data.name)))
        columns, values = np.concatenate(pieces_of_indices), np.concatenate(pieces_of_data)
        indptr = np.zeros(len(stored) + 1, dtype=np.int64)
        np.cumsum(self._indptr[stored + 1] - self._indptr[stored], out=indptr[1:])
        if len(stored) != len(rows) or not np.array_equal(stored, rows):
            indptr, positions = gather_rows(indptr, inverse.astype(np.int64, copy=False))
            columns, values = columns[positions], values[positions]
        return CsrParts(indptr, columns, values)

    def _stretches(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Ascending rows cut where a gap is wider than a chunk, and where a stretch gets too large."""
        if not len(rows):
            return []
        gaps = self._indptr[rows[1:]] - self._indptr[rows[:-1] + 1]
        size = (self._indptr[rows + 1] - self._indptr[rows[0]]) // _MAX_STRETCH
        cuts = np.flatnonzero((gaps > self._chunk) | (np.diff(size) > 0)) + 1
        return np.split(rows, cuts)


class CscInHdf5(_Hdf5Matrix):
    """A group with data, indices, indptr; columns are genes. Loaded and turned into CSR at the first read."""

    cheap_rows = False

    def __init__(self, file: Hdf5File, dataset: str, *, label: str, num_cells: int, num_genes: int) -> None:
        super().__init__(file, dataset, label=label, num_cells=num_cells, num_genes=num_genes)
        with file.opened() as handle:
            data, indices = _value_arrays(self, handle, dataset)
            where = f"{dataset}/indptr"
            pointers = read_whole(
                locate(handle, where, path=self.name), path=self.name, where=where, num_values=num_genes + 1
            )
            self._num_values = int(data.shape[0])
            self._bytes_per_value = data.dtype.itemsize + indices.dtype.itemsize
        self._indptr = plain_indices(pointers, name=self.name, dataset=where).astype(np.int64, copy=False)
        check_indptr(
            self._indptr,
            num_rows=num_genes,
            num_values=self._num_values,
            num_columns=num_cells,
            name=self.name,
            dataset=dataset,
            line="column",
        )
        self._loaded: CscInMemory | None = None

    def _read(self, handle: h5py.File, rows: NDArray[np.int64]) -> CsrParts:
        if self._loaded is None:
            self._loaded = self._load(handle)
        return self._loaded.read(rows)

    def _load(self, handle: h5py.File) -> CscInMemory:
        require_memory(
            # Stored arrays plus the converted ones.
            self._num_values * (self._bytes_per_value * 2 + 16),
            purpose=f"turning {self._num_values:,} values from columns (CSC) into rows (CSR)",
            name=self.name,
            where=self._place,
            hint="Save the matrix as CSR once (adata.X = adata.X.tocsr()) on a machine with more memory.",
        )
        data, indices = _value_arrays(self, handle, self._place)
        with reading(self.name, str(indices.name)):
            check_chunk_sizes(indices, path=self.name)
            rows = indices[()]
        with reading(self.name, str(data.name)):
            check_chunk_sizes(data, path=self.name)
            values = data[()]
        return CscInMemory(
            self._indptr,
            rows,
            values,
            num_cells=self.num_cells,
            num_genes=self.num_genes,
            name=self.name,
            dataset=self.dataset,
        )

    def sample_values(self, num_values: int) -> Array:
        with self._file.opened() as handle:
            data, _ = _value_arrays(self, handle, self._place)
            part = max(num_values // 3, 1)
            last = max(self._num_values - part, 0)
            with reading(self.name, str(data.name)):
                starts = sorted({0, last // 2, last})
                for start in starts:
                    check_chunk_sizes(data, path=self.name, start=start, stop=start + part)
                pieces = [data[start : start + part] for start in starts]
        return plain_values(np.concatenate(pieces), name=self.name, dataset=f"{self._place}/data")


class DenseInHdf5(_Hdf5Matrix):
    """A two-dimensional dataset, cells x genes, or genes x cells (``transposed``, as in loom)."""

    dense = True

    def __init__(
        self,
        file: Hdf5File,
        dataset: str,
        *,
        label: str,
        num_cells: int,
        num_genes: int,
        transposed: bool = False,
    ) -> None:
        super().__init__(file, dataset, label=label, num_cells=num_cells, num_genes=num_genes)
        self._transposed = transposed
        with file.opened() as handle:
            values = self._dataset(handle, dataset)
            expected = (num_genes, num_cells) if transposed else (num_cells, num_genes)
            if values.shape != expected:
                kind = "genes x cells" if transposed else "cells x genes"
                raise FormatError(
                    f"has shape {values.shape}; the tables of cells and genes say {expected} ({kind})",
                    path=self.name,
                    where=dataset,
                )
            with reading(self.name, dataset):
                check_value_type(values.dtype, name=self.name, dataset=dataset)
            chunks = values.chunks or (1, 1)
            self._chunk = max(int(chunks[1 if transposed else 0]), 1)

    def _read(self, handle: h5py.File, rows: NDArray[np.int64]) -> CsrParts:
        values = self._dataset(handle, self._place)
        stored, inverse = np.unique(rows, return_inverse=True)

        def fetch(chosen: NDArray[np.int64]) -> Array:
            return self._fetch(values, chosen)

        parts = dense_to_csr(fetch, stored, self, values.dtype.itemsize, multiple_of=self._chunk)
        if len(stored) == len(rows) and np.array_equal(stored, rows):
            return parts
        indptr, positions = gather_rows(parts.indptr, inverse.astype(np.int64, copy=False))
        return CsrParts(indptr, parts.indices[positions], parts.data[positions])

    def _fetch(self, values: Any, rows: NDArray[np.int64]) -> Array:
        """Ascending rows as a dense piece: one read a stretch without a gap wider than a chunk."""
        limit = max(DENSE_PIECE_BYTES // max(self.num_genes * values.dtype.itemsize, 1), 1)
        span = (rows - rows[0]) // limit
        cuts = np.flatnonzero((np.diff(rows) > self._chunk) | (np.diff(span) > 0)) + 1
        pieces = []
        for stretch in np.split(rows, cuts):
            start, stop = int(stretch[0]), int(stretch[-1]) + 1
            with reading(self.name, f"{self._place}, cells {start} to {stop - 1}"):
                axis = 1 if self._transposed else 0
                check_chunk_sizes(values, path=self.name, start=start, stop=stop, axis=axis)
                piece = values[:, start:stop].T if self._transposed else values[start:stop]
            pieces.append(piece if len(stretch) == stop - start else piece[stretch - start])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
