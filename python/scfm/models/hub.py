"""From a name to a folder on this machine: a local path, or a model on the Hugging Face hub.

Only what a model needs is fetched: its configuration, its weights (safetensors if there are any), scGPT's vocabulary
and Geneformer's dictionaries, which in the authors' repository lie beside the models. Never
``training_args.bin``, which is a pickle nobody needs. The commit is recorded, so that results can name
exactly what made them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from scfm.errors import InvalidArgumentError, MissingDependencyError, MissingFileError
from scfm.models.folder import check_sha256
from scfm.models.weights import WEIGHT_FILES

__all__ = ["ResolvedModel", "resolve"]

_DICTIONARY_STEMS = (
    "token_dictionary",
    "gene_median_dictionary",
    "ensembl_mapping_dict",
    "gene_name_id_dict",
)
_MODEL_FILES = ("config.json", "args.json", "vocab.json", "model.safetensors", "model.safetensors.index.json")
_SHARDS = "model-?????-of-?????.safetensors"
_TORCH_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-?????-of-?????.bin",
    "best_model.pt",
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)+")


@dataclass(frozen=True)
class ResolvedModel:
    """A model's folder, and where on the hub it came from: repo_id, revision (a commit) and subfolder."""

    folder: Path
    repo_id: str | None = None
    revision: str | None = None
    subfolder: str | None = None


def resolve(
    id_or_path: str | Path, *, revision: str | None = None, sha256: str | Mapping[str, str] | None = None
) -> ResolvedModel:
    """The folder (or weights file) that is meant: an existing path, else "owner/name[/subfolder]".

    revision: branch, tag or commit on the hub. sha256: digest of the weights file, or {file name: digest}.
    ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_ENDPOINT`` work as in huggingface_hub. Raises MissingFileError
    when there is no such path, model or connection; MissingDependencyError without huggingface_hub;
    IntegrityError when a checksum differs.
    """
    path = Path(id_or_path).expanduser()
    if path.exists():
        if revision is not None:
            raise InvalidArgumentError(f"{path} is a local path and has no revisions", where="revision")
        found = ResolvedModel(path)
    else:
        name = str(id_or_path)
        if isinstance(id_or_path, Path) or not _NAME.fullmatch(name):
            raise MissingFileError("no such folder, and not a model on the hub ('owner/name')", path=name)
        found = _from_hub(name, revision)
    if sha256 is not None:
        check_sha256(_weights_of(found.folder), sha256)
    return found


def _from_hub(name: str, revision: str | None) -> ResolvedModel:
    owner, repo, *rest = name.split("/")
    repo_id, subfolder = f"{owner}/{repo}", "/".join(rest)
    snapshot = _download(repo_id, revision, _patterns(subfolder, (*_MODEL_FILES, _SHARDS)), name)
    folder = snapshot / subfolder
    if folder.is_dir() and not any((folder / file).is_file() for file in WEIGHT_FILES):
        # Torch's own format only where there is nothing better: it is as large again, and a pickle.
        _download(repo_id, snapshot.name, _patterns(subfolder, _TORCH_FILES), name)
    if not any((folder / name).is_file() for name in ("config.json", "args.json")):
        raise MissingFileError(
            f"{repo_id} has neither config.json nor args.json in {subfolder or 'its root'}",
            path=name,
            hint="Name the model's own folder as 'owner/name/folder'.",
        )
    return ResolvedModel(folder, repo_id, snapshot.name, subfolder or None)


def _patterns(subfolder: str, files: tuple[str, ...]) -> list[str]:
    """What to fetch. The hub's ``*`` also matches ``/``, so each pattern begins with a folder or a stem."""
    prefix = f"{subfolder}/" if subfolder else ""
    stems = [f"{stem}*.{ending}" for stem in _DICTIONARY_STEMS for ending in ("pkl", "json", "json.gz")]
    folders = dict.fromkeys((prefix, "geneformer/", "geneformer/gene_dictionaries_30m/"))
    return [prefix + file for file in files] + [folder + stem for folder in folders for stem in stems]


def _download(repo_id: str, revision: str | None, patterns: list[str], name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is not a local folder; fetching it from the hub needs huggingface_hub",
            hint="Install it with `pip install scfm[hub]`.",
        ) from error
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=patterns, library_name="scfm")
        )
    except HFValidationError as error:
        raise InvalidArgumentError(str(error)[:300], where="id_or_path") from None
    except LocalEntryNotFoundError as error:
        _unavailable(name, error, "it is not in the local cache, and the hub cannot be asked (offline?)")
    except HfHubHTTPError as error:
        _unavailable(name, error, "the hub does not give it out")
    except (OSError, ValueError) as error:
        _unavailable(name, error, "it could not be fetched")


def _unavailable(name: str, error: Any, why: str) -> NoReturn:
    # The hub's own messages may quote request headers; the class says enough and leaks nothing.
    raise MissingFileError(
        f"no such folder here; as a model on the hub, {why} ({type(error).__name__})",
        path=name,
        hint="Check the name, the revision, the connection, and for gated models `hf auth login`.",
    ) from error


def _weights_of(path: Path) -> Path:
    if path.is_file():
        return path
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise MissingFileError(f"no weights to check; looked for {', '.join(WEIGHT_FILES)}", path=path)
    return found
