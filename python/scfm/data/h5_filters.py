"""The filters of an HDF5 dataset, and chunks that decode to what they should.

HDF5 (2.0 as in h5py 3.16) copies a whole chunk out of whatever its filters returned. Where a stream inflates to
less, it reads beyond that buffer: the values are those of other memory, or the process dies; where it inflates to
more, all of it is kept in memory first. So a chunk that is left to h5py is decoded here before, by the native
decoder, which accepts exactly one length. What the native reader itself reads it checks by itself.
"""

from __future__ import annotations

import itertools
from typing import Any

import h5py

from scfm.data.codec_libraries import missing_codec
from scfm.errors import FormatError

__all__ = ["check_chunk_sizes", "filters_of"]

_SHUFFLE = 2
_NAMES = {1: "zlib", 3: "fletcher32", 32000: "lzf", 32001: "blosc", 32015: "zstd"}


def filters_of(properties: Any) -> tuple[tuple[str, int], ...] | str:
    """A dataset's filters in the order of writing, as StoredArray names them; or the one that has no name."""
    filters = []
    for number in range(properties.get_nfilters()):
        code, _, values, label = properties.get_filter(number)
        if code == _SHUFFLE and values and values[0] > 0:
            filters.append(("shuffle", int(values[0])))
        elif code in _NAMES:
            filters.append((_NAMES[code], 0))
        else:
            return f"filter {code} ({bytes(label).decode(errors='replace')})"
    return tuple(filters)


def check_chunk_sizes(
    dataset: h5py.Dataset, *, path: str, start: int = 0, stop: int | None = None, axis: int = 0
) -> None:
    """Raise FormatError unless every encoded chunk with an index in start:stop of ``axis`` decodes to its size.

    Chunks whose filters or types are none that the native decoder knows are passed over.
    """
    chunks = dataset.chunks
    if chunks is None or 0 in dataset.shape:
        return
    filters = filters_of(dataset.id.get_create_plist())
    num_bytes = _bytes_per_value(dataset)
    if not filters or isinstance(filters, str) or missing_codec(filters) or num_bytes is None:
        return
    for length in chunks:
        num_bytes *= int(length)
    grid = [range(0, length, step) for length, step in zip(dataset.shape, chunks, strict=True)]
    last = dataset.shape[axis] if stop is None else min(stop, dataset.shape[axis])
    grid[axis] = range(start - start % chunks[axis], last, chunks[axis])
    for offset in itertools.product(*grid):
        if dataset.id.get_chunk_info_by_coord(offset).byte_offset is not None:
            _check_chunk(dataset, offset, filters, num_bytes, path)


def _check_chunk(
    dataset: h5py.Dataset,
    offset: tuple[int, ...],
    filters: tuple[tuple[str, int], ...],
    num_bytes: int,
    path: str,
) -> None:
    from scfm import _native

    mask, stored = dataset.id.read_direct_chunk(offset)
    reason = _native.check_chunk(stored, list(filters), mask, num_bytes)
    if reason:
        number = ", ".join(str(at // step) for at, step in zip(offset, dataset.chunks, strict=True))
        raise FormatError(
            f"chunk {number} cannot be read: {reason}",
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
