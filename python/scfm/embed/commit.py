"""Making a finished shard exist, once: the array first, then the manifest that vouches for it.

Each of the two appears under its name in one step and never replaces anything. A process killed in between
leaves an array without a manifest, which counts as nothing until someone computes the shard again, finds the
same bytes standing there and adds the manifest.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from scfm.data.atomic_file import TEMPORARY_SUFFIX, create_once, flush, storage_errors
from scfm.data.checksum import file_crc32
from scfm.data.crash_points import crash_point
from scfm.data.process_name import is_dead
from scfm.embed.manifest import Manifest
from scfm.embed.plan import Plan, Shard

__all__ = ["clear_leftovers", "commit_shard", "npy_header", "set_aside"]

ASIDE = "set_aside"


def npy_header(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> bytes:
    """The bytes before the numbers in a .npy file of C order."""
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def commit_shard(
    folder: Path, shard: Shard, values: np.ndarray, describe: Callable[[int, int], Manifest]
) -> bool:
    """Store the shard; False if someone else had already. ``describe(crc32, num_bytes)`` gives the manifest.

    Raises StorageError; the shard then does not exist.
    """
    header, numbers = npy_header(values.shape, values.dtype), np.ascontiguousarray(values).reshape(-1).data
    crc32 = zlib.crc32(numbers, zlib.crc32(header))
    num_bytes = len(header) + values.nbytes
    array, manifest = folder / shard.array_name, folder / shard.manifest_name
    while not create_once(array, [header, numbers], at=crash_point):
        if manifest.exists():
            return False
        with storage_errors(array):
            if array.stat().st_size == num_bytes and file_crc32(array) == crc32:
                break  # of a process that died before its manifest, or is just about to write it
        set_aside(folder, array)
    with storage_errors(array):
        ours = array.stat().st_ino
    crash_point("before_manifest")
    won = create_once(manifest, [describe(crc32, num_bytes).to_json().encode()])
    crash_point("after_manifest")
    if won and _inode(array) != ours:
        # A worker on another kind of machine, whose bytes differ, took this one for dead and put its array in
        # place of ours: together the two files would be neither's. Whoever comes next computes the shard again.
        set_aside(folder, manifest)
        return False
    return won


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1


def set_aside(folder: Path, path: Path) -> Path | None:
    """Move a damaged file where it does no harm and can still be looked at; None if it was gone already."""
    aside = folder / ASIDE
    with storage_errors(path):
        aside.mkdir(exist_ok=True)
        for number in range(1, 1000):
            target = aside / f"{path.name}.{number}"
            if target.exists():
                continue
            try:
                os.rename(path, target)  # noqa: PTH104 (one step, and the name is known to be free)
            except FileNotFoundError:
                return None
            flush(aside)
            flush(folder)
            return target
    return None


def clear_leftovers(folder: Path, plan: Plan) -> int:
    """Remove temporary files of processes that are certainly dead, and what is left of finished shards."""
    finished = {shard.name for shard in plan.shards if (folder / shard.manifest_name).exists()}
    num_removed = 0
    for name in finished:
        with suppress(OSError):
            (folder / f"{name}.lease").unlink()
            num_removed += 1
    for entry in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        parts = entry.name.split(".")
        # NAME.json|npy|lease . host . pid . number . tmp
        if len(parts) < 5 or not parts[-3].isdigit():
            continue
        if parts[0] in finished or is_dead(parts[-4], int(parts[-3])):
            with suppress(OSError):
                entry.unlink()
                num_removed += 1
    return num_removed
