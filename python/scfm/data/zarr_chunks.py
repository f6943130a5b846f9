"""Where the chunks of a zarr array lie: in files of their own, or inside shards whose index is read here.

Gives the table that the native reader works from, and finds missing chunks before anything is decoded: zarr
itself would read them as zeros. A shard ends (or begins) with an index of (offset, size) pairs and a
checksum of it; every entry is held against the size of the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm.data.stored_array import StoredArray
from scfm.data.zarr_metadata import ArrayLayout
from scfm.data.zarr_store import BLOSC_HEADER_BYTES, ZarrStore, check_blosc, missing_chunk
from scfm.errors import FormatError

__all__ = ["check_shards", "stored_array"]

_EMPTY = np.uint64(2**64 - 1)
_CHECKSUM_BYTES = 4


def stored_array(store: ZarrStore, layout: ArrayLayout) -> StoredArray | None:
    """The table of a one-dimensional array of numbers; None where only zarr-python can read it.

    Raises FormatError for a missing chunk, a damaged shard index, an entry outside its file.
    """
    dtype = layout.dtype
    if not store.is_folder or len(layout.shape) != 1 or dtype is None or layout.filters is None:
        return None
    if dtype.kind not in "iuf" or dtype.itemsize > 8 or dtype == np.float16 or dtype.byteorder == ">":
        return None
    if layout.inner is not None and not layout.index_known:
        return None
    num_values = layout.shape[0]
    chunk_values = (layout.inner or layout.chunks)[0]
    per_file = layout.chunks[0] // chunk_values
    num_chunks = math.ceil(num_values / chunk_values)
    files: list[str] = []
    pieces = [np.empty((0, 2), dtype=np.int64)]
    # Grown file by file: what the metadata claim need not exist.
    for number, chunk in enumerate(_grid(layout)):
        key = layout.key(chunk)
        size = store.size_of(key)
        if size is None:
            raise missing_chunk(store.path, key)
        files.append(store.file_of(key))
        if layout.inner is None:
            pieces.append(np.array([[0, size]], dtype=np.int64))
        else:
            pieces.append(_shard_index(store, layout, key, size)[: num_chunks - number * per_file])
            _check_no_gaps(pieces[-1], store.path, key)
    placed = np.concatenate(pieces)
    return StoredArray(
        name=layout.place,
        dtype=dtype.newbyteorder("="),
        num_values=num_values,
        chunk_values=chunk_values,
        paths=tuple(files),
        file_of_chunk=(np.arange(num_chunks) // per_file).astype(np.int32),
        offsets=np.ascontiguousarray(placed[:, 0]),
        sizes=np.ascontiguousarray(placed[:, 1]),
        filter_masks=None,
        filters=layout.filters,
    )


def check_shards(store: ZarrStore, layout: ArrayLayout) -> None:
    """Raise FormatError if a chunk inside a shard is missing, or not as long as it says.

    zarr-python would read zeros, or beyond the chunk. Missing files of chunks are found when they are read.
    """
    if layout.inner is None and layout.index_known:
        return
    if not layout.index_known or not store.is_folder:
        raise FormatError(
            "is stored in shards whose index cannot be checked",
            path=store.path,
            where=layout.place,
            hint="Unpack the store to a folder, or write it again with the usual shard index.",
        )
    for chunk in _grid(layout):
        key = layout.key(chunk)
        size = store.size_of(key)
        if size is None:
            raise missing_chunk(store.path, key)
        index = _shard_index(store, layout, key, size).reshape(*_inside(layout), 2)
        # A shard at the edge has room for chunks beyond the array.
        used = tuple(
            slice(0, math.ceil((min(length, (position + 1) * outer) - position * outer) / inner))
            for position, length, outer, inner in zip(
                chunk, layout.shape, layout.chunks, layout.inner or (), strict=True
            )
        )
        inner_chunks = index[used].reshape(-1, 2)
        _check_no_gaps(inner_chunks, store.path, key)
        if layout.ends_in_blosc:
            _check_headers(store, key, inner_chunks)


def _grid(layout: ArrayLayout) -> Iterator[tuple[int, ...]]:
    """Positions of the stored files, in C order."""
    sides = [range(math.ceil(n / chunk)) for n, chunk in zip(layout.shape, layout.chunks, strict=True)]
    return itertools.product(*sides)


def _inside(layout: ArrayLayout) -> list[int]:
    return [outer // inner for outer, inner in zip(layout.chunks, layout.inner or (), strict=True)]


def _shard_index(store: ZarrStore, layout: ArrayLayout, key: str, size: int) -> NDArray[np.int64]:
    """(chunks in the shard, 2): offset and size of each, -1 where it is empty; all within the file."""
    import google_crc32c

    num_bytes = math.prod(_inside(layout)) * 16
    if num_bytes + _CHECKSUM_BYTES > size:
        raise FormatError(
            f"is a shard of {size:,} bytes, too small for its index of {num_bytes:,}",
            path=store.path,
            where=key,
            hint="The file is truncated: copy the store again.",
        )
    with Path(store.file_of(key)).open("rb") as file:
        if layout.index_at_end:
            file.seek(size - num_bytes - _CHECKSUM_BYTES)
        content = file.read(num_bytes + _CHECKSUM_BYTES)
    table, checksum = content[:num_bytes], content[num_bytes:]
    if len(checksum) != _CHECKSUM_BYTES or google_crc32c.value(table) != int.from_bytes(checksum, "little"):
        raise FormatError(
            "the checksum of the shard's index does not match",
            path=store.path,
            where=key,
            hint="The file is truncated or damaged: copy the store again.",
        )
    index = np.frombuffer(table, dtype="<u8").reshape(-1, 2)
    empty = (index == _EMPTY).all(axis=1)
    beyond = ~empty & ((index[:, 0] > size) | (index[:, 1] > size - np.minimum(index[:, 0], size)))
    if beyond.any():
        wrong = int(np.flatnonzero(beyond)[0])
        raise FormatError(
            f"chunk {wrong} of the shard is said to lie at {index[wrong, 0]} with {index[wrong, 1]} bytes, "
            f"outside the file of {size:,}",
            path=store.path,
            where=key,
            hint="The file is truncated or damaged: copy the store again.",
        )
    return np.where(empty[:, None], -1, index.astype(np.int64))


def _check_headers(store: ZarrStore, key: str, chunks: NDArray[np.int64]) -> None:
    with Path(store.file_of(key)).open("rb") as file:
        for offset, size in chunks.tolist():
            file.seek(offset)
            header = file.read(min(BLOSC_HEADER_BYTES, size))
            check_blosc(header, size, path=store.path, where=f"{key}, chunk at {offset}")


def _check_no_gaps(index: NDArray[np.int64], path: str, key: str) -> None:
    gaps = np.flatnonzero(index[:, 0] < 0)
    if len(gaps):
        raise missing_chunk(path, f"{key}, chunk {gaps[0]} of the shard")
