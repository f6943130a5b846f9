"""A model's weights by name, read safely from whatever file its folder has, and written atomically.

Tensors are mapped from the file and checked one at a time when asked for, so a model is loaded with little
more memory than its own, and a NaN is reported with the tensor's name. The order of preference is the
hub's: model.safetensors, its sharded form, pytorch_model.bin, its sharded form; then scGPT's best_model.pt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scfm.data.atomic_file import whole_file
from scfm.data.safe_pickle import load_json
from scfm.errors import (
    CheckpointError,
    FormatError,
    IntegrityError,
    InvalidArgumentError,
    MissingFileError,
    UnsafeCheckpointError,
)
from scfm.models.safetensors_header import read_header
from scfm.models.torch_file import load_torch_file

__all__ = [
    "WEIGHT_FILES",
    "Weights",
    "WeightsSource",
    "file_sha256",
    "read_weights",
    "weights_of",
    "write_safetensors",
]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "best_model.pt",
)
_TORCH_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class WeightsSource:
    """The files that weights came from; small enough to keep when the weights themselves are let go.

    source_file: the file found first (an index if there are shards); files: every file read.
    """

    source_file: Path
    format: Literal["safetensors", "torch"]
    files: tuple[Path, ...]
    _stamps: tuple[tuple[int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stamps", tuple(_stamp(path) for path in self.files))

    @cached_property
    def file_sha256(self) -> dict[str, str]:
        """SHA-256 of every file read, by file name. Reads them whole, once, when first asked for.

        Raises IntegrityError if a file was changed since its weights were read.
        """
        for path, stamp in zip(self.files, self._stamps, strict=True):
            if not path.is_file() or _stamp(path) != stamp:
                raise IntegrityError("was changed or removed since its weights were read", path=path)
        return {path.name: file_sha256(path) for path in self.files}

    @property
    def sha256(self) -> str:
        """SHA-256 of the file; for several, of the lines that ``sha256sum`` would print for them."""
        if len(self.files) == 1:
            return self.file_sha256[self.files[0].name]
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.file_sha256.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


class Weights(Mapping[str, Tensor]):
    """Tensors by name, on the CPU, in the dtype of the file; ``source`` says which files.

    ``weights[name]`` raises CheckpointError if a floating-point tensor holds NaN or infinity. ``shapes``
    costs no reading of numbers.
    """

    def __init__(self, source: WeightsSource, parts: Sequence[Mapping[str, Tensor]]) -> None:
        self.source = source
        self._home = {name: part for part in parts for name in part}
        self._checked: set[str] = set()

    @property
    def source_file(self) -> Path:
        return self.source.source_file

    @property
    def format(self) -> Literal["safetensors", "torch"]:
        return self.source.format

    @property
    def sha256(self) -> str:
        """SHA-256 of what was read (see WeightsSource)."""
        return self.source.sha256

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._home[name][name]
        if name not in self._checked:
            _expect_finite(tensor, name, self.source_file)
            self._checked.add(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the header where there is one."""
        return {
            name: part.shape(name) if isinstance(part, _SafetensorsFile) else tuple(part[name].shape)
            for name, part in self._home.items()
        }


