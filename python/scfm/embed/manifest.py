"""The small file beside each shard that says what is in it, and that it is finished.

A shard exists if and only if its manifest stands and is sound: readable, carrying its own right checksum and
the plan's hash, beside an array of the size it names. Whether the array's bytes are still those that were
written takes reading them all; ``verify`` does that.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scfm.data.safe_pickle import load_json
from scfm.embed.plan import Plan, Shard
from scfm.errors import IntegrityError, ScfmError

__all__ = ["Manifest", "read_manifest", "sound_manifest"]


@dataclass(frozen=True)
class Manifest:
    """array: the shard's file; crc32: zlib's CRC-32 of that whole file, of ``num_bytes`` bytes.

    without_genes: rows of the input (not of the shard) that have no gene the model knows and stand as NaN;
    not_finite: rows whose embedding came out NaN or infinite for another reason, where that was allowed.
    """

    array: str
    crc32: int
    num_bytes: int
    file: str
    row_start: int
    row_end: int
    num_cells: int
    plan_sha256: str
    model_sha256: str
    num_tokens: int
    num_truncated: int
    without_genes: list[int] = field(default_factory=list)
    not_finite: list[int] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        content = asdict(self)
        return json.dumps({"manifest_crc32": _own_crc32(content), **content}, indent=1) + "\n"


def read_manifest(path: Path, shard: Shard, plan: Plan) -> Manifest:
    """Raises FormatError, MissingFileError or IntegrityError saying what is wrong with it."""
    content = load_json(path)
    crc32 = content.pop("manifest_crc32", None)
    known = {entry.name for entry in fields(Manifest)}
    if set(content) != known or crc32 != _own_crc32(content):
        raise IntegrityError("the manifest is damaged: it does not match its own checksum", path=path)
    manifest = Manifest(**content)
    if manifest.plan_sha256 != plan.sha256:
        raise IntegrityError("the manifest belongs to another plan", path=path)
    if (manifest.array, manifest.row_start, manifest.row_end) != (
        shard.array_name,
        shard.row_start,
        shard.row_end,
    ):
        raise IntegrityError("the manifest describes another shard", path=path)
    return manifest


def sound_manifest(folder: Path, shard: Shard, plan: Plan) -> Manifest | None:
    """The manifest of a finished shard; None if there is none. Raises a ScfmError if it is not sound."""
    path = folder / shard.manifest_name
    try:
        manifest = read_manifest(path, shard, plan)
    except ScfmError:
        if not os.path.lexists(path):
            return None
        raise
    array = folder / shard.array_name
    size = array.stat().st_size if array.is_file() else -1
    if size != manifest.num_bytes:
        found = "is missing" if size < 0 else f"has {size:,} bytes, {manifest.num_bytes:,} were written"
        raise IntegrityError(found, path=array, hint="Resume with --verify to compute it again.")
    return manifest


def _own_crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
