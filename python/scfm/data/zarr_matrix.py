"""Counts inside a zarr store, read a block of rows at a time: CSR, CSC and dense.

CSR arrays in a local folder whose codecs are known go to the native reader, from a table of where their
chunks lie; everything else, and whatever the native reader cannot word, is read through zarr-python. Shapes,
lengths and types come from the metadata and are compared before anything is allocated; a missing chunk is
never taken for zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.available_memory import require_memory
from scfm.data.csr import check_indptr, gather_rows
from scfm.data.h5_file import reading
from scfm.data.matrix import DENSE_PIECE_BYTES, CountMatrix, CscInMemory, CsrParts, dense_to_csr
from scfm.data.native_csr import NativeCsr, native_obstacle
from scfm.data.number_types import Array, check_value_type, plain_indices, plain_values
from scfm.data.stored_array import StoredArray
from scfm.data.zarr_chunks import check_shards, stored_array
from scfm.data.zarr_metadata import ArrayLayout, array_layout
from scfm.data.zarr_store import OpenStore, ZarrStore
from scfm.errors import FormatError, ScfmError

__all__ = ["CscInZarr", "CsrInZarr", "DenseInZarr"]

# A stretch of a CSR matrix read at once: at most this many values.
_MAX_STRETCH = 1 << 24


class _ZarrMatrix(CountMatrix):
    reader = "zarr-python"

    def __init__(self, store: ZarrStore, place: str, *, label: str, num_cells: int, num_genes: int) -> None:
        super().__init__(name=store.path, dataset=label, num_cells=num_cells, num_genes=num_genes)
        self._store = store
        self._place = place

    @contextmanager
    def opened(self) -> Iterator[Callable[[NDArray[np.int64]], CsrParts]]:
        with self._store.opened(blosc=blosc_keys(*self._layouts())) as store:

            def read(rows: NDArray[np.int64]) -> CsrParts:
                self._store.check_unchanged()
                return self._read(store, rows)

            yield read

    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        with self.opened() as read:
            return read(rows)

    def _layouts(self) -> tuple[ArrayLayout, ...]:
        """Of the arrays that hold the counts."""
        raise NotImplementedError

    def _read(self, store: OpenStore, rows: NDArray[np.int64]) -> CsrParts:
        raise NotImplementedError


class _SparseArrays:
    """Layouts of a sparse group's data and indices, compared; and its row or column pointers, checked."""

    def __init__(self, matrix: _ZarrMatrix, *, num_lines: int, num_columns: int, line: str) -> None:
        store, place = matrix._store, matrix._place
        self.data = array_layout(store, f"{place}/data")
        self.indices = array_layout(store, f"{place}/indices")
        pointers = array_layout(store, f"{place}/indptr")
        for layout in (self.data, self.indices, pointers):
            if len(layout.shape) != 1:
                raise FormatError(
                    f"has shape {layout.shape}, expected one dimension", path=store.path, where=layout.place
                )
        if self.data.shape != self.indices.shape:
            raise FormatError(
                f"{self.data.shape[0]:,} values in data, {self.indices.shape[0]:,} in indices",
                path=store.path,
                where=place,
                hint="The store is damaged; write it again.",
            )
        check_value_type(_number_type(self.data, store.path), name=store.path, dataset=self.data.place)
        _number_type(self.indices, store.path)
        self.num_values = self.data.shape[0]
        found = self._pointers(store, pointers, num_lines)
        self.indptr = plain_indices(found, name=store.path, dataset=pointers.place).astype(
            np.int64, copy=False
        )
        check_indptr(
            self.indptr,
            num_rows=num_lines,
            num_values=self.num_values,
            num_columns=num_columns,
            name=store.path,
            dataset=place,
            line=line,
        )

    def _pointers(self, store: ZarrStore, layout: ArrayLayout, num_lines: int) -> Array:
        if layout.shape[0] != num_lines + 1:
            raise FormatError(
                f"has {layout.shape[0]:,} entries, expected {num_lines + 1:,}",
                path=store.path,
                where=layout.place,
            )
        _number_type(layout, store.path)
        # Without any value all pointers are zero, and writers leave out chunks of zeros.
        empty = self.num_values == 0
        if not empty:
            check_shards(store, layout)
        return whole_array(store, layout, strict=not empty)


