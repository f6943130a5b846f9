"""Safetensors files that lie about themselves."""

from __future__ import annotations

import json
import struct
from typing import Any


def build(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of this header and data; ``length`` overrides the header length that it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = build({"a": tensor([2], 0, 8), "b": tensor([1], 8, 12)}, bytes(12))

# name -> (file, what the error must say)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "seven bytes": (GOOD[:7], "truncated"),
    "truncated header": (GOOD[:40], "truncated"),
    "truncated data": (GOOD[:-1], "truncated"),
    "trailing bytes": (GOOD + b"\0", "follow the last tensor"),
    "header of 2^60": (build(b"{}", length=1 << 60), "not a safetensors file"),
    "header of 100 MB and 1": (build(b"{}", length=100_000_001), "not a safetensors file"),
    "header is a list": (build(b"[]"), "not JSON"),
    "header is not JSON": (build(b"{'a': 1}"), "not valid JSON"),
    "nested header": (build(b'{"a":' * 20_000), "not valid JSON"),
    "overlap": (build({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)), "overlaps"),
    "same bytes twice": (build({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}, bytes(8)), "overlaps"),
    "hole": (build({"a": tensor([2], 0, 8), "b": tensor([1], 12, 16)}, bytes(16)), "hole"),
    "hole at the start": (build({"a": tensor([1], 4, 8)}, bytes(8)), "hole"),
    "shape overflow": (build({"a": tensor([2**40, 2**40], 0, 8)}, bytes(8)), "overflows"),
    "shape wraps to fit": (build({"a": tensor([2**62, 4, 1], 0, 0)}), "overflows"),
    "shape too large": (build({"a": tensor([3], 0, 8)}, bytes(8)), "needs 12 bytes"),
    "offsets reversed": (build({"a": tensor([2], 8, 0)}, bytes(8)), "needs 8 bytes"),
    "negative dimension": (build({"a": tensor([-1], 0, 4)}, bytes(4)), "lists of counts"),
    "negative offset": (build({"a": tensor([1], -4, 0)}, bytes(4)), "lists of counts"),
    "boolean dimension": (build({"a": tensor([True], 0, 4)}, bytes(4)), "lists of counts"),
    "fractional dimension": (build({"a": tensor([1.0], 0, 4)}, bytes(4)), "lists of counts"),
    "three offsets": (
        build({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, bytes(4)),
        "lists of counts",
    ),
    "unknown dtype": (build({"a": tensor([1], 0, 4, "OBJECT")}, bytes(4)), "unknown dtype"),
    "dtype is a list": (build({"a": tensor([1], 0, 4, ["F32"])}, bytes(4)), "unknown dtype"),
    "field missing": (build({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "expected dtype"),
    "field too many": (build({"a": tensor([1], 0, 4) | {"run": "x"}}, bytes(4)), "expected dtype"),
    "duplicate tensor": (
        build(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            bytes(8),
        ),
        "stands twice",
    ),
    "duplicate field": (
        build(b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "stands twice",
    ),
    "metadata not text": (build({"__metadata__": {"a": 1}}), "__metadata__"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
}
