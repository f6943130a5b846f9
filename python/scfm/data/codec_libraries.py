"""Where decompressors come from: shared libraries that installed packages carry, or the system's own.

Inflating is most of the cost of reading counts. libdeflate does it two to four times as fast as zlib, and it
comes with the ``deflate`` package, a dependency with wheels for every platform; zstd, lz4 and blosc come with
``numcodecs``, which anndata needs anyway. The native reader takes their C functions out of those libraries
while it runs, so nothing has to be built against headers and no interpreter lock is held while inflating. A
codec that is nowhere to be found makes the reader fall back to h5py or zarr, and say so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache

__all__ = ["codec_in_use", "missing_codec"]

# Modules whose file exports the library's functions, then names for the system's loader.
_MODULES = {
    "libdeflate": ("deflate._deflate",),
    "zstd": ("numcodecs.zstd", "numcodecs.blosc"),
    "lz4": ("numcodecs.lz4", "numcodecs.blosc"),
    "blosc": ("numcodecs.blosc",),
}
_NAMES = {
    "libdeflate": ("libdeflate.so.0", "libdeflate.so", "libdeflate.0.dylib", "libdeflate.dylib"),
    "zlib": ("libz.so.1", "libz.so", "libz.1.dylib"),
    "zstd": ("libzstd.so.1", "libzstd.so", "libzstd.1.dylib"),
    "lz4": ("liblz4.so.1", "liblz4.so", "liblz4.1.dylib"),
    "blosc": ("libblosc.so.1", "libblosc.so", "libblosc.1.dylib"),
}
# Which libraries can undo a filter, the best first. Filters that are not here need none.
_LIBRARIES = {
    "zlib": ("libdeflate", "zlib"),
    "gzip": ("libdeflate",),
    "zstd": ("zstd",),
    "lz4": ("lz4",),
    "blosc": ("blosc",),
}


def codec_in_use(filter_name: str) -> str | None:
    """The library that undoes a filter ("zlib" -> "libdeflate"); None if it needs none or there is none."""
    return next((name for name in _LIBRARIES.get(filter_name, ()) if _loaded(name)), None)


def missing_codec(filters: tuple[tuple[str, int], ...]) -> str | None:
    """The first of the filters for which no library can be found, or None."""
    for name, _ in filters:
        if name in _LIBRARIES and codec_in_use(name) is None:
            return name
    return None


@cache
def _loaded(library: str) -> bool:
    from scfm import _native

    return any(_native.load_codec_library(library, path) for path in _places(library))


def _places(library: str) -> Iterator[str]:
    for module in _MODULES.get(library, ()):
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            continue
        if found is not None and found.origin:
            yield found.origin
    yield from _NAMES[library]