class CsrInZarr(_ZarrMatrix):
    """A group with data, indices, indptr; rows are cells."""

    def __init__(self, store: ZarrStore, place: str, *, label: str, num_cells: int, num_genes: int) -> None:
        super().__init__(store, place, label=label, num_cells=num_cells, num_genes=num_genes)
        self._arrays = _SparseArrays(self, num_lines=num_cells, num_columns=num_genes, line="row")
        self._indptr = self._arrays.indptr
        layout = self._arrays.data
        self._chunk = (layout.inner or layout.chunks)[0]
        self._shards_checked = False
        self.mean_values = self._arrays.num_values / max(num_cells, 1)
        self._native: NativeCsr | None = None
        tables = self._chunk_tables()
        if isinstance(tables, str):
            self.reader = f"zarr-python ({tables})"
            return
        self._native = NativeCsr(
            *tables,
            self._indptr,
            name=self.name,
            dataset=self.dataset,
            num_cells=num_cells,
            num_genes=num_genes,
            check_unchanged=store.check_unchanged,
            fallback=self,
        )
        self.reader = self._native.reader

    def _chunk_tables(self) -> tuple[StoredArray, StoredArray] | str:
        """What the native reader needs, or why it must be zarr-python."""
        if not self._store.is_folder:
            return "zip file"
        if not self._arrays.num_values:
            return "no values"
        tables = []
        for layout in (self._arrays.data, self._arrays.indices):
            table = stored_array(self._store, layout)
            if table is None:
                return f"{layout.place} is stored in an unusual way"
            tables.append(table)
        data, indices = tables
        return native_obstacle(data, indices, num_genes=self.num_genes) or (data, indices)

    def _layouts(self) -> tuple[ArrayLayout, ...]:
        return self._arrays.data, self._arrays.indices

    def stream(self, requests: Iterable[NDArray[np.int64]]) -> Generator[CsrParts, None, None]:
        return super().stream(requests) if self._native is None else self._native.stream(requests)

    def _read(self, store: OpenStore, rows: NDArray[np.int64]) -> CsrParts:
        data, indices = self._layouts()
        if not self._shards_checked:
            for layout in (data, indices):
                check_shards(self._store, layout)
            self._shards_checked = True
        lengths = self._indptr[rows + 1] - self._indptr[rows]
        require_memory(
            int(lengths.sum()) * (_number_type(data, self.name).itemsize + 8) * 2,
            purpose=f"reading {len(rows):,} cells",
            name=self.name,
            where=self._place,
            hint="Read fewer cells at a time.",
        )
        # Each stored row is read once, in file order; asked-for order and repeats come last.
        stored, inverse = np.unique(rows, return_inverse=True)
        columns = self._values(store, indices, stored)
        values = self._values(store, data, stored)
        indptr = np.zeros(len(stored) + 1, dtype=np.int64)
        np.cumsum(self._indptr[stored + 1] - self._indptr[stored], out=indptr[1:])
        if len(stored) != len(rows) or not np.array_equal(stored, rows):
            indptr, positions = gather_rows(indptr, inverse.astype(np.int64, copy=False))
            columns, values = columns[positions], values[positions]
        return CsrParts(
            indptr,
            plain_indices(columns, name=self.name, dataset=indices.place),
            plain_values(values, name=self.name, dataset=data.place),
        )

    def _values(self, store: OpenStore, layout: ArrayLayout, rows: NDArray[np.int64]) -> Array:
        """The entries of ascending rows: one read a stretch without a gap wider than a chunk."""
        pieces = [np.empty(0, dtype=_number_type(layout, self.name))]
        for stretch in self._stretches(rows):
            start, stop = int(self._indptr[stretch[0]]), int(self._indptr[stretch[-1] + 1])
            found = stored_values(store, layout, start, stop, path=self.name)
            if len(stretch) <= stretch[-1] - stretch[0]:
                _, wanted = gather_rows(self._indptr, stretch)
                found = found[wanted - start]
            pieces.append(found)
        return np.concatenate(pieces)

    def _stretches(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if not len(rows):
            return []
        gaps = self._indptr[rows[1:]] - self._indptr[rows[:-1] + 1]
        size = (self._indptr[rows + 1] - self._indptr[rows[0]]) // _MAX_STRETCH
        cuts = np.flatnonzero((gaps > self._chunk) | (np.diff(size) > 0)) + 1
        return np.split(rows, cuts)


class CscInZarr(_ZarrMatrix):
    """A group with data, indices, indptr; columns are genes. Loaded and turned into CSR at the first read."""

    cheap_rows = False

    def __init__(self, store: ZarrStore, place: str, *, label: str, num_cells: int, num_genes: int) -> None:
        super().__init__(store, place, label=label, num_cells=num_cells, num_genes=num_genes)
        self._arrays = _SparseArrays(self, num_lines=num_genes, num_columns=num_cells, line="column")
        check_shards(store, self._arrays.data)
        check_shards(store, self._arrays.indices)
        self._loaded: CscInMemory | None = None

    def _layouts(self) -> tuple[ArrayLayout, ...]:
        return self._arrays.data, self._arrays.indices

    def _read(self, store: OpenStore, rows: NDArray[np.int64]) -> CsrParts:
        if self._loaded is None:
            self._loaded = self._load(store)
        return self._loaded.read(rows)

    def _load(self, store: OpenStore) -> CscInMemory:
        data, indices, num_values = self._arrays.data, self._arrays.indices, self._arrays.num_values
        require_memory(
            # Stored arrays plus the converted ones.
            (data.num_bytes + indices.num_bytes) * 2 + 16 * num_values,
            purpose=f"turning {num_values:,} values from columns (CSC) into rows (CSR)",
            name=self.name,
            where=self._place,
            hint="Save the matrix as CSR once (adata.X = adata.X.tocsr()) on a machine with more memory.",
        )
        return CscInMemory(
            self._arrays.indptr,
            stored_values(store, indices, 0, num_values, path=self.name),
            stored_values(store, data, 0, num_values, path=self.name),
            num_cells=self.num_cells,
            num_genes=self.num_genes,
            name=self.name,
            dataset=self.dataset,
        )

    def sample_values(self, num_values: int) -> Array:
        data, stored = self._arrays.data, self._arrays.num_values
        part = max(num_values // 3, 1)
        last = max(stored - part, 0)
        with self._store.opened(blosc=blosc_keys(data)) as store:
            pieces = [
                stored_values(store, data, start, min(start + part, stored), path=self.name)
                for start in sorted({0, last // 2, last})
            ]
        return plain_values(np.concatenate(pieces), name=self.name, dataset=data.place)


class DenseInZarr(_ZarrMatrix):
    """A two-dimensional array, cells x genes."""

    dense = True

    def __init__(self, store: ZarrStore, place: str, *, label: str, num_cells: int, num_genes: int) -> None:
        super().__init__(store, place, label=label, num_cells=num_cells, num_genes=num_genes)
        self._layout = array_layout(store, place)
        if self._layout.shape != (num_cells, num_genes):
            raise FormatError(
                f"has shape {self._layout.shape}; obs and var describe {(num_cells, num_genes)} "
                "(cells, genes)",
                path=self.name,
                where=place,
            )
        check_value_type(_number_type(self._layout, self.name), name=self.name, dataset=place)
        check_shards(store, self._layout)

    def _layouts(self) -> tuple[ArrayLayout, ...]:
        return (self._layout,)

    def _read(self, store: OpenStore, rows: NDArray[np.int64]) -> CsrParts:
        stored, inverse = np.unique(rows, return_inverse=True)
        chunk = (self._layout.inner or self._layout.chunks)[0]
        itemsize = _number_type(self._layout, self.name).itemsize

        def fetch(chosen: NDArray[np.int64]) -> Array:
            limit = max(DENSE_PIECE_BYTES // max(self.num_genes * itemsize, 1), 1)
            span = (chosen - chosen[0]) // limit
            cuts = np.flatnonzero((np.diff(chosen) > chunk) | (np.diff(span) > 0)) + 1
            pieces = []
            for stretch in np.split(chosen, cuts):
                start, stop = int(stretch[0]), int(stretch[-1]) + 1
                piece = stored_values(store, self._layout, start, stop, path=self.name)
                pieces.append(piece if len(stretch) == stop - start else piece[stretch - start])
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

        parts = dense_to_csr(fetch, stored, self, itemsize, multiple_of=chunk)
        if len(stored) == len(rows) and np.array_equal(stored, rows):
            return parts
        indptr, positions = gather_rows(parts.indptr, inverse.astype(np.int64, copy=False))
        return CsrParts(indptr, parts.indices[positions], parts.data[positions])


def whole_array(store: ZarrStore, layout: ArrayLayout, *, strict: bool) -> Array:
    """A one-dimensional array, memory checked first. strict: a missing chunk is an error."""
    require_memory(
        layout.num_bytes,
        purpose="reading this array",
        name=store.path,
        where=layout.place,
        hint="The store claims to hold more than fits; check where it comes from.",
    )
    with store.opened(strict=strict, blosc=blosc_keys(layout)) as opened:
        return stored_values(opened, layout, 0, layout.shape[0], path=store.path)


def blosc_keys(*layouts: ArrayLayout) -> list[str]:
    """What the keys begin with of chunks that are blosc buffers by themselves."""
    return [layout.key_prefix for layout in layouts if layout.ends_in_blosc and layout.inner is None]


def stored_values(store: OpenStore, layout: ArrayLayout, start: int, stop: int, *, path: str) -> Array:
    """Entries (or rows) ``start`` to ``stop``. A failure is traced to the chunk that cannot be read."""
    array = store.array(layout.place)
    try:
        with reading(path, f"{layout.place}[{start}:{stop}]"):
            return np.asarray(array[start:stop])
    except FormatError as error:
        raise _narrowed(array, layout, start, stop, path, error) from error


def _narrowed(
    array: Any, layout: ArrayLayout, start: int, stop: int, path: str, error: FormatError
) -> ScfmError:
    """The error of the first chunk that fails by itself."""
    chunk = layout.chunks[0]
    rest = (0,) * (len(layout.shape) - 1)
    for number in range(start // chunk, -(-stop // chunk)):
        part = slice(max(number * chunk, start), min((number + 1) * chunk, stop))
        try:
            with reading(path, f"{layout.place}, chunk {layout.key((number, *rest)).rpartition('/')[2]}"):
                array[part]
        except ScfmError as found:
            return found
    return error


def _number_type(layout: ArrayLayout, path: str) -> np.dtype[Any]:
    if layout.dtype is None:
        raise FormatError("does not hold numbers", path=path, where=layout.place)
    return layout.dtype
