"""Geneformer to and from disk: the authors' folders, and scfm's own.

scfm's folder is config.json (with an "scfm" section), model.safetensors under the authors' tensor names, and
vocab.json; Hugging Face's BertForMaskedLM opens it too. Every tensor of a file is loaded, or named in the
report with the reason why not. Source: the released Geneformer-V1 and -V2 folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from scfm.data.atomic_file import whole_folder
from scfm.data.safe_pickle import load_json
from scfm.errors import CheckpointError, ConfigError, MissingFileError
from scfm.models.folder import FORMAT_VERSION
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.models.geneformer.names import HEAD_PREFIX, IGNORED, TIED, authors_shapes, from_authors, to_authors
from scfm.models.load_report import fit_state
from scfm.models.weights import Weights, read_weights, write_safetensors
from scfm.tokenize.dictionaries import GeneformerDictionaries

_NO_HEAD = "the file holds an encoder without a masked-gene head"


def load_geneformer(
    folder: Path,
    weights_file: Path | None = None,
    *,
    dictionaries: str | Path | GeneformerDictionaries | None = None,
    version: str | None = None,
    trust_pickle: bool = False,
) -> Geneformer:
    """The model in ``folder``, float32 on the CPU, in evaluation mode, with ``load_report``.

    Raises MissingFileError, ConfigError, CheckpointError, FormatError or UnsafeCheckpointError.
    """
    config, saved_version = read_config(folder)
    if version is None:
        version = saved_version
    vocab = GeneformerDictionaries.find(folder, dictionaries, version, vocab_size=config.vocab_size)
    weights = read_weights(weights_file or folder, trust_pickle=trust_pickle)
    has_head = any(name.startswith(HEAD_PREFIX) for name in weights)
    state, report = fit_state(
        authors_shapes(config),
        weights,
        rename=_with_prefix if not any(name.startswith("bert.") for name in weights) else None,
        ignore=IGNORED,
        optional=None if has_head else {f"{HEAD_PREFIX}*": _NO_HEAD},
        family=Geneformer.family,
    )
    _check_tied(weights)
    with torch.device("meta"):
        model = Geneformer(config, vocab, version)
    if not has_head:
        model.head = None
    # Copies: tensors mapped from a file would follow whatever becomes of it.
    ours = {name: tensor.to(torch.float32, copy=True) for name, tensor in from_authors(state).items()}
    model.load_state_dict(ours, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.load_report = report
    return model.eval()


def read_config(folder: Path) -> tuple[GeneformerConfig, str | None]:
    """The shape, and in scfm's own folder the version ("V1" or "V2") that the model was saved as."""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError("no config.json in the model's folder", path=folder)
    content = load_json(path)
    version = content.get("scfm", {}).get("version") if isinstance(content.get("scfm"), dict) else None
    if version not in (None, "V1", "V2"):
        raise ConfigError(f'{version!r}; expected "V1" or "V2"', path=path, where="scfm.version")
    return GeneformerConfig.from_hf(content, path), version


def save_geneformer(model: Geneformer, folder: Path) -> Path:
    """Write scfm's folder; it appears whole under its name, or not at all."""
    with whole_folder(folder) as partial:
        state = to_authors({name: tensor.detach() for name, tensor in model.state_dict().items()})
        write_safetensors(partial / "model.safetensors", state, {"format": "pt"})
        if model.vocab is not None:
            (partial / "vocab.json").write_text(model.vocab.to_json(), encoding="utf-8")
        config = json.dumps({**model.config.to_hf(), "scfm": _own_section(model)}, indent=2)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
    return folder


def _own_section(model: Geneformer) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "family": model.family, "version": model.version}


def _with_prefix(name: str) -> str:
    """A bare BertModel's names lack the "bert." that BertForMaskedLM puts before them."""
    return name if name.startswith(HEAD_PREFIX) else f"bert.{name}"


def _check_tied(weights: Weights) -> None:
    """Tied tensors that a file stores twice must agree: the model has one of each."""
    for copy, original in TIED.items():
        if copy in weights and original in weights and not torch.equal(weights[copy], weights[original]):
            raise CheckpointError(
                f"differs from {original}, to which Geneformer ties it",
                path=weights.source_file,
                where=copy,
            )
