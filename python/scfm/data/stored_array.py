"""A one-dimensional array in files, described by where its chunks lie: what the native reader works from.

HDF5 and zarr differ in how one learns this; afterwards they are the same: a table of (file, offset, size) and
a list of filters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.codec_libraries import codec_in_use, missing_codec
from scfm.errors import MissingDependencyError

__all__ = ["StoredArray"]

# Beyond this a chunk no longer fits the native reader's idea of scratch space, and h5py may have it.
MAX_NATIVE_CHUNK_BYTES = 256 << 20

_CODES = frozenset({"f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})


@dataclass(frozen=True)
class StoredArray:
    """Where the values of an array lie.

    name: dataset, for messages; dtype: little-endian integers or floats; chunk_values: elements a chunk, every
    chunk decoding to exactly that many, the last one too (for an array in one piece, num_values); paths and
    file_of_chunk (int32; None: all in the first); offsets, sizes: int64, the stored bytes of each chunk, offset
    -1 for one that was never written; filter_masks: uint32, bit i set where filter i was left out; filters: in
    the order of writing, (name, element size of a shuffle or 0), names "shuffle", "zlib", "gzip", "lzf", "zstd",
    "lz4" (numcodecs' form), "blosc", "fletcher32", "crc32c".
    """

    name: str
    dtype: np.dtype[Any]
    num_values: int
    chunk_values: int
    paths: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    file_of_chunk: NDArray[np.int32] | None = None
    filter_masks: NDArray[np.uint32] | None = None
    filters: tuple[tuple[str, int], ...] = ()

    def obstacle(self) -> str | None:
        """Why the native reader cannot take this array, or None."""
        if not is_plain_type(self.dtype):
            return f"{self.name} has type {self.dtype}"
        if self.filters and self.chunk_values * self.dtype.itemsize > MAX_NATIVE_CHUNK_BYTES:
            return f"{self.name} has chunks of {self.chunk_values * self.dtype.itemsize:,} bytes"
        if not all(_is_unicode(text) for text in (self.name, *self.paths)):
            return "a name that is not UTF-8"
        missing = missing_codec(self.filters)
        return f"no library for {missing} was found" if missing else None

    def encoding(self) -> str:
        """For reports: "gzip by libdeflate", "shuffle, lzf", "uncompressed"."""
        names = []
        for name, _ in self.filters:
            library = codec_in_use(name)
            shown = "gzip" if name == "zlib" else name
            names.append(f"{shown} by {library}" if library and library != shown else shown)
        return ", ".join(names) or "uncompressed"

    def native(self) -> Any:
        """The same as an object of the native reader. Call where ``obstacle`` is None.

        Raises MissingDependencyError where this process, unlike the one that opened the file, has no library for
        a filter.
        """
        from scfm import _native

        # Asked here too: libraries are loaded by process, and a pickled source may have come from another.
        missing = missing_codec(self.filters)
        if missing:
            raise MissingDependencyError(
                f"no library for {missing} was found, with which {self.name} is compressed",
                path=self.paths[0],
                hint="Install what scfm needs in this environment too; scfm doctor shows what is found.",
            )
        return _native.StoredArray(
            self.name,
            f"{self.dtype.kind}{self.dtype.itemsize}",
            self.num_values,
            self.chunk_values,
            list(self.paths),
            self.file_of_chunk,
            self.offsets,
            self.sizes,
            self.filter_masks,
            list(self.filters),
        )


def _is_unicode(text: str) -> bool:
    """Whether the native reader can take the text, and put it into an error; Python's names of files may be any
    bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_plain_type(dtype: np.dtype[Any]) -> bool:
    """Whether values of this type can be copied from the file as they are."""
    return f"{dtype.kind}{dtype.itemsize}" in _CODES and dtype.newbyteorder("<") == dtype
