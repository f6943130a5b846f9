"""Opening HDF5 files that nobody vouches for.

HDF5 can make one file read another: external links, external raw storage, virtual datasets. A data file
has no business doing so, and the usual readers follow such pointers (a virtual dataset whose source is
missing even reads as zeros). Here every object is reached link by link, and anything that leads outside
the file is refused before a byte of it is read. Errors of the HDF5 library become FormatError with the
file's name and the place in it.

Files are opened for each reading and closed after it, so a source can be pickled, forked and forgotten; a
fingerprint makes sure that it is still the same file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from scfm.data.available_memory import require_memory
from scfm.data.h5_filters import check_chunk_sizes
from scfm.errors import (
    FormatError,
    IntegrityError,
    InvalidArgumentError,
    MissingFileError,
    ResourceError,
    ScfmError,
    UnsafeFileError,
)

__all__ = ["Hdf5File", "check_dataset", "check_tree", "locate", "read_whole", "reading"]

# HDF5 reads whole chunks; writers make them of kilobytes to megabytes.
MAX_CHUNK_BYTES = 1 << 30
_MAX_LINKS = 32


class Hdf5File:
    """An HDF5 file by path, opened read-only for each use; or a handle that someone else keeps open."""

    def __init__(self, path: str | os.PathLike[str], *, handle: h5py.File | None = None) -> None:
        self.path = os.fspath(path)
        self._handle = handle
        self._fingerprint: tuple[int, int, int] | None = None
        if handle is None:
            self._fingerprint = self._look()

    def opened(self) -> AbstractContextManager[h5py.File]:
        """The open file. Raises IntegrityError when it is no longer the file it was at first."""
        if self._handle is not None:
            return nullcontext(self._handle)
        self.check_unchanged()
        opened: AbstractContextManager[h5py.File] = _open(self.path)
        return opened

    @property
    def is_local(self) -> bool:
        """A file of this system by its path, rather than an open handle."""
        return self._handle is None

    def check_unchanged(self) -> None:
        """Raise IntegrityError when the path no longer leads to the file it led to at first."""
        if self._handle is None and self._look() != self._fingerprint:
            raise IntegrityError(
                "the file changed while it was in use",
                path=self.path,
                hint="Read it again from the start once nothing writes to it.",
            )

    def _look(self) -> tuple[int, int, int]:
        """Size, time and identity; refuses what is not a regular file before anything could hang on it."""
        try:
            status = Path(self.path).stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFileError("no such file", path=self.path) from error
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(f"cannot be looked at: {error}", path=self.path) from error
        if stat.S_ISDIR(status.st_mode):
            raise InvalidArgumentError("is a folder; expected a file", path=self.path)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgumentError(
                "is a pipe, socket or device; expected a regular file",
                path=self.path,
                hint="HDF5 needs to jump about in the file: save it to disk first.",
            )
        return status.st_size, status.st_mtime_ns, status.st_ino


def _open(path: str) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except PermissionError as error:
        raise InvalidArgumentError("permission denied", path=path) from error
    except BlockingIOError as error:
        raise InvalidArgumentError(
            "another program has the file open for writing", path=path, hint="Close it there first."
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if Path(path).stat().st_size == 0:
            found = "the file is empty"
        elif "truncated" in str(error):
            found = "the file is truncated: its end is missing"
        elif "signature" in str(error):
            found = "this is not an HDF5 file"
        else:
            found = f"the HDF5 library cannot open it ({_first_line(error)})"
        raise FormatError(found, path=path, hint="Copy or download it again.") from error


@contextmanager
def reading(path: str, where: str) -> Iterator[None]:
    """Turns whatever the HDF5 library or a table reader raises inside into an error that names the place."""
    try:
        yield
    except ScfmError:
        raise
    except MemoryError as error:
        raise ResourceError("not enough memory to read this", path=path, where=where) from error
    except Exception as error:
        text = _first_line(error)
        hint = "The file is damaged; copy, download or write it again."
        if "filter" in text and ("not registered" in text or "not available" in text):
            hint = "Install the compression plugins: pip install hdf5plugin, and import hdf5plugin first."
        raise FormatError(f"cannot be read ({text})", path=path, where=where, hint=hint) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def locate(file: h5py.File, place: str, *, path: str) -> h5py.Group | h5py.Dataset | None:
    """The object at ``place``, or None. Raises UnsafeFileError where the way there leaves the file.

    Soft links inside the file are followed; loops of them are refused.
    """
    return _walk(file, file["/"], place, path, [_MAX_LINKS])


def _walk(
    file: h5py.File, start: h5py.Group, place: str, path: str, budget: list[int]
) -> h5py.Group | h5py.Dataset | None:
    here: Any = file["/"] if place.startswith("/") else start
    for part in (piece for piece in place.split("/") if piece not in ("", ".")):
        if not isinstance(here, h5py.Group):
            return None
        with reading(path, f"{here.name.rstrip('/')}/{part}"):
            here = _step(file, here, part, path, budget)
        if here is None:
            return None
    return here


def _step(file: h5py.File, group: h5py.Group, name: str, path: str, budget: list[int]) -> Any:
    where = f"{group.name.rstrip('/')}/{name}"
    try:
        link = group.get(name, getlink=True)
    except TypeError as error:
        raise UnsafeFileError("is a link of an unknown kind", path=path, where=where) from error
    if link is None:
        return None
    if isinstance(link, h5py.ExternalLink):
        raise UnsafeFileError(
            f"is a link to another file ({link.filename!r})",
            path=path,
            where=where,
            hint="Write the data into this file itself.",
        )
    if isinstance(link, h5py.SoftLink):
        budget[0] -= 1
        if budget[0] < 0:
            raise UnsafeFileError("is a loop of soft links", path=path, where=where)
        return _walk(file, group, link.path, path, budget)
    # A hard link: the object itself. getitem on a checked hard link cannot leave the file.
    return group[name]


def check_dataset(dataset: h5py.Dataset, *, path: str) -> None:
    """Raise UnsafeFileError if the values lie in other files, FormatError if a chunk is absurdly large."""
    where = str(dataset.name)
    with reading(path, where):
        if dataset.is_virtual:
            raise UnsafeFileError(
                "is a virtual dataset: its values lie in other files",
                path=path,
                where=where,
                hint="Write the data into this file itself.",
            )
        if dataset.id.get_create_plist().get_external_count():
            raise UnsafeFileError(
                "keeps its values in an external raw file",
                path=path,
                where=where,
                hint="Write the data into this file itself.",
            )
        if dataset.chunks is not None:
            chunk_bytes = int(np.prod(dataset.chunks, dtype=object)) * dataset.dtype.itemsize
            if chunk_bytes > MAX_CHUNK_BYTES:
                raise FormatError(
                    f"is stored in chunks {dataset.chunks} of {chunk_bytes:,} bytes; the limit is "
                    f"{MAX_CHUNK_BYTES:,}",
                    path=path,
                    where=where,
                    hint="Write it again with smaller chunks.",
                )


def check_tree(group: h5py.Group | h5py.Dataset, *, path: str) -> None:
    """Everything below ``group`` lies in this file, is of sane size, and has no cycle.

    For tables that a library reads as a whole. Raises UnsafeFileError, FormatError or ResourceError.
    """
    file = group.file
    total = 0
    seen: set[Any] = set()

    def visit(node: Any, ancestors: tuple[Any, ...]) -> None:
        nonlocal total
        if isinstance(node, h5py.Dataset):
            check_dataset(node, path=path)
            check_chunk_sizes(node, path=path)
            if str(node.name).endswith("/codes") and node.ndim != 1:
                # pandas would make categories of whole rows.
                raise FormatError(
                    f"has shape {node.shape}, expected one dimension", path=path, where=str(node.name)
                )
            total += int(np.prod(node.shape or (), dtype=object)) * max(node.dtype.itemsize, 1)
            categories = node.attrs.get("categories")
            if isinstance(categories, h5py.Reference) and categories:
                # Categories of old files hang on an object reference.
                target = file[categories]
                if isinstance(target, h5py.Dataset):
                    check_dataset(target, path=path)
        elif isinstance(node, h5py.Group):
            address = h5py.h5o.get_info(node.id).addr
            if address in ancestors:
                raise UnsafeFileError("contains itself", path=path, where=str(node.name))
            if address in seen:  # a group under two names: a chain of those doubles at every step
                return
            seen.add(address)
            for name in node:
                visit(_walk(file, node, name, path, [_MAX_LINKS]), (*ancestors, address))

    with reading(path, str(group.name)):
        visit(group, ())
    require_memory(
        total,
        purpose="reading this table",
        name=path,
        where=str(group.name),
        hint="The file claims to hold more than fits; check where it comes from.",
    )


def read_whole(dataset: Any, *, path: str, where: str, num_values: int | None = None) -> np.ndarray[Any, Any]:
    """A 1-D dataset as an array, its length and memory checked first."""
    if not isinstance(dataset, h5py.Dataset):
        raise FormatError("is missing or not a dataset", path=path, where=where)
    check_dataset(dataset, path=path)
    if dataset.ndim != 1:
        raise FormatError(f"has shape {dataset.shape}, expected one dimension", path=path, where=where)
    if num_values is not None and dataset.shape[0] != num_values:
        raise FormatError(
            f"has {dataset.shape[0]:,} entries, expected {num_values:,}", path=path, where=where
        )
    require_memory(
        int(dataset.shape[0]) * max(dataset.dtype.itemsize, 8),
        purpose="reading this array",
        name=path,
        where=where,
        hint="The file claims to hold more than fits; check where it comes from.",
    )
    with reading(path, where):
        check_chunk_sizes(dataset, path=path)
        values: np.ndarray[Any, Any] = dataset[()]
    return values
