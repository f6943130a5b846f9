"""What the metadata of a zarr array (format 2 or 3) say about how its values are stored.

Read from the JSON itself, for two reasons: an array must be refused before anything decodes it if its codec
could run code (pickled objects) or is unknown, and the native reader needs the exact layout. A layout that
is fine but unusual gets ``filters=None``: zarr-python will read it. Source: the zarr specifications 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scfm.data.h5_file import MAX_CHUNK_BYTES
from scfm.data.zarr_store import ZarrStore
from scfm.errors import FormatError, UnsafeFileError

__all__ = ["ArrayLayout", "array_layout"]

Filters = tuple[tuple[str, int], ...]

# Codecs of numcodecs whose decoding does nothing but compute numbers or text.
_HARMLESS = frozenset(
    [
        "blosc",
        "zstd",
        "gzip",
        "zlib",
        "lz4",
        "bz2",
        "lzma",
        "shuffle",
        "delta",
        "fixedscaleoffset",
        "astype",
        "packbits",
        "bitround",
        "quantize",
        "crc32",
        "crc32c",
        "adler32",
        "fletcher32",
        "jenkins_lookup3",
        "vlen-utf8",
        "vlen-bytes",
        "pcodec",
        "zfpy",
    ]
)
_HARMLESS_V3 = frozenset(
    ["bytes", "transpose", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed", "vlen-utf8", "vlen-bytes"]
)
# Those that the native reader decodes.
_NATIVE = frozenset(["blosc", "zstd", "gzip", "zlib", "lz4"])
_NUMBERS = frozenset(
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    ]
)
_BYTES_PER_TEXT = 64


@dataclass(frozen=True)
class ArrayLayout:
    """How an array is stored.

    chunks: shape of what one file holds; inner: of the chunks inside such a file where it is a shard, else
    None; dtype: as stored, byte order included; None for text and other types. filters: encoding steps in
    order, as in StoredArray; None where the native reader does not know them. index_known: the shard index is
    of the usual form; index_at_end: where it lies. key_prefix and separator build the chunks' keys.
    ends_in_blosc: a stored chunk is a blosc buffer, whose decoder believes the sizes in its header.
    """

    place: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    inner: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    filters: Filters | None
    index_known: bool
    index_at_end: bool
    key_prefix: str
    separator: str
    ends_in_blosc: bool

    def key(self, chunk: Sequence[int]) -> str:
        return self.key_prefix + self.separator.join(map(str, chunk))

    @property
    def num_bytes(self) -> int:
        """Of all values in memory; text is guessed at."""
        size = _BYTES_PER_TEXT if self.dtype is None else self.dtype.itemsize
        return int(np.prod(self.shape, dtype=object)) * size


def array_layout(store: ZarrStore, place: str) -> ArrayLayout:
    """The layout of the array at ``place``. Raises FormatError, UnsafeFileError."""
    found = store.metadata(place)
    if found is None or found["node_type"] != "array":
        raise FormatError("is missing or not an array", path=store.path, where=place)
    parse = _version_3 if store.format == 3 else _version_2
    try:
        layout = parse(found, place)
    except (FormatError, UnsafeFileError) as error:
        raise type(error)(error.message, path=store.path, where=place, hint=error.hint) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(
            f"the metadata of this array are malformed ({type(error).__name__}: {error})",
            path=store.path,
            where=place,
        ) from error
    _check_sizes(layout, store.path)
    return layout


def _check_sizes(layout: ArrayLayout, path: str) -> None:
    grids = [layout.chunks] if layout.inner is None else [layout.chunks, layout.inner]
    if any(len(grid) != len(layout.shape) or min(grid, default=1) < 1 for grid in grids):
        raise FormatError(
            f"has shape {layout.shape} but chunks {' of '.join(map(str, grids))}",
            path=path,
            where=layout.place,
        )
    if min(layout.shape, default=0) < 0:
        raise FormatError(f"has shape {layout.shape}", path=path, where=layout.place)
    if layout.inner and any(outer % inner for outer, inner in zip(layout.chunks, layout.inner, strict=True)):
        raise FormatError(
            f"shards {layout.chunks} do not hold whole chunks {layout.inner}", path=path, where=layout.place
        )
    chunk = layout.inner or layout.chunks
    num_bytes = int(np.prod(chunk, dtype=object)) * (layout.dtype.itemsize if layout.dtype else 1)
    if num_bytes > MAX_CHUNK_BYTES:
        raise FormatError(
            f"is stored in chunks {chunk} of {num_bytes:,} bytes; the limit is {MAX_CHUNK_BYTES:,}",
            path=path,
            where=layout.place,
            hint="Write it again with smaller chunks.",
        )


def _lengths(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(
        isinstance(value, int) and not isinstance(value, bool) for value in values
    ):
        raise FormatError(f"lengths are {values!r:.80}, expected integers")
    return tuple(values)


def _version_2(found: dict[str, Any], place: str) -> ArrayLayout:
    compressor = found.get("compressor")
    steps = [*(found.get("filters") or []), *([compressor] if compressor else [])]
    names = [step["id"] for step in steps]
    for name in names:
        _check_codec(name, name in _HARMLESS)
    shape = _lengths(found["shape"])
    kind = found["dtype"]
    if not isinstance(kind, str):
        raise FormatError("holds records, expected numbers or text")
    stored = np.dtype(kind)
    dtype: np.dtype[Any] | None = stored if stored.kind in "biuf" else None
    if stored.kind == "O" and names[:1] not in (["vlen-utf8"], ["vlen-bytes"]):
        raise UnsafeFileError(
            "holds Python objects, which only unsafe decoders read",
            hint="Write the store again with text instead of objects.",
        )
    separator = found.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise FormatError(f"the separator of chunk names is {separator!r:.20}")
    return ArrayLayout(
        place=place,
        shape=shape,
        chunks=_lengths(found["chunks"]),
        inner=None,
        dtype=dtype,
        filters=_native_filters([(step["id"], step) for step in steps]),
        index_known=True,
        index_at_end=True,
        key_prefix=f"{place}/",
        separator=separator,
        ends_in_blosc=names[-1:] == ["blosc"],
    )


def _version_3(found: dict[str, Any], place: str) -> ArrayLayout:
    grid, encoding = found["chunk_grid"], found["chunk_key_encoding"]
    if grid["name"] != "regular":
        raise FormatError(f"has a chunk grid of kind {grid['name']!r:.40}, expected regular")
    codecs = _codecs(found["codecs"])
    kind = found["data_type"]
    dtype = np.dtype(kind) if isinstance(kind, str) and kind in _NUMBERS else None
    inner, index_known, index_at_end = None, True, True
    if codecs and codecs[0][0] == "sharding_indexed" and len(codecs) == 1:
        shard = codecs[0][1]
        inner = _lengths(shard["chunk_shape"])
        index = _codecs(shard["index_codecs"])
        index_known = [name for name, _ in index] == ["bytes", "crc32c"] and _is_little(index[0][1])
        index_at_end = {"end": True, "start": False}[shard.get("index_location", "end")]
        codecs = _codecs(shard["codecs"])
    if any(name == "sharding_indexed" for name, _ in codecs):
        index_known = False
    default = encoding["name"] == "default"
    if not default and encoding["name"] != "v2":
        raise FormatError(f"has chunk names of kind {encoding['name']!r:.40}")
    separator = encoding.get("configuration", {}).get("separator", "/" if default else ".")
    if separator not in (".", "/"):
        raise FormatError(f"the separator of chunk names is {separator!r:.20}")
    return ArrayLayout(
        place=place,
        shape=_lengths(found["shape"]),
        chunks=_lengths(grid["configuration"]["chunk_shape"]),
        inner=inner,
        dtype=_ordered(dtype, codecs),
        filters=_version_3_filters(codecs, dtype),
        index_known=index_known,
        index_at_end=index_at_end,
        key_prefix=f"{place}/c{separator}" if default else f"{place}/",
        separator=separator,
        ends_in_blosc=bool(codecs) and codecs[-1][0] in ("blosc", "numcodecs.blosc"),
    )


def _codecs(listed: Any) -> list[tuple[str, dict[str, Any]]]:
    """(name, configuration) of each codec, all of them harmless."""
    codecs = []
    for codec in listed:
        name, settings = (
            (codec, {}) if isinstance(codec, str) else (codec["name"], codec.get("configuration"))
        )
        plain = name.removeprefix("numcodecs.")
        _check_codec(name, name in _HARMLESS_V3 or (name != plain and plain in _HARMLESS))
        codecs.append((name, settings or {}))
    return codecs


def _check_codec(name: Any, known: bool) -> None:
    if name in ("pickle", "numcodecs.pickle"):
        raise UnsafeFileError(
            "is encoded by pickle, which can run code",
            hint="Write the store again with text instead of objects.",
        )
    if not known:
        raise FormatError(f"is encoded by {name!r:.60}, which is not supported")


def _is_little(settings: dict[str, Any]) -> bool:
    return bool(settings.get("endian", "little") == "little")


def _ordered(dtype: np.dtype[Any] | None, codecs: list[tuple[str, dict[str, Any]]]) -> np.dtype[Any] | None:
    if dtype is None or all(_is_little(settings) for name, settings in codecs if name == "bytes"):
        return dtype
    return dtype.newbyteorder(">")


def _version_3_filters(
    codecs: list[tuple[str, dict[str, Any]]], dtype: np.dtype[Any] | None
) -> Filters | None:
    if not codecs or codecs[0][0] != "bytes" or dtype is None or not _is_little(codecs[0][1]):
        return None
    # numcodecs writes its own checksums elsewhere; only the codec of the specification is appended.
    if any(name == "numcodecs.crc32c" for name, _ in codecs):
        return None
    steps = [(name.removeprefix("numcodecs."), settings) for name, settings in codecs[1:]]
    return _native_filters(steps, appended_crc=True)


def _native_filters(steps: list[tuple[str, dict[str, Any]]], *, appended_crc: bool = False) -> Filters | None:
    filters: list[tuple[str, int]] = []
    for name, settings in steps:
        if name == "shuffle":
            filters.append((name, int(settings.get("elementsize", 4))))
        elif name in _NATIVE or (name == "crc32c" and appended_crc):
            filters.append((name, 0))
        else:
            return None
    return tuple(filters)
