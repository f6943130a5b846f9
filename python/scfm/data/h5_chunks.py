"""Where the chunks of an HDF5 dataset lie in its file: read once from the file's own index.

Afterwards the values can be read without the HDF5 library, whose global lock keeps every other thread waiting
while it inflates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from scfm.data.h5_file import reading
from scfm.data.h5_filters import filters_of
from scfm.data.stored_array import StoredArray, is_plain_type
from scfm.errors import FormatError

__all__ = ["chunk_table"]


def chunk_table(dataset: h5py.Dataset, *, path: str) -> StoredArray | str:
    """The table of a one-dimensional dataset that passed ``check_dataset``, or why the native reader cannot
    take it. Raises FormatError for chunks that were never written or lie outside the file."""
    where = str(dataset.name)
    with reading(path, where):
        num_values = int(dataset.shape[0])
        properties = dataset.id.get_create_plist()
        layout = properties.get_layout()
        if layout == h5py.h5d.COMPACT:
            return f"{where} is stored inside its header"
        masks: NDArray[np.uint32] | None
        filters: tuple[tuple[str, int], ...] = ()
        if layout == h5py.h5d.CONTIGUOUS:
            offset = dataset.id.get_offset()
            offsets = np.array([-1 if offset is None else offset] * min(num_values, 1), dtype=np.int64)
            sizes = np.full(len(offsets), num_values * dataset.dtype.itemsize, dtype=np.int64)
            masks, chunk = None, max(num_values, 1)
        else:
            chunk = int(dataset.chunks[0])
            _expect_all(dataset.id.get_num_chunks(), -(-num_values // chunk), where, path)
            offsets, sizes, masks = _chunks(dataset, num_values, chunk)
            found = filters_of(properties)
            if isinstance(found, str):
                return found
            filters = found
    _expect_inside(offsets, sizes, where, path)
    if not _fills_its_bytes(dataset):
        return f"{where} has a type of fewer bits than its bytes hold"
    if dataset.file.userblock_size or not is_plain_type(dataset.dtype):
        return f"{where} has type {dataset.dtype}" if not dataset.file.userblock_size else "a user block"
    return StoredArray(
        name=where.lstrip("/"),
        dtype=dataset.dtype,
        num_values=num_values,
        chunk_values=chunk,
        paths=(path,),
        offsets=offsets,
        sizes=sizes,
        filter_masks=masks,
        filters=filters,
    )


def _chunks(
    dataset: h5py.Dataset, num_values: int, chunk: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]:
    num_chunks = -(-num_values // chunk)
    offsets = np.full(num_chunks, -1, dtype=np.int64)
    sizes = np.zeros(num_chunks, dtype=np.int64)
    masks = np.zeros(num_chunks, dtype=np.uint32)

    def note(info: Any) -> None:
        number, rest = divmod(int(info.chunk_offset[0]), chunk)
        if rest or not 0 <= number < num_chunks:
            return  # a chunk beyond the end: left over from before the dataset shrank
        offsets[number] = -1 if info.byte_offset is None else info.byte_offset
        sizes[number] = info.size
        masks[number] = info.filter_mask

    dataset.id.chunk_iter(note)
    return offsets, sizes, masks


def _fills_its_bytes(dataset: h5py.Dataset) -> bool:
    """Whether a number is stored as it is in memory: HDF5 can keep one in some of its bits, and shift it."""
    stored = dataset.id.get_type()
    if stored.get_class() == h5py.h5t.INTEGER:
        return bool(stored.get_precision() == 8 * stored.get_size() and stored.get_offset() == 0)
    if stored.get_class() == h5py.h5t.FLOAT:
        standard = {4: h5py.h5t.IEEE_F32LE, 8: h5py.h5t.IEEE_F64LE}.get(stored.get_size())
        return standard is not None and bool(stored.equal(standard))
    return True


def _expect_all(num_stored: int, num_chunks: int, where: str, path: str) -> None:
    """Before a table is made for chunks that a small file only claims to have."""
    if num_stored < num_chunks:
        raise FormatError(
            f"{num_chunks - num_stored:,} of {num_chunks:,} chunks were never written",
            path=path,
            where=where,
            hint="The writing of this file was cut short; write it again.",
        )


def _expect_inside(offsets: NDArray[np.int64], sizes: NDArray[np.int64], where: str, path: str) -> None:
    missing = np.flatnonzero(offsets < 0)
    if len(missing):
        raise FormatError(
            f"chunk {missing[0]} was never written ({len(missing):,} of {len(offsets):,} are missing)",
            path=path,
            where=where,
            hint="The writing of this file was cut short; write it again.",
        )
    end = Path(path).stat().st_size
    outside = np.flatnonzero((sizes < 0) | (offsets > end - sizes))
    if len(outside):
        number = int(outside[0])
        raise FormatError(
            f"chunk {number} is said to take {sizes[number]:,} bytes at {offsets[number]:,}; the file has {end:,}",
            path=path,
            where=where,
            hint="The file is damaged or cut off; copy or download it again.",
        )
