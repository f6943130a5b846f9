"""Names in the folder of checkpoints, and the one step by which a checkpoint comes to be.

    .tmp-step-00001200-<owner>   everything is written here; <owner> names the process and is never used twice
    MANIFEST.json, COMMITTED     when all ranks' files are on the disk
    step-00001200                by a rename, which is the commit

A committed folder is never written into and never overwritten. What stands in the way when a step is committed
belongs to another course of the run, or is damaged: it is set aside under a name that is not resumed from.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scfm.data.atomic_file import create_once, flush, storage_errors
from scfm.data.crash_points import crash_point
from scfm.data.process_name import host_name, is_dead, start_time
from scfm.data.safe_pickle import load_json
from scfm.errors import FormatError, IntegrityError, StorageError
from scfm.train.checkpoint.train_state import FORMAT_VERSION, expect_format

__all__ = [
    "Manifest",
    "clear_leftovers",
    "commit",
    "committed_steps",
    "discard",
    "new_owner",
    "partial_folder",
    "read_manifest",
    "remove",
    "step_folder",
]

MANIFEST_FILE = "MANIFEST.json"
COMMITTED_FILE = "COMMITTED"
_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(?:tmp|old)-step-\d+-([A-Za-z0-9-]+)\.(\d+)\.(\d*)\.[0-9a-f]+")


@dataclass(frozen=True)
class Manifest:
    """files: name to size and CRC-32 of everything but itself and COMMITTED; num_tensors: in all of them together,
    pieces of one counted once; optimizer: its class's name."""

    step: int
    num_tensors: int
    optimizer: str
    files: dict[str, tuple[int, int]]

    def to_json(self) -> str:
        content = {"format": FORMAT_VERSION, "step": self.step, "num_tensors": self.num_tensors}
        files = {name: list(self.files[name]) for name in sorted(self.files)}
        return json.dumps({**content, "optimizer": self.optimizer, "files": files}, indent=1) + "\n"


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def new_owner() -> str:
    """This process and a number that is never used twice, as one word for names."""
    return f"{host_name()}.{os.getpid()}.{start_time(os.getpid())}.{secrets.token_hex(4)}"


def partial_folder(folder: Path, step: int, owner: str) -> Path:
    return folder / f".tmp-step-{step:08d}-{owner}"


def committed_steps(folder: Path) -> list[int]:
    """Steps whose folder bears its final name, highest first; whether they are sound is for verify.py to say."""
    if not folder.is_dir():
        return []
    with storage_errors(folder):
        found = [_STEP.fullmatch(entry.name) for entry in folder.iterdir()]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def commit(folder: Path, partial: Path, manifest: Manifest, owner: str) -> tuple[Path, list[Path]]:
    """Make ``partial`` the checkpoint of the manifest's step; what was set aside for it comes second.

    Raises StorageError; the checkpoint then does not exist.
    """
    _expect_visible(partial, manifest)
    crash_point("before_manifest")
    text = manifest.to_json().encode()
    create_once(partial / MANIFEST_FILE, [text], at=crash_point)
    crash_point("before_committed")
    create_once(partial / COMMITTED_FILE, [f"{zlib.crc32(text):08x}\n".encode()], at=crash_point)
    final = step_folder(folder, manifest.step)
    set_aside = [_set_aside(folder, step, owner) for step in committed_steps(folder) if step >= manifest.step]
    crash_point("before_rename")
    with storage_errors(final):
        os.rename(partial, final)  # noqa: PTH104 (the one call that gives the name; fails if it is taken)
        crash_point("after_rename")
        flush(folder)
    return final, set_aside


def read_manifest(path: Path) -> Manifest:
    """Raises FormatError, MissingFileError, IntegrityError or VersionError saying what is wrong."""
    content = load_json(path / MANIFEST_FILE)
    file = path / MANIFEST_FILE
    try:
        committed = (path / COMMITTED_FILE).read_bytes()[:100].decode().strip()
        crc32 = f"{zlib.crc32(file.read_bytes()):08x}"
    except (OSError, UnicodeDecodeError):
        raise IntegrityError(
            "missing or unreadable: it was never finished", path=path / COMMITTED_FILE
        ) from None
    if committed != crc32:
        raise IntegrityError("does not match the checksum in COMMITTED", path=file)
    expect_format(content, file)
    if set(content) != {"step", "num_tensors", "optimizer", "files"}:
        raise FormatError(f"unexpected keys {sorted(content)}", path=file)
    counts = (content["step"], content["num_tensors"])
    if any(type(n) is not int or n < 0 for n in counts) or not isinstance(content["optimizer"], str):
        raise FormatError("step, num_tensors or optimizer is not what it should be", path=file)
    return Manifest(*counts, content["optimizer"], _files(content["files"], file))


def clear_leftovers(folder: Path) -> int:
    """Remove what saves and deletions that were cut off left behind; not those of a process that still lives here.

    The lock of the run folder sees to it that no other job works there.
    """
    num_removed = 0
    if not folder.is_dir():
        return 0
    with storage_errors(folder):
        entries = list(folder.iterdir())
    for entry in entries:
        match = _LEFTOVER.fullmatch(entry.name)
        if match and (match[1] != host_name() or is_dead(match[1], int(match[2]), match[3])):
            shutil.rmtree(entry, ignore_errors=True)
            num_removed += 1
    return num_removed


def remove(folder: Path, step: int, owner: str) -> None:
    """Delete a checkpoint: first its name, in one step, then its files. Raises StorageError."""
    path = step_folder(folder, step)
    aside = folder / f".old-step-{step:08d}-{owner}"
    with storage_errors(path):
        os.rename(path, aside)  # noqa: PTH104 (one step: no half-deleted checkpoint bears a name)
        flush(folder)
    crash_point("before_delete")
    shutil.rmtree(aside, ignore_errors=True)


def discard(partial: Path) -> None:
    """Take away what a save that failed has left. Whatever cannot be removed counts as nothing anyway."""
    with suppress(OSError):
        shutil.rmtree(partial, ignore_errors=True)


def _expect_visible(partial: Path, manifest: Manifest) -> None:
    for name, (size, _) in manifest.files.items():
        path = partial / name
        found = path.stat().st_size if path.is_file() else -1
        if found != size:
            state = "is not to be seen" if found < 0 else f"has {found:,} bytes"
            raise StorageError(
                f"{state} on the machine of rank 0; {size:,} bytes were written",
                path=path,
                hint="The folder of a run on several machines must be on storage that all of them share.",
            )


def _set_aside(folder: Path, step: int, owner: str) -> Path:
    path, aside = step_folder(folder, step), folder / f"set-aside-step-{step:08d}-{owner}"
    with storage_errors(path):
        os.rename(path, aside)  # noqa: PTH104 (one step, and the name is used once)
    return aside


def _files(found: Any, path: Path) -> dict[str, tuple[int, int]]:
    files: dict[str, tuple[int, int]] = {}
    for name, facts in found.items() if isinstance(found, dict) else ():
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) and len(name) < 200
        counts = isinstance(facts, list) and len(facts) == 2 and all(type(n) is int and n >= 0 for n in facts)
        if not plain or not counts:
            raise FormatError(
                f"expected size and checksum of a file, found {name[:100]!r}", path=path, where="files"
            )
        files[name] = (facts[0], facts[1])
    if not files:
        raise FormatError("names no files", path=path, where="files")
    return files
