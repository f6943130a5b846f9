"""What a model's folder holds: whose layout it is, which family, which weights. Nothing large is read.

Two layouts are known. scfm's own has an ``scfm`` section in config.json with a format version, so that a
folder from a newer scfm is refused with the right advice instead of being half understood. The authors'
layouts are recognised by what their config.json says (Geneformer), by their args.json (scGPT), by their file's name
(scFoundation, scBERT) or, a file that is given without a family, by the names of its tensors (scBERT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scfm.data.safe_pickle import load_json
from scfm.errors import FormatError, IntegrityError, InvalidArgumentError, MissingFileError, VersionError
from scfm.models.scbert.names import is_scbert
from scfm.models.scbert.state_file import names_in
from scfm.models.weights import WEIGHT_FILES, file_sha256

__all__ = ["FAMILIES", "FORMAT_VERSION", "FolderKind", "check_sha256", "inspect_folder"]

FORMAT_VERSION = 1
FAMILIES = ("geneformer", "scgpt", "scbert", "scfoundation")
MAX_CONFIG_BYTES = 4 << 20
_FAMILY_OF_MODEL_TYPE = {"bert": "geneformer"}
_SCGPT_ARGS = ("embsize", "nlayers", "nheads")
_SCFOUNDATION_FILE = "models.ckpt"
_SCBERT_FILE = "panglao_pretrain.pth"
_TORCH_FILES = (".pth", ".pt", ".ckpt", ".bin")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_UPGRADE = "Upgrade with `pip install -U scfm`."


@dataclass(frozen=True)
class FolderKind:
    """A recognised model folder.

    layout: "scfm" (saved by this library) or "authors". config: the object in config.json, of scGPT's authors that
    in args.json. weights: the file that would be read. format_version: of scfm's layout, None for the authors'.
    """

    folder: Path
    layout: Literal["scfm", "authors"]
    family: str
    config: dict[str, Any]
    weights: Path
    format_version: int | None = None


def inspect_folder(
    path: str | Path, *, family: str | None = None, sha256: str | Mapping[str, str] | None = None
) -> FolderKind:
    """Recognise the model in a folder or beside a weights file; check its SHA-256 if one is pinned.

    Raises MissingFileError naming what was looked for; FormatError for an archive; VersionError for a
    folder from a newer scfm or of a family not known here; IntegrityError when a checksum differs.
    """
    path = Path(path)
    if path.name.lower().endswith(_ARCHIVES) and not path.is_dir():
        raise FormatError(
            "an archive, not a folder", path=path, hint="Unpack it yourself and give the folder."
        )
    if not path.exists():
        raise MissingFileError("no such file or folder", path=path)
    if family is not None and family not in FAMILIES:
        raise VersionError(_unknown(family), where="family", hint=_UPGRADE)
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    released = (
        _released_scgpt(path, folder, family)
        or _released_scfoundation(path, family)
        or _released_scbert(path, folder, family)
    )
    if released is not None:
        if sha256 is not None:
            check_sha256(released.weights, sha256)
        return released
    if not config_path.is_file():
        raise MissingFileError(
            f"no model in this folder; looked for config.json, scGPT's args.json, {_SCFOUNDATION_FILE} or "
            f"{_SCBERT_FILE}, and {', '.join(WEIGHT_FILES)}",
            path=folder,
        )
    config = load_json(config_path, max_bytes=MAX_CONFIG_BYTES)
    layout, found, version = _family_of(config, config_path)
    if family not in (None, found):
        raise FormatError(f"holds a {found} model, not {family}", path=folder)
    weights = _weights_in(folder) if path.is_dir() else path
    if sha256 is not None:
        check_sha256(weights, sha256)
    return FolderKind(folder, layout, found, config, weights, version)


def _released_scgpt(path: Path, folder: Path, family: str | None) -> FolderKind | None:
    """scGPT as its authors release it: args.json names the family, or else the caller does."""
    if (folder / "config.json").is_file() or family not in (None, "scgpt"):
        return None
    args_path = folder / "args.json"
    args = load_json(args_path, max_bytes=MAX_CONFIG_BYTES) if args_path.is_file() else {}
    if family is None and not all(key in args for key in _SCGPT_ARGS):
        return None
    return FolderKind(folder, "authors", "scgpt", args, _weights_in(folder) if path.is_dir() else path)


def _released_scfoundation(path: Path, family: str | None) -> FolderKind | None:
    """scFoundation as its authors release it: one file with its configuration, by their name or the caller's word."""
    if path.is_dir():
        file = path / _SCFOUNDATION_FILE
        if not file.is_file() or (path / "config.json").is_file():
            return None
    else:
        file = path
    ours = family == "scfoundation" and file.suffix in (".ckpt", ".pt", ".pth", ".bin")
    if not ours and (family is not None or file.name != _SCFOUNDATION_FILE):
        return None
    return FolderKind(file.parent, "authors", "scfoundation", {}, file)


