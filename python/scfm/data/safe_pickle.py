"""Reads dictionaries from files that nobody vouches for: ``.pkl``, ``.json`` and ``.json.gz``.

The authors of Geneformer publish their gene dictionaries as pickles, and unpickling runs whatever the
file says. So a pickle is read as data by ``pickle_machine``, never by Python's unpickler; JSON is read
strictly, without the duplicate keys and NaN that the json module would let pass. What comes back is
always a flat dict of text to one kind of value, checked in one pass.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

from scfm.data.pickle_machine import MAX_SHOWN, kind_of, read_dict, shown
from scfm.errors import FormatError, MissingFileError, ScfmError

__all__ = ["load_json", "load_mapping", "parse_json", "refuse_stand_in"]

MAX_BYTES = 64 << 20


@overload
def load_mapping(path: Path | str, *, value: Literal["int"] = "int") -> dict[str, int]: ...
@overload
def load_mapping(path: Path | str, *, value: Literal["float"]) -> dict[str, float]: ...
@overload
def load_mapping(path: Path | str, *, value: Literal["str"]) -> dict[str, str]: ...
def load_mapping(path: Path | str, *, value: str = "int") -> dict[str, Any]:
    """A flat dict of str to ``value`` ("int", "float" or "str") from a pickle or JSON file.

    numpy integers and floats in a pickle become Python's. Floats must be finite; their sign is the caller's
    matter. Raises MissingFileError; UnsafeCheckpointError naming the global when the pickle would run code;
    FormatError when the file is truncated, too large or not such a dict, listing the first five wrong keys.
    """
    path = Path(path)
    data = _read(path)
    if path.name.endswith((".json", ".json.gz")):
        found = parse_json(_inflate(data, path) if path.name.endswith(".gz") else data, path)
    elif path.suffix in (".pkl", ".pickle"):
        found = read_dict(data, path)
    else:
        raise FormatError("a dictionary must be a .pkl, .json or .json.gz file", path=path)
    return _checked(found, value, path)


def load_json(path: Path | str, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Duplicate keys, NaN and files over ``max_bytes`` raise FormatError."""
    path = Path(path)
    return parse_json(_read(path, max_bytes), path)


def parse_json(data: bytes, path: Path | str) -> dict[str, Any]:
    """The JSON object in ``data``; ``path`` is only named in errors. Raises FormatError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"key {shown(twice)} stands twice in one object", path=path)
        return result

    def no_constant(name: str) -> NoReturn:
        raise FormatError(f"{name} is not a JSON number", path=path)

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except ScfmError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid JSON ({str(error)[:120]})", path=path) from None
    if not isinstance(found, dict):
        raise FormatError(f"expected a JSON object, found {type(found).__name__}", path=path)
    return found


def refuse_stand_in(head: bytes, path: Path | str) -> None:
    """Raise FormatError when a file's first bytes show a git-LFS pointer, a web page or nothing at all."""
    start = head[:512].lstrip().lower()
    if not head:
        raise FormatError("the file is empty", path=path, hint="Download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise FormatError(
            "this is a git-LFS pointer, not the file itself",
            path=path,
            hint="Run `git lfs install && git lfs pull` in the repository.",
        )
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        raise FormatError(
            "this is a web page, not the file itself",
            path=path,
            hint="Download the raw file (on the Hugging Face hub: 'resolve', not 'blob', in the address).",
        )


def _read(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    if not path.exists():
        raise MissingFileError("no such file", path=path)
    if not path.is_file():
        raise FormatError("not a regular file", path=path)
    if path.stat().st_size > max_bytes:
        raise FormatError(f"{path.stat().st_size:,} bytes; the limit is {max_bytes:,}", path=path)
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FormatError(f"more than {max_bytes:,} bytes", path=path)
    refuse_stand_in(data[:512], path)
    return data


def _inflate(data: bytes, path: Path) -> bytes:
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        result = stream.decompress(data, MAX_BYTES + 1)
    except (zlib.error, gzip.BadGzipFile) as error:
        raise FormatError(f"not a valid gzip file ({error})", path=path) from None
    if len(result) > MAX_BYTES:
        raise FormatError(f"unpacks to more than {MAX_BYTES:,} bytes", path=path)
    if not stream.eof or stream.unused_data:
        raise FormatError("a gzip file that is truncated or has bytes after its end", path=path)
    return result


def _checked(found: dict[Any, Any], value: str, path: Path) -> dict[str, Any]:
    """``found`` if every value has the type asked for; bool is no int."""
    allowed: tuple[type, ...] = {"int": (int,), "float": (float, int), "str": (str,)}[value]
    if set(map(type, found.values())) - set(allowed):
        wrong = [(key, item) for key, item in found.items() if type(item) not in allowed]
        listed = ", ".join(f"{shown(key)} ({kind_of(item)})" for key, item in wrong[:MAX_SHOWN])
        raise FormatError(f"values must be {value}; {len(wrong):,} are not: {listed}", path=path)
    if value == "float":
        try:
            found = {key: float(item) for key, item in found.items()}
        except OverflowError:
            raise FormatError("an integer is too large for a float", path=path) from None
        infinite = [key for key, item in found.items() if not math.isfinite(item)]
        if infinite:
            listed = ", ".join(f"{shown(key)} ({found[key]})" for key in infinite[:MAX_SHOWN])
            raise FormatError(f"{len(infinite):,} values are not finite: {listed}", path=path)
    return found
