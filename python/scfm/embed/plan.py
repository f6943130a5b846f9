"""The plan of a run: which rows of which files become which shard, computed how. Written once, never changed.

Every process works the plan out for itself and compares it with the one in the folder. Only if they are the
same may it touch anything; so a folder can never hold embeddings of two models, settings or versions of a file.
Paths and modification times are kept for people and not compared (see fingerprint.py for what is).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from scfm.data.atomic_file import create_once
from scfm.data.safe_pickle import load_json
from scfm.errors import FormatError, IntegrityError, MissingFileError, VersionError

__all__ = ["FORMAT_VERSION", "PLAN_NAME", "InputFile", "Plan", "Shard", "read_plan", "settle_plan"]

FORMAT_VERSION = 1
PLAN_NAME = "plan.json"
_FORMAT = "scfm-embedding-plan"
_MAX_LISTED = 12
_FOR_PEOPLE = ("path", "mtime_ns")


@dataclass(frozen=True)
class InputFile:
    """One input. name: the last part of its path; crc32: of samples of its contents."""

    path: str
    name: str
    size: int
    mtime_ns: int
    crc32: int
    num_cells: int
    counts_from: str


@dataclass(frozen=True)
class Shard:
    """Rows ``row_start`` up to ``row_end`` of file number ``file``, stored as part ``index``."""

    index: int
    file: int
    row_start: int
    row_end: int

    @property
    def num_cells(self) -> int:
        return self.row_end - self.row_start

    @property
    def name(self) -> str:
        return f"part-{self.index:05d}"

    @property
    def array_name(self) -> str:
        return f"{self.name}.npy"

    @property
    def manifest_name(self) -> str:
        return f"{self.name}.json"

    @property
    def lease_name(self) -> str:
        return f"{self.name}.lease"


@dataclass(frozen=True)
class Plan:
    """model: see model_identity; compute_dtype, store_dtype: "float32", "bfloat16" / "float32", "float16"."""

    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    shard_size: int
    model: dict[str, str]
    hidden_size: int
    layer: int
    pooling: str
    compute_dtype: str
    store_dtype: str
    on_bad_cell: str
    species: str
    assume_counts: bool
    keep_not_finite: bool

    @property
    def num_cells(self) -> int:
        return sum(file.num_cells for file in self.files)

    @property
    def sha256(self) -> str:
        """Of everything that is compared."""
        return hashlib.sha256(_text(self._compared()).encode()).hexdigest()

    def differences(self, other: Plan) -> list[str]:
        """What is not the same, as "key: here -> there"."""
        here, there = _flat(self._compared()), _flat(other._compared())
        keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
        # Other files or another shard size make other shards: the cause is enough.
        causes = [key for key in keys if not key.startswith("shards[")] or keys
        causes.sort(
            key=lambda key: key.startswith("files[")
        )  # the model and the settings first, files are many
        return [f"{key}: {here.get(key, 'absent')} -> {there.get(key, 'absent')}" for key in causes]

    def to_json(self) -> str:
        content = {
            "format": _FORMAT,
            "format_version": FORMAT_VERSION,
            "plan_sha256": self.sha256,
            "plan": asdict(self),
        }
        return json.dumps(content, indent=1) + "\n"

    def _compared(self) -> dict[str, Any]:
        content = asdict(self)
        for file in content["files"]:
            for key in _FOR_PEOPLE:
                del file[key]
        return content


def shards_of(files: Sequence[InputFile], shard_size: int) -> tuple[Shard, ...]:
    """Consecutive pieces of at most ``shard_size`` rows, file by file; no shard spans two files."""
    pieces = [
        (number, start, min(start + shard_size, file.num_cells))
        for number, file in enumerate(files)
        for start in range(0, file.num_cells, shard_size)
    ]
    return tuple(Shard(index, *piece) for index, piece in enumerate(pieces))


def settle_plan(folder: Path, plan: Plan) -> Plan:
    """Write the plan, unless one is there; raise IntegrityError unless that one is the same.

    Returns the plan with this process's own paths. Nothing else in the folder is touched. Raises StorageError.
    """
    path = folder / PLAN_NAME
    if not path.exists():
        create_once(path, [plan.to_json().encode()])
    standing = read_plan(folder)
    if standing.sha256 != plan.sha256:
        found = standing.differences(plan)
        listed = "\n".join(f"  {line}" for line in found[:_MAX_LISTED])
        more = f"\n  ... {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
        raise IntegrityError(
            f"the folder was begun with another plan; begun with -> asked for now:\n{listed}{more}\n"
            "Nothing was touched",
            path=path,
            hint="Ask for the same again to resume, or give a new folder.",
        )
    return replace(standing, files=plan.files)


def read_plan(folder: Path) -> Plan:
    """The plan in a folder. Raises MissingFileError, VersionError, FormatError, IntegrityError."""
    path = folder / PLAN_NAME
    if not path.is_file():
        raise MissingFileError("no plan.json: this is no folder of embeddings", path=folder)
    content = load_json(path)
    if content.get("format") != _FORMAT:
        raise FormatError(f"format {str(content.get('format'))[:40]!r}; expected {_FORMAT!r}", path=path)
    version = content.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise FormatError(f"format_version {str(version)[:40]!r}; expected a number", path=path)
    if version > FORMAT_VERSION:
        raise VersionError(
            f"was written in format {version}; this scfm reads up to {FORMAT_VERSION}",
            path=path,
            hint="Upgrade with `pip install -U scfm`.",
        )
    try:
        plan = _plan_from(content["plan"])
        sound = plan.sha256 == content["plan_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"is damaged ({type(error).__name__}: {str(error)[:100]})", path=path) from error
    if not sound:
        raise IntegrityError(
            "its contents do not match its own checksum: it was edited or damaged",
            path=path,
            hint="Restore it from a backup, or start a new folder.",
        )
    return plan


def _plan_from(content: dict[str, Any]) -> Plan:
    expected = {field.name for field in fields(Plan)}
    if set(content) != expected:
        raise ValueError(f"keys {sorted(set(content) ^ expected)[:5]} missing or unknown")
    files = tuple(InputFile(**file) for file in content["files"])
    shards = tuple(Shard(**shard) for shard in content["shards"])
    return Plan(**{**content, "files": files, "shards": shards})


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _flat(content: Any, place: str = "") -> dict[str, Any]:
    if isinstance(content, dict):
        items = [(f"{place}.{key}" if place else str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        items = [(f"{place}[{number}]", value) for number, value in enumerate(content)]
    else:
        return {place: content}
    return {key: value for place, item in items for key, value in _flat(item, place).items()}
