"""scBERT to and from disk: the authors' .pth files, and scfm's own folder.

A file of the authors is one torch pickle: pretraining's or fine-tuning's state with the optimizer's beside it, or a
bare state dict. gene2vec is in it; the order of its genes is not, and is looked for beside the file. scfm's folder is
config.json (with an "scfm" section), model.safetensors under the authors' tensor names, and genes.txt. Every tensor of
a file is loaded, or named in the report with the reason why not. Source: the released pretrain.py and finetune.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scfm.data.atomic_file import whole_folder
from scfm.errors import CheckpointError, ConfigError, InvalidArgumentError, MissingFileError
from scfm.models.folder import FORMAT_VERSION, FolderKind
from scfm.models.load_report import fit_state
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from scfm.models.scbert.names import COUNTER, REVERSIBLE, our_name, plain_name, their_name
from scfm.models.scbert.original import config_of
from scfm.models.scbert.state_file import read_state
from scfm.models.weights import Weights, write_safetensors
from scfm.tokenize.scbert_panel import PANEL_FILES, ScbertPanel

_GENES_FILE = "genes.txt"


def load_scbert(
    found: FolderKind,
    *,
    genes: str | Path | Sequence[str] | ScbertPanel | None = None,
    options: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
) -> Scbert:
    """The model, float32 on the CPU, in evaluation mode, with ``load_report``.

    genes: the gene order, where it does not lie beside the weights. options: keyword arguments of the original's
    PerformerLM that its weights do not tell, and "class_names" of an annotation head.
    Raises MissingFileError, ConfigError, CheckpointError, FormatError or UnsafeCheckpointError.
    """
    weights = _apart(read_state(found.weights, trust_pickle=trust_pickle))
    if found.layout == "scfm":
        if options:
            raise InvalidArgumentError(
                "a folder saved by scfm says everything itself", where="options", path=found.folder
            )
        config, absent = _own_config(found), dict[str, str]()
        panel = ScbertPanel.of(genes) if genes is not None else _own_panel(found.folder)
    else:
        panel = ScbertPanel.beside(found.folder) if genes is None else ScbertPanel.of(genes)
        shapes = {our_name(name): shape for name, shape in weights.shapes.items()}
        reversible = any(REVERSIBLE in name for name in weights)
        config, absent = config_of(shapes, weights.source_file, panel, options, reversible=reversible)
        if panel is None:
            raise _without_genes(found.weights, config.num_genes)
    if panel is not None and len(panel) != config.num_genes:
        raise CheckpointError(
            f"{len(panel):,} genes; the weights in {found.weights.name} have {config.num_genes:,} positions and a slot",
            path=panel.source or None,
            where="genes",
            hint="Give the gene order that these weights were trained with.",
        )
    with torch.device("meta"):
        model = Scbert(config, panel)
    expected = {_theirs(name, config): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state, report = fit_state(
        expected, weights, rename=lambda name: _theirs(our_name(name), config), family=Scbert.family
    )
    # Copies: tensors mapped from a file would follow whatever becomes of it.
    ours = {our_name(name): _as_kept(name, tensor) for name, tensor in state.items()}
    model.load_state_dict(ours, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != "pos_emb")
    model.load_report = replace(report, missing={**report.missing, **absent})
    return model.eval()


def save_scbert(model: Scbert, folder: Path) -> Path:
    """Write scfm's folder; it appears whole under its name, or not at all."""
    with whole_folder(folder) as partial:
        state = {_theirs(name, model.config): tensor.detach() for name, tensor in model.state_dict().items()}
        write_safetensors(partial / "model.safetensors", state, {"format": "pt"})
        if model.vocab is not None:
            (partial / _GENES_FILE).write_text("\n".join(model.vocab.genes) + "\n", encoding="utf-8")
        section = {
            "format_version": FORMAT_VERSION,
            "family": model.family,
            "config": model.config.to_dict(),
        }
        config = json.dumps({"model_type": "scbert", "scfm": section}, indent=2)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
    return folder


def _theirs(name: str, config: ScbertConfig) -> str:
    return their_name(name, reversible=config.reversible)


def _own_config(found: FolderKind) -> ScbertConfig:
    path = found.folder / "config.json"
    section = found.config["scfm"].get("config")
    if not isinstance(section, dict):
        raise ConfigError("expected an object", path=path, where="scfm.config")
    return ScbertConfig.from_dict(section, path)


def _own_panel(folder: Path) -> ScbertPanel | None:
    path = folder / _GENES_FILE
    return ScbertPanel.from_file(path) if path.is_file() else None


def _apart(weights: Weights) -> Weights:
    """The weights with nano-scBERT's joined to_qkv as three, and the counter in a dtype that weights have."""
    changed: dict[str, Tensor] = {}
    for name in weights:
        if plain_name(name) == COUNTER:
            changed[name] = weights[name].double()
        elif ".to_qkv." in name:
            joined = weights[name]
            if len(joined) % 3:
                raise CheckpointError(
                    f"{len(joined):,} rows cannot be query, key and value",
                    path=weights.source_file,
                    where=f"tensor {name!r}",
                )
            for letter, part in zip("qkv", joined.chunk(3), strict=True):
                changed[name.replace(".to_qkv.", f".to_{letter}.")] = part
        else:
            continue
    kept = {name: weights[name] for name in weights if name not in changed and ".to_qkv." not in name}
    return Weights(weights.source, [kept, changed])


def _as_kept(name: str, tensor: Tensor) -> Tensor:
    """A copy in the dtype that the model computes with; gene2vec keeps its own, the counter is whole."""
    if name == COUNTER:
        return tensor.to(torch.int64)
    if our_name(name) == "pos_emb":
        kept = tensor if tensor.dtype == torch.float64 else tensor.float()
        return nn.Parameter(kept.clone(), requires_grad=False)
    return tensor.to(torch.float32, copy=True)


def _without_genes(weights: Path, num_genes: int) -> MissingFileError:
    return MissingFileError(
        f"the order of these weights' {num_genes:,} genes is not beside them; looked for {', '.join(PANEL_FILES)}, "
        "here and in data/",
        path=weights.parent,
        where="genes",
        hint="Give genes=: the authors' panglao_human.h5ad (its var_names are the order), a text file with a symbol a "
        "line, or a list.",
    )
