"""Telling an input that is still the same from one that was replaced, without reading all of it.

Size and a CRC-32 of samples must match: the first and the last megabyte and 62 pieces of 64 KiB spread evenly
between them; a file of up to 6 MB is read whole. (HDF5 keeps its headers at the front, and where anything is
added or removed the size changes.) The modification time is recorded and not compared, so a copy, a restored
backup or a touched file goes on; a file rewritten in place at the very same size, in places between the samples
only, is the one change this does not see. While a run reads, the exact time and identity are watched as well.
A store that is a folder (zarr, 10x) counts as the list of its files with their sizes, samples of 64 of them.
"""

from __future__ import annotations

import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

from scfm.errors import IntegrityError, InvalidArgumentError, MissingFileError

__all__ = ["Fingerprint", "Stamp", "check_unchanged", "fingerprint_of", "stamp_of"]

_END = 1 << 20
_PIECE = 64 << 10
_NUM_PIECES = 62
_MAX_FILES = 64

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Fingerprint:
    """size: bytes in all; mtime_ns: for people; crc32: of the samples."""

    size: int
    mtime_ns: int
    crc32: int


def fingerprint_of(path: Path) -> Fingerprint:
    """The fingerprint of a file or folder. Raises MissingFileError, InvalidArgumentError."""
    try:
        if path.is_dir():
            return _of_folder(path)
        status = path.stat()
        return Fingerprint(status.st_size, status.st_mtime_ns, _sampled_crc(path, status.st_size, 0))
    except FileNotFoundError as error:
        raise MissingFileError("no such file or folder", path=path) from error
    except OSError as error:
        raise InvalidArgumentError(f"cannot be read ({os.strerror(error.errno or 0)})", path=path) from error


def stamp_of(path: Path) -> Stamp:
    """Size, time and identity, to be compared within one process only; of a folder, those of all its files."""
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            return status.st_size, status.st_mtime_ns, status.st_ino
        entries = sorted(path.rglob("*"))
        seen = [(str(entry), *_facts(entry.stat())) for entry in entries]
    except OSError as error:
        raise MissingFileError("is gone or cannot be reached", path=path) from error
    # A chunk written anew changes nothing about the folder that the store is named by.
    return len(seen), zlib.crc32(repr(seen).encode("utf-8", "surrogateescape")), status.st_ino


def _facts(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def check_unchanged(path: Path, stamp: Stamp) -> None:
    """Raise IntegrityError if the file is not the one that ``stamp_of`` saw."""
    try:
        same = stamp_of(path) == stamp
    except MissingFileError:
        same = False
    if not same:
        raise IntegrityError(
            "the file was changed, replaced or removed while it was being embedded",
            path=path,
            hint="Nothing read from it after that was kept. Put the planned file back, or start a new folder.",
        )


def _of_folder(folder: Path) -> Fingerprint:
    files = sorted(entry for entry in folder.rglob("*") if entry.is_file())
    statuses = [entry.stat() for entry in files]
    listing = "".join(
        f"{entry.relative_to(folder).as_posix()}\t{status.st_size}\n"
        for entry, status in zip(files, statuses, strict=True)
    )
    crc = zlib.crc32(listing.encode("utf-8", "surrogateescape"))
    for position in sorted(
        {i * (len(files) - 1) // (_MAX_FILES - 1) for i in range(_MAX_FILES)} if files else ()
    ):
        crc = _sampled_crc(files[position], statuses[position].st_size, crc)
    newest = max((status.st_mtime_ns for status in statuses), default=0)
    return Fingerprint(sum(status.st_size for status in statuses), newest, crc)


def _sampled_crc(path: Path, size: int, crc: int) -> int:
    with path.open("rb", buffering=0) as file:
        for start, length in _samples(size):
            file.seek(start)
            crc = zlib.crc32(file.read(length), crc)
    return crc


def _samples(size: int) -> list[tuple[int, int]]:
    between = size - 2 * _END
    if between <= _NUM_PIECES * _PIECE:
        return [(0, size)]
    step = between // _NUM_PIECES
    middle = [(_END + i * step, _PIECE) for i in range(_NUM_PIECES)]
    return [(0, _END), *middle, (size - _END, _END)]
