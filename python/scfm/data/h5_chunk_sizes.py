"""Chunks that inflate to what they should: looked at before the HDF5 library reads them.

HDF5 (2.0 as in h5py 3.16) copies a whole chunk out of whatever its gzip filter returned. Where a stream inflates
to less, it reads beyond that buffer: the values are those of other memory, or the process dies; where it inflates
to more, all of it is kept in memory first. So chunks that are left to h5py are inflated here before, to be counted
only, and never further than they may go. The native reader counts by itself.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import h5py

from scfm.errors import FormatError

__all__ = ["check_chunk_sizes"]

_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3
_CHECKSUM_BYTES = 4
_PIECE = 16 << 20


def check_chunk_sizes(
    dataset: h5py.Dataset, *, path: str, start: int = 0, stop: int | None = None, axis: int = 0
) -> None:
    """Raise FormatError unless every gzip chunk with an index in start:stop of ``axis`` inflates to its size.

    Chunks of other filters, whose sizes cannot be told without them, are passed over.
    """
    chunks = dataset.chunks
    if chunks is None or 0 in dataset.shape:
        return
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
    if _DEFLATE not in filters or not set(filters) <= {_DEFLATE, _SHUFFLE, _FLETCHER32}:
        return
    num_bytes = _bytes_per_value(dataset)
    if num_bytes is None:
        return
    for length in chunks:
        num_bytes *= int(length)
    grid = [range(0, length, step) for length, step in zip(dataset.shape, chunks, strict=True)]
    last = dataset.shape[axis] if stop is None else min(stop, dataset.shape[axis])
    grid[axis] = range(start - start % chunks[axis], last, chunks[axis])
    for offset in itertools.product(*grid):
        if dataset.id.get_chunk_info_by_coord(offset).byte_offset is None:
            continue
        mask, stored = dataset.id.read_direct_chunk(offset)
        found = _decoded_size(stored, filters, mask, num_bytes)
        if found != num_bytes:
            number = ", ".join(str(at // step) for at, step in zip(offset, chunks, strict=True))
            what = found if isinstance(found, str) else f"it inflates to {_told(found, num_bytes)}"
            raise FormatError(
                f"chunk {number} cannot be read: {what}",
                path=path,
                where=f"{str(dataset.name).lstrip('/')}, chunk {number}",
                hint="The file is damaged; copy, download or write it again.",
            )


def _bytes_per_value(dataset: h5py.Dataset) -> int | None:
    """As stored; None for records and other types made of several."""
    stored = dataset.id.get_type()
    if stored.get_class() == h5py.h5t.VLEN or (
        stored.get_class() == h5py.h5t.STRING and stored.is_variable_str()
    ):
        # A length, and an address and a number in the file's heap.
        return 4 + int(dataset.file.id.get_create_plist().get_sizes()[0]) + 4
    if stored.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM, h5py.h5t.STRING):
        return int(stored.get_size())
    return None


def _told(found: int, num_bytes: int) -> str:
    size = f"more than {num_bytes:,}" if found > num_bytes else f"{found:,}"
    return f"{size} bytes, a chunk has {num_bytes:,}"


def _decoded_size(stored: bytes, filters: list[int], mask: int, num_bytes: int) -> int | str:
    """Bytes after undoing the filters, last first; or why there is no such number."""
    size: int = len(stored)
    for number in reversed(range(len(filters))):
        if mask >> number & 1:
            continue
        if filters[number] == _FLETCHER32:
            size -= _CHECKSUM_BYTES
        elif filters[number] == _DEFLATE:
            checksums = _CHECKSUM_BYTES * filters[:number].count(_FLETCHER32)
            inflated = _inflated_size(memoryview(stored)[: max(size, 0)], num_bytes + checksums)
            if isinstance(inflated, str):
                return inflated
            size = inflated
    return size


def _inflated_size(stream: Any, limit: int) -> int | str:
    """Bytes a zlib stream inflates to, counted no further than one beyond the limit."""
    inflater = zlib.decompressobj()
    size, rest = 0, stream
    try:
        while not inflater.eof and size <= limit:
            piece = inflater.decompress(rest, min(_PIECE, limit + 1 - size))
            rest = inflater.unconsumed_tail
            size += len(piece)
            if not piece and not rest and not inflater.eof:
                return "its end is missing"
    except zlib.error as error:
        return str(error)
    return size
