"""scFoundation to and from disk: the authors' models.ckpt with its variants, and scfm's own folder.

models.ckpt is {"cell", "rde", "gene"} -> {"config", "state_dict"}; one of them alone is read too. The genes' order lies
beside it, or is given. scfm's folder is config.json (with an "scfm" section), model.safetensors under the authors'
tensor names, and the genes in the authors' file. Every tensor is loaded or the loading ends; nothing is ever left
random. Source: the authors' load.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm.data.atomic_file import whole_folder
from scfm.errors import CheckpointError, ConfigError, FormatError, InvalidArgumentError, MissingFileError
from scfm.models.folder import FORMAT_VERSION, FolderKind
from scfm.models.load_report import LoadReport, fit_state
from scfm.models.scfoundation.config import VARIANTS, ScfoundationConfig, merged_config
from scfm.models.scfoundation.model import Scfoundation
from scfm.models.scfoundation.names import COUNTER, our_name, plain_name, their_name
from scfm.models.scfoundation.records import RECORDS, plain
from scfm.models.torch_file import load_torch_file
from scfm.models.weights import Weights, read_weights, weights_of, write_safetensors
from scfm.tokenize.scfoundation_genes import GENES_FILE, ScfoundationGenes

__all__ = ["load_scfoundation", "save_scfoundation"]

_PARTS = {"config", "state_dict"}
_COUNTED = "a count of training steps since the projections were drawn, read by itself"
_PROJECTION = "decoder.performer.net.layers.0.0.fn.fast_attention.projection_matrix"
_FFN = "encoder.transformer_encoder.0.linear1.weight"


def load_scfoundation(
    found: FolderKind,
    *,
    variant: str | None = None,
    genes: str | Path | Iterable[str] | ScfoundationGenes | None = None,
    trust_pickle: bool = False,
) -> Scfoundation:
    """The model in the file or folder, float32 on the CPU, in evaluation mode, with ``load_report``.

    variant: "cell" (by default where the file holds several, as for the authors' embeddings), "rde" or "gene".
    genes: the list of genes where it does not lie beside the weights. Raises MissingFileError, InvalidArgumentError,
    ConfigError, CheckpointError, FormatError or UnsafeCheckpointError.
    """
    if found.layout == "scfm":
        config = _own_config(found)
        if variant not in (None, config.variant):
            raise InvalidArgumentError(
                f"{variant!r}; this folder holds {config.variant!r}", where="variant", path=found.folder
            )
        weights = read_weights(found.weights, trust_pickle=trust_pickle)
    else:
        config, weights = _of_authors(found.weights, variant, trust_pickle=trust_pickle)
    vocabulary = _genes(found.folder, genes, config, found.weights)
    with torch.device("meta"):
        model = Scfoundation(config, vocabulary)
    state, report = _fitted(model, weights)
    model.load_state_dict(state, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.load_report = report
    return model.eval()


def save_scfoundation(model: Scfoundation, folder: Path) -> Path:
    """Write scfm's folder; it appears whole under its name, or not at all."""
    with whole_folder(folder) as partial:
        state = {their_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
        write_safetensors(partial / "model.safetensors", state, {"format": "pt"})
        (partial / GENES_FILE).write_text(model.vocab.to_tsv(), encoding="utf-8")
        section = {
            "format_version": FORMAT_VERSION,
            "family": model.family,
            "config": model.config.to_dict(),
        }
        config = json.dumps({"model_type": model.family, "scfm": section}, indent=2)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
    return folder


def _own_config(found: FolderKind) -> ScfoundationConfig:
    path = found.folder / "config.json"
    section = found.config["scfm"].get("config")
    if not isinstance(section, dict):
        raise ConfigError("expected an object", path=path, where="scfm.config")
    return ScfoundationConfig.from_dict(section, path)


def _of_authors(path: Path, variant: str | None, *, trust_pickle: bool) -> tuple[ScfoundationConfig, Weights]:
    content = load_torch_file(path, trust_pickle=trust_pickle, records=RECORDS)
    name, model = _variant(content, variant, path)
    weights = weights_of(model["state_dict"], path)
    shapes = {plain_name(key): shape for key, shape in weights.shapes.items()}
    config = ScfoundationConfig.from_authors(
        merged_config(plain(model["config"], path), path),
        variant=name,
        num_features=_size(shapes, _PROJECTION, path),
        ffn_size=_size(shapes, _FFN, path),
        path=path,
    )
    return config, weights


def _variant(content: Any, variant: str | None, path: Path) -> tuple[str, dict[str, Any]]:
    """The variant's name and its {"config", "state_dict"}."""
    if not isinstance(content, dict):
        raise FormatError(f"expected a dict of models, found {type(content).__name__}", path=path)
    if set(content) >= _PARTS:  # one model alone; its name is not in the file
        return variant or "", content
    models = {
        name: model
        for name, model in dict.items(content)
        if type(name) is str and isinstance(model, dict) and set(model) >= _PARTS
    }
    if not models:
        raise FormatError(
            f"no scFoundation file: expected {', '.join(VARIANTS)}, each with config and state_dict; found "
            f"{sorted(map(str, content))[:5]}",
            path=path,
            hint="Give the authors' models.ckpt.",
        )
    chosen = variant or (VARIANTS[0] if VARIANTS[0] in models else next(iter(models)))
    if chosen not in models:
        raise InvalidArgumentError(
            f"{variant!r}; the file holds {', '.join(sorted(models))}",
            where="variant",
            path=path,
            hint='"cell" embeds cells, "rde" across read depths, "gene" gives expression and gene embeddings.',
        )
    return chosen, models[chosen]


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, path: Path) -> int:
    """Rows of a matrix that the configuration does not tell."""
    shape = shapes.get(name, ())
    if len(shape) != 2:
        raise CheckpointError("is missing or no matrix", path=path, where=f"tensor {name!r}")
    return int(shape[0])


def _genes(
    folder: Path,
    given: str | Path | Iterable[str] | ScfoundationGenes | None,
    config: ScfoundationConfig,
    weights: Path,
) -> ScfoundationGenes:
    if given is None:
        given = folder / GENES_FILE
        if not given.is_file():
            raise MissingFileError(
                f"the order of scFoundation's genes is not beside {weights.name}",
                path=given,
                hint=f"Put the authors' {GENES_FILE} there, or give it as genes= (--genes).",
            )
    genes = ScfoundationGenes.of(given)
    if genes.num_genes != config.num_genes:
        raise CheckpointError(
            f"{genes.num_genes:,} genes; {weights.name} has positions for {config.num_genes:,}",
            path=genes.source or None,
            where="genes",
            hint="Give the list of genes that came with these weights.",
        )
    return genes


def _fitted(model: Scfoundation, weights: Weights) -> tuple[dict[str, Tensor], LoadReport]:
    """Our state by our names, copied: tensors mapped from a file would follow whatever becomes of it."""
    expected = {
        their_name(name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if their_name(name) != COUNTER
    }
    state, report = fit_state(
        expected,
        weights,
        rename=plain_name,
        ignore={f"*{COUNTER}": _COUNTED},
        family=Scfoundation.family,
    )
    ours = {our_name(name): tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    return {**ours, our_name(COUNTER): _counter(weights)}, report


def _counter(weights: Weights) -> Tensor:
    name = next((name for name in weights if plain_name(name) == COUNTER), None)
    if name is None:
        return torch.tensor(0, dtype=torch.int64)
    counter = weights[name]
    if counter.dtype != torch.int64 or counter.numel() != 1 or int(counter) < 0:
        raise CheckpointError(
            "expected one whole number from 0", path=weights.source_file, where=f"tensor {name!r}"
        )
    return counter.reshape(()).clone()