def _released_scbert(path: Path, folder: Path, family: str | None) -> FolderKind | None:
    """scBERT as its authors save it: one torch file without anything beside it that says what it is."""
    if family not in (None, "scbert") or (folder / "config.json").is_file():
        return None
    if not path.is_dir():
        if path.suffix not in _TORCH_FILES or not (family or is_scbert(names_in(path))):
            return None
        return FolderKind(folder, "authors", "scbert", {}, path)
    files = [folder / _SCBERT_FILE] if (folder / _SCBERT_FILE).is_file() else []
    if not files and family is not None:
        files = sorted(folder.glob("*.pth"))
    if len(files) > 1:
        raise InvalidArgumentError(
            f"holds {len(files)} checkpoints: {', '.join(file.name for file in files[:5])}",
            path=folder,
            hint="Give the path of the one to load.",
        )
    return FolderKind(folder, "authors", "scbert", {}, files[0]) if files else None


def check_sha256(weights: Path, pinned: str | Mapping[str, str]) -> None:
    """Compare a weights file (one digest) or named files beside it (name -> digest) with what was pinned.

    Raises IntegrityError naming the file, what was found and what was expected.
    """
    if isinstance(pinned, str):
        if weights.name.endswith(".index.json"):
            raise InvalidArgumentError(
                "these weights are in several files; give their digests as {file name: sha256}",
                where="sha256",
            )
        pinned = {weights.name: pinned}
    for name, expected in pinned.items():
        file = weights.parent / name
        if not file.is_file():
            raise MissingFileError("its SHA-256 is pinned, and it is not there", path=file)
        found = file_sha256(file)
        if found != expected.strip().lower():
            raise IntegrityError(
                f"SHA-256 is {found}, pinned was {expected[:80]}",
                path=file,
                hint="The file was changed or is another version; download it again from a place you trust.",
            )


def _family_of(config: Mapping[str, Any], path: Path) -> tuple[Literal["scfm", "authors"], str, int | None]:
    section = config.get("scfm")
    if section is None:
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _FAMILY_OF_MODEL_TYPE:
            raise VersionError(_unknown(model_type), path=path, where="model_type", hint=_UPGRADE)
        return "authors", _FAMILY_OF_MODEL_TYPE[model_type], None
    if not isinstance(section, dict):
        raise FormatError(f"expected an object, found {type(section).__name__}", path=path, where="scfm")
    version, family = section.get("format_version"), section.get("family")
    if type(version) is not int or version < 1:
        raise FormatError(
            f"found {version!r:.60}, expected a positive integer", path=path, where="scfm.format_version"
        )
    if version > FORMAT_VERSION:
        raise VersionError(
            f"written by a newer scfm: folder format {version}, this one reads up to {FORMAT_VERSION}",
            path=path,
            hint=_UPGRADE,
        )
    if family not in FAMILIES:
        raise VersionError(_unknown(family), path=path, where="scfm.family", hint=_UPGRADE)
    return "scfm", family, version


def _unknown(family: object) -> str:
    return f"model family {family!r:.60} is not known here; known are {', '.join(FAMILIES)}"


def _weights_in(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise MissingFileError(
            f"a model's configuration but no weights; looked for {', '.join(WEIGHT_FILES)}", path=folder
        )
    return found
