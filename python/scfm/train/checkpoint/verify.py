"""Whether a checkpoint is whole: every byte that was written is still there, and says what it should.

Names and dates prove nothing. A checkpoint verifies if its manifest matches COMMITTED, the folder holds exactly the
files it names, each has its size and its checksum, the safetensors headers are sound, their chunks cover every
tensor once and train_state.json can be read. Several ranks share the reading of the files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from scfm.data.checksum import file_crc32
from scfm.data.safe_pickle import parse_json
from scfm.errors import FormatError, IntegrityError, MissingFileError
from scfm.models.safetensors_header import read_header_and_metadata
from scfm.train.checkpoint.folder import COMMITTED_FILE, MANIFEST_FILE, Manifest, read_manifest
from scfm.train.checkpoint.snapshot import SHARDING_INFO, dtype_of
from scfm.train.checkpoint.train_state import TRAIN_STATE_FILE, TrainState

__all__ = ["FoundCheckpoint", "Stored", "check_files", "looks_whole", "open_checkpoint"]

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where a chunk begins, and its shape


@dataclass(frozen=True)
class Stored:
    """A tensor as the shards hold it, put together."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that verifies. skipped: in words, which newer ones do not, and why."""

    path: Path
    state: TrainState
    manifest: Manifest
    tensors: dict[str, Stored]
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.state.step


def open_checkpoint(path: Path, step: int) -> FoundCheckpoint:
    """All but the checksums of the files. Raises a ScfmError naming the file that is not right."""
    manifest = read_manifest(path)
    expected = {*manifest.files, MANIFEST_FILE, COMMITTED_FILE}
    found = {entry.name for entry in path.iterdir()}
    if missing := sorted(expected - found):
        raise MissingFileError("named in the manifest and not there", path=path / missing[0])
    if unknown := sorted(found - expected):
        raise IntegrityError("not named in the manifest", path=path / unknown[0])
    for name, (size, _) in manifest.files.items():
        if (path / name).is_symlink() or not (path / name).is_file():
            raise IntegrityError("not a regular file", path=path / name)
        if (path / name).stat().st_size != size:
            raise IntegrityError(
                f"has {(path / name).stat().st_size:,} bytes, {size:,} were written", path=path / name
            )
    if TRAIN_STATE_FILE not in manifest.files:
        raise MissingFileError("named nowhere in the manifest", path=path / TRAIN_STATE_FILE)
    file = path / TRAIN_STATE_FILE
    state = TrainState.from_json(file.read_bytes(), file)
    if not state.step == manifest.step == step:
        raise IntegrityError(f"belongs to step {state.step}, the folder to step {step}", path=file)
    return FoundCheckpoint(path, state, manifest, _tensors(path, manifest))


def check_files(found: FoundCheckpoint, part: int = 0, num_parts: int = 1) -> None:
    """Read every ``num_parts``-th file and compare checksums. Raises IntegrityError naming the file."""
    for name in sorted(found.manifest.files)[part::num_parts]:
        crc32, written = file_crc32(found.path / name), found.manifest.files[name][1]
        if crc32 != written:
            raise IntegrityError(
                f"damaged: its checksum is {crc32:08x}, {written:08x} was written", path=found.path / name
            )


def looks_whole(path: Path) -> bool:
    """By names and sizes alone, which costs no reading."""
    try:
        manifest = read_manifest(path)
        return all((path / name).stat().st_size == size for name, (size, _) in manifest.files.items())
    except (ValueError, OSError):
        return False


def _tensors(path: Path, manifest: Manifest) -> dict[str, Stored]:
    boxes: dict[str, list[Box]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name in sorted(manifest.files):
        if not name.endswith(".safetensors"):
            continue
        file = path / name
        entries, metadata = read_header_and_metadata(file)
        offsets = parse_json(metadata.get(SHARDING_INFO, "").encode(), file)
        if set(offsets) != set(entries):
            raise FormatError("its offsets and its tensors are not the same", path=file, where=SHARDING_INFO)
        for tensor, entry in entries.items():
            begin = _offsets(offsets[tensor], len(entry.shape), tensor, file)
            dtype = dtype_of(entry.dtype)
            if dtype is None or dtypes.setdefault(tensor, dtype) != dtype:
                raise FormatError(
                    f"unexpected dtype {entry.dtype}", path=file, where=f"tensor {tensor[:200]!r}"
                )
            boxes.setdefault(tensor, []).append((begin, entry.shape))
    if len(boxes) != manifest.num_tensors:
        raise IntegrityError(f"holds {len(boxes)} tensors, {manifest.num_tensors} were written", path=path)
    return {name: Stored(dtypes[name], _whole(name, boxes[name], path)) for name in boxes}


def _offsets(found: object, num_dimensions: int, tensor: str, file: Path) -> tuple[int, ...]:
    begin = found.get("saved_offsets") if isinstance(found, dict) else None
    if (
        not isinstance(begin, list)
        or len(begin) != num_dimensions
        or any(type(n) is not int or n < 0 for n in begin)
    ):
        raise FormatError(
            f"not where a chunk begins: {str(found)[:80]}", path=file, where=f"tensor {tensor[:200]!r}"
        )
    return tuple(begin)


def _whole(name: str, boxes: list[Box], path: Path) -> tuple[int, ...]:
    """The shape that the chunks make up together, if they fill it without overlap."""
    ends = [tuple(b + n for b, n in zip(begin, shape, strict=True)) for begin, shape in boxes]
    if len({len(end) for end in ends}) != 1:
        raise FormatError(
            "its chunks have different numbers of dimensions", path=path, where=f"tensor {name!r}"
        )
    whole = tuple(max(lengths) for lengths in zip(*ends, strict=True))
    filled = sum(math.prod(shape) for _, shape in boxes)
    if filled != math.prod(whole) or len({begin for begin, _ in boxes}) != len(boxes):
        raise IntegrityError(
            f"its {len(boxes)} chunks hold {filled:,} numbers, shape {list(whole)} has {math.prod(whole):,}",
            path=path,
            where=f"tensor {name!r}",
        )
    return whole