class _SafetensorsFile(Mapping[str, Tensor]):
    """One safetensors file: header checked by us, tensors mapped by the library when asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._entries = read_header(path)
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise FormatError(f"not a valid safetensors file ({error})", path=path) from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._entries:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call, unused-ignore]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape


def read_weights(folder_or_file: str | Path, *, trust_pickle: bool = False) -> Weights:
    """The weights in a model's folder or in one file.

    ``trust_pickle=True`` lets a torch file run its own code; it warns. Raises MissingFileError naming what
    was looked for; UnsafeCheckpointError naming the global that a pickle asks for, or a shard outside the
    folder; FormatError for a file that is truncated, malformed or a stand-in (git-LFS pointer, web page).
    """
    path = Path(folder_or_file)
    if path.is_dir():
        found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if found is None:
            raise MissingFileError(
                f"no weights in this folder; looked for {', '.join(WEIGHT_FILES)}", path=path
            )
        path = found
    if not path.exists():
        raise MissingFileError("no such file or folder", path=path)
    if not path.is_file():
        raise FormatError("not a regular file", path=path)
    if path.name.endswith(".index.json"):
        return _read_shards(path, trust_pickle)
    return Weights(WeightsSource(path, _format_of(path), (path,)), [_read_part(path, trust_pickle)])


def weights_of(state: Any, path: Path) -> Weights:
    """The weights in one of the state dicts that the torch file ``path`` holds. Raises as ``read_weights``."""
    return Weights(WeightsSource(path, "torch", (path,)), [_tensors_of(state, path)])


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` under ``path``: whole or not at all, and on the disk when this returns.

    Tensors are stored contiguous, as they are; two names for one memory raise InvalidArgumentError (store
    one).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(stored, temporary, dict(metadata or {"format": "pt"}))
        except RuntimeError as error:
            raise InvalidArgumentError(f"cannot be stored: {str(error).strip()[:300]}", path=path) from None
        except SafetensorError as error:
            raise OSError(f"{path}: writing failed: {error}") from error


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _format_of(path: Path) -> Literal["safetensors", "torch"]:
    if path.name.endswith(".safetensors"):
        return "safetensors"
    if path.name.endswith(_TORCH_ENDINGS):
        return "torch"
    raise FormatError(f"weights must be .safetensors or {', '.join(_TORCH_ENDINGS)}", path=path)


def _read_part(path: Path, trust_pickle: bool) -> Mapping[str, Tensor]:
    if _format_of(path) == "safetensors":
        return _SafetensorsFile(path)
    return _tensors_of(load_torch_file(path, trust_pickle=trust_pickle), path)


def _tensors_of(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a torch file; every tensor must be plain and no larger than its data."""
    if not isinstance(found, dict):
        raise FormatError(f"expected a dict of tensors, found {type(found).__name__}", path=path)
    entries = list(dict.items(found))  # an OrderedDict from a file may bear an attribute called "items"
    wrong = [str(name)[:60] for name, item in entries if not (type(name) is str and isinstance(item, Tensor))]
    if wrong:
        raise CheckpointError(f"{len(wrong):,} entries are not named tensors: {wrong[:5]}", path=path)
    for name, tensor in entries:
        plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise FormatError("not a plain dense tensor", path=path, where=f"tensor {name[:200]!r}")
    return {name: tensor.detach() for name, tensor in entries}


def _read_shards(index: Path, trust_pickle: bool) -> Weights:
    """Weights spread over files that an index names; the index is data and may name files beside it only."""
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("expected an object of tensor name -> file", path=index, where="weight_map")
    names: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        names.setdefault(_shard_name(shard, index), set()).add(tensor)
    parts: dict[Path, Mapping[str, Tensor]] = {}
    for shard, expected in sorted(names.items()):
        path = index.parent / shard
        if not path.is_file():
            raise MissingFileError(f"the shard that {index.name} names is not there", path=path)
        _expect_inside(path, index)
        part = _read_part(path, trust_pickle)
        if set(part) != expected:
            lacking, extra = sorted(expected - set(part)), sorted(set(part) - expected)
            raise CheckpointError(
                f"does not hold what {index.name} says: {len(lacking):,} tensors missing {lacking[:5]}, "
                f"{len(extra):,} not expected {extra[:5]}",
                path=path,
            )
        parts[path] = part
    formats = {_format_of(path) for path in parts}
    if len(formats) > 1:
        raise FormatError("mixes safetensors and torch shards", path=index)
    return Weights(WeightsSource(index, formats.pop(), (index, *parts)), list(parts.values()))


def _shard_name(shard: Any, index: Path) -> str:
    if not isinstance(shard, str) or not shard or shard in (".", "..") or set(shard) & set("/\\\0:"):
        raise UnsafeCheckpointError(
            f"shard {str(shard)[:100]!r} is not a bare file name",
            path=index,
            hint="An index may only name files in its own folder.",
        )
    return shard


def _expect_inside(path: Path, index: Path) -> None:
    """A shard may be a symbolic link only within its folder, or into the blobs of its Hugging Face cache."""
    target, folder = path.resolve(), index.parent.absolute()
    allowed = [folder.resolve()]
    for parent in (folder, *folder.parents):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed.append((parent.parent / "blobs").resolve())
    if not any(target.is_relative_to(place) for place in allowed):
        raise UnsafeCheckpointError(
            f"shard {path.name!r} is a link to {target}, outside its folder",
            path=index,
            hint="Copy the file here.",
        )


def _expect_finite(tensor: Tensor, name: str, path: Path) -> None:
    # A finite sum proves every number finite at the cost of one read; the slow look is for overflows.
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch has no sum of float8
    if not bool(tensor.sum().isfinite()):
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise CheckpointError(
                f"{bad:,} of {tensor.numel():,} numbers are NaN or infinite",
                path=path,
                where=f"tensor {name!r}",
            )
