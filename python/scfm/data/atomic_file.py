"""Files and folders that appear under their name whole and on the disk, or not at all.

Everything scfm writes passes through here. The bytes go to a temporary name in the same folder, are synced, and
take the final name in one step; the folder is synced after that, or a power cut could forget the name. Two ways
to take the name: *replace* whatever stood there (a user's output file) and *create once*, where the first
writer wins and nobody is ever overwritten (shards that several processes may finish at the same moment).

Room is reserved before the first byte is written, so that a full disk is an error at once and no memory map
can ever meet a hole. What the operating system refuses becomes a StorageError that says what to do.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scfm.data.process_name import host_name
from scfm.errors import InvalidArgumentError, MissingFileError, ScfmError, StorageError

__all__ = [
    "TEMPORARY_SUFFIX",
    "create_once",
    "flush",
    "reserve",
    "storage_errors",
    "temporary_name",
    "whole_file",
    "whole_folder",
]

TEMPORARY_SUFFIX = ".tmp"
_PIECE = 16 << 20
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}
_GUARD_SECONDS = 30.0
_REMEDY = {
    errno.ENOSPC: "The disk is full: free some room and start again.",
    errno.EDQUOT: "Your quota is used up: free some room and start again.",
    errno.EFBIG: "The file is larger than the limit allows: raise it (ulimit -f) or write smaller files.",
    errno.EROFS: "The file system is read-only: write somewhere else.",
    errno.EACCES: "You may not write there: choose another folder or change its permissions.",
    errno.EPERM: "You may not write there: choose another folder or change its permissions.",
    errno.EIO: "The disk or network failed: check it, then start again.",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses inside into a StorageError about ``path``."""
    try:
        yield
    except ScfmError:
        raise
    except OSError as error:
        code = error.errno or 0
        found = os.strerror(code) if code else str(error)
        refused = StorageError(
            f"cannot be written ({found})",
            path=path,
            hint=_REMEDY.get(code, "Nothing was left half written; start again once that is mended."),
        )
        refused.errno = code
        raise refused from error


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other process uses, on this machine or another; it says whose it is."""
    owner = f"{host_name()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f"{path.name}.{owner}{TEMPORARY_SUFFIX}")


def reserve(handle: int, num_bytes: int) -> None:
    """Real room on the disk for the whole file, where the file system can do that. Raises OSError if not."""
    if num_bytes <= 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        _retried(os.posix_fallocate, handle, 0, num_bytes)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise


def flush(path: Path) -> None:
    """The file's bytes, or the folder's names, are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _sync(handle, folder=path.is_dir())
    finally:
        os.close(handle)


def create_once(
    path: Path, pieces: Iterable[bytes | memoryview], *, at: Callable[[str], None] = lambda point: None
) -> bool:
    """Write ``pieces`` to a file that is there whole or not at all; False if someone else's stands there.

    Never overwrites. ``at`` is called with "after_write", "before_link" and "after_link" as they are reached.
    Raises StorageError; nothing then stands under ``path`` and no temporary file is left behind.
    """
    temporary = temporary_name(path)
    with storage_errors(path):
        try:
            _write_new(temporary, list(pieces), at)
            at("before_link")
            won = _take_name(temporary, path)
            at("after_link")
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        flush(path.parent)
    return won


def _write_new(path: Path, pieces: list[bytes | memoryview], at: Callable[[str], None]) -> None:
    views = [memoryview(piece).cast("B") for piece in pieces]
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        reserve(handle, sum(len(view) for view in views))
        for view in views:
            _write_all(handle, view)
        at("after_write")
        _sync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, view: memoryview) -> None:
    """A write may take less than it was given; that is no error until it takes nothing."""
    done = 0
    while done < len(view):
        taken = _retried(os.write, handle, view[done : done + _PIECE])
        if taken <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += taken


def _retried(call: Callable[..., int | None], *arguments: object) -> int:
    while True:
        try:
            return call(*arguments) or 0
        except InterruptedError:
            continue


def _sync(handle: int, *, folder: bool = False) -> None:
    try:
        _retried(os.fsync, handle)
    except OSError as error:
        # Some file systems cannot sync a folder; its names are then as safe as they can be there.
        if not (folder and error.errno in _NO_FALLOCATE):
            raise


def _take_name(temporary: Path, path: Path) -> bool:
    """Give the file its final name unless that is taken. A hard link does both in one step."""
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except FileNotFoundError:
        # Someone who found the file finished may clear away what others were still writing for it.
        if path.exists():
            return False
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    return _rename_guarded(temporary, path)


def _rename_guarded(temporary: Path, path: Path) -> bool:
    """Without hard links: whoever creates the guard file may look whether the name is free, then rename.

    A guard lives for microseconds; one that stays was left by a process that died, and is broken after half a
    minute. Two processes breaking it at once could both rename: the bytes of both are those of the same shard.
    """
    guard = path.with_name(f"{path.name}.guard")
    patience = time.monotonic() + _GUARD_SECONDS
    while True:
        try:
            os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
            break
        except FileExistsError:
            if time.monotonic() > patience:
                guard.unlink(missing_ok=True)
            time.sleep(0.02)
    try:
        if path.exists() or path.is_symlink():
            return False
        os.rename(temporary, path)  # noqa: PTH104 (the one call that gives the name)
        return True
    finally:
        with suppress(OSError):
            guard.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place, synced, only when the block ends well.

    The file is made with the permissions that the user's umask gives. A link under ``path`` is replaced, not
    followed. Raises MissingFileError, InvalidArgumentError, StorageError.
    """
    _expect_file_name(path)
    temporary = temporary_name(path.with_name(f".{path.name}"))
    with storage_errors(path):
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # libraries that write the file anew may choose their own
            flush(temporary)
            os.replace(temporary, path)  # noqa: PTH105 (the one call that gives the name)
            flush(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _expect_file_name(path: Path) -> None:
    if not path.parent.is_dir():
        raise MissingFileError("the folder to write to does not exist", path=path.parent)
    if path.is_dir():
        raise InvalidArgumentError("is a folder; expected a file name", path=path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path``, every file in it synced, only when the block ends well.

    ``path`` may be absent or an empty folder. Raises InvalidArgumentError, StorageError.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise InvalidArgumentError("already exists and is not an empty folder", path=path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX))
        try:
            yield partial
            for entry in sorted(partial.rglob("*"), reverse=True):
                flush(entry)
            flush(partial)
            partial.chmod(0o755)
            if path.exists():
                path.rmdir()
            partial.rename(path)
            flush(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
