"""Reads ``.bin``, ``.pt`` and ``.pth`` files of torch without running what is in them.

Such a file is a pickle and may call any function when it is read. First the pickle's opcodes are listed,
without executing them, and every global that is not one of torch's own tensor constructors ends the reading
with its name. Then torch reads the file with ``weights_only=True``, whose own allowlist is a second wall.
There is no fallback: only a caller who says ``trust_pickle=True`` gets the ordinary unpickler, with a
warning.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch

from scfm.data.safe_pickle import refuse_stand_in
from scfm.errors import CheckpointError, FormatError, ScfmError, ScfmWarning, UnsafeCheckpointError

__all__ = ["load_torch_file"]

MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 3_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_SAFE_GLOBALS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch (\w+Storage|Size|device|float16|float32|float64|bfloat16|u?int(8|16|32|64)|bool)"
    r"|torch\.storage (UntypedStorage|TypedStorage)"
    r"|torch\.serialization _get_layout"
    r"|(__builtin__|builtins) set"
)
_REFUSED = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


def load_torch_file(
    path: Path, *, trust_pickle: bool = False, records: Mapping[str, type] | None = None
) -> Any:
    """The object in a torch file, tensors on the CPU (mapped from the file where its layout allows).

    records: global's name -> a class of ours that stands for it and runs nothing; the global itself is never looked up.
    Raises UnsafeCheckpointError naming the global when the file holds more than tensors and plain containers;
    FormatError when it is truncated, compressed or no torch file.
    """
    with path.open("rb") as file:
        refuse_stand_in(file.read(512), path)
    if trust_pickle:
        warnings.warn(
            f"{path}: read with trust_pickle=True; whatever code it carries has been run",
            ScfmWarning,
            stacklevel=4,
        )
        return _load(path, weights_only=False, mmap=False)
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_globals(io.BytesIO(_pickle_in_zip(path)), 1, path, records or {})
    else:
        _check_legacy(path, records or {})
    return _load(path, weights_only=True, mmap=is_zip, records=records)


def _load(path: Path, *, weights_only: bool, mmap: bool, records: Mapping[str, type] | None = None) -> Any:
    try:
        with warnings.catch_warnings(), _standing_in(records):
            warnings.simplefilter("ignore", category=UserWarning)
            return torch.load(path, weights_only=weights_only, map_location="cpu", mmap=mmap)
    except ScfmError:
        raise
    except pickle.UnpicklingError as error:
        if not weights_only:
            raise FormatError(f"not a readable pickle ({str(error)[:200]})", path=path) from None
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        _refuse(path, f"the global {found[1]}" if found else "something else than tensors")
    except MemoryError:
        raise
    except Exception as error:  # torch reports a broken file by any of a dozen classes
        if not weights_only:
            raise CheckpointError(f"{type(error).__name__}: {str(error)[:200]}", path=path) from error
        raise FormatError(
            f"truncated or malformed torch file ({type(error).__name__}: {str(error)[:200]})", path=path
        ) from None


def _standing_in(records: Mapping[str, type] | None) -> AbstractContextManager[Any]:
    """Within it, torch's safe reader takes our classes for the globals that they stand for."""
    if not records:
        return nullcontext()
    return torch.serialization.safe_globals([(ours, name) for name, ours in records.items()])


def _refuse(path: Path, what: str) -> NoReturn:
    raise UnsafeCheckpointError(
        f"this file asks for {what}, which could run code; it was not read",
        path=path,
        hint="Ask for a .safetensors file. If you made this one yourself, trust_pickle=True reads it.",
    )


def _pickle_in_zip(path: Path) -> bytes:
    """The pickle of a zip-layout torch file, after checking that the archive is a plain, uncompressed one."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(set(names)) != len(names):
                raise FormatError("an archive with two entries of one name", path=path)
            if any(name.endswith("constants.pkl") for name in names):
                raise FormatError("a TorchScript program, not a checkpoint", path=path)
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise FormatError(f"entry {entry.filename[:80]!r} is compressed or encrypted", path=path)
            pickles = [entry for entry in entries if re.fullmatch(r"[^/]+/data\.pkl", entry.filename)]
            if len(pickles) != 1:
                raise FormatError("a zip archive without one data.pkl: no torch file", path=path)
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                raise FormatError(f"its pickle has {pickles[0].file_size:,} bytes", path=path)
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        if isinstance(error, ScfmError):
            raise
        raise FormatError(f"truncated or malformed zip archive ({str(error)[:120]})", path=path) from None


def _check_legacy(path: Path, records: Mapping[str, type]) -> None:
    """A file from before torch 1.6: pickles (magic, protocol, system, object, keys), then numbers."""
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if stream.getvalue()[:2] == b"PK":
        raise FormatError("truncated zip archive", path=path)
    first = _check_globals(stream, 1, path, records)
    if first != _LEGACY_MAGIC:
        raise FormatError("not a torch file", path=path, hint="Expected weights saved by torch.save.")
    _check_globals(stream, 4, path, records)


def _check_globals(stream: io.BytesIO, num_pickles: int, path: Path, records: Mapping[str, type]) -> object:
    """Refuse any global off the lists in the next pickles of ``stream``; returns the last argument seen."""
    last: object = None
    texts = ["", ""]
    num_opcodes = 0
    try:
        for _ in range(num_pickles):
            for opcode, argument, _position in pickletools.genops(stream):
                num_opcodes += 1
                if num_opcodes > MAX_OPCODES:
                    raise FormatError(f"more than {MAX_OPCODES:,} opcodes", path=path)
                if opcode.name in ("GLOBAL", "INST") and not _SAFE_GLOBALS.fullmatch(str(argument)):
                    name = str(argument).replace(" ", ".", 1)
                    if name not in records or opcode.name == "INST":
                        _refuse(path, f"the global {name[:200]}")
                if (
                    opcode.name == "STACK_GLOBAL"
                ):  # torch.save never writes it; torch's safe reader knows it not
                    _refuse(path, f"the global {'.'.join(texts)[:200]}")
                if opcode.name in _REFUSED:
                    _refuse(path, f"opcode {opcode.name}")
                if argument is not None:
                    last = argument
                if isinstance(argument, str):
                    texts = [texts[1], argument]
    except ScfmError:
        raise
    except (ValueError, OverflowError, UnicodeDecodeError) as error:
        raise FormatError(f"truncated or malformed pickle ({str(error)[:120]})", path=path) from None
    return last
