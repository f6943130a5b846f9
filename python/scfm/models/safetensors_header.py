"""A strict reading of a safetensors header, before the library maps the file.

The library checks most of this itself but lets duplicate names pass (the last one wins silently) and
reports in its own words. Here every byte of the file must belong to exactly one tensor, every name must be
unique and every size must follow from shape and dtype; what does not hold is named.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scfm.data.safe_pickle import parse_json, refuse_stand_in
from scfm.errors import FormatError

__all__ = ["TensorEntry", "read_header", "read_header_and_metadata"]

MAX_HEADER_BYTES = 100_000_000
_DTYPE_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4},
    **{"I64": 8, "U64": 8, "F64": 8, "C64": 8},
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it; ``begin`` and ``end`` are bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name. Raises FormatError saying what is wrong and where."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors by name, and the free text that the file carries beside them. Raises FormatError."""
    size = path.stat().st_size
    text = _header_text(path, size)
    header = parse_json(text, path)
    metadata = header.pop("__metadata__", {})
    _check_metadata(metadata, path)
    entries = {name: _entry(name, item, path) for name, item in header.items()}
    _check_layout(entries, size - 8 - len(text), path)
    return entries, metadata


def _header_text(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        head = file.read(512)
        refuse_stand_in(head, path)
        if len(head) < 8:
            raise FormatError(f"truncated: {len(head)} bytes, a safetensors file has at least 8", path=path)
        (length,) = struct.unpack("<Q", head[:8])
        if length > MAX_HEADER_BYTES:
            raise FormatError(
                f"not a safetensors file: its header would have {length:,} bytes; the limit is "
                f"{MAX_HEADER_BYTES:,}",
                path=path,
            )
        if length > size - 8:
            raise FormatError(f"truncated: the header has {length:,} bytes, the file {size:,}", path=path)
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise FormatError("not a safetensors file: its header is not JSON", path=path)
    return text


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise FormatError("must map text to text", path=path, where="__metadata__")


def _entry(name: str, item: Any, path: Path) -> TensorEntry:
    where = f"tensor {name[:200]!r}"
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("expected dtype, shape and data_offsets", path=path, where=where)
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise FormatError(f"unknown dtype {json.dumps(dtype)[:40]}", path=path, where=where)
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise FormatError(
            f"shape and data_offsets must be lists of counts, found {str(shape)[:50]}, {str(offsets)[:50]}",
            path=path,
            where=where,
        )
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements > 2**63:
            raise FormatError(f"shape {str(shape)[:60]} overflows", path=path, where=where)
    begin, end = offsets
    if end - begin != elements * _DTYPE_BYTES[dtype]:
        raise FormatError(
            f"shape {str(shape)[:60]} of {dtype} needs {elements * _DTYPE_BYTES[dtype]:,} bytes, "
            f"data_offsets give {end - begin:,}",
            path=path,
            where=where,
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(entries: dict[str, TensorEntry], data_bytes: int, path: Path) -> None:
    """Tensors must cover the data once: no overlap, no hole, nothing after the last."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "leaves a hole before it"
            raise FormatError(
                f"{what}: begins at byte {entry.begin:,}, expected {position:,}",
                path=path,
                where=f"tensor {name[:200]!r}",
            )
        position = entry.end
    if position != data_bytes:
        what = "truncated" if position > data_bytes else "bytes follow the last tensor"
        raise FormatError(
            f"{what}: the tensors take {position:,} bytes, the file has {data_bytes:,}", path=path
        )
