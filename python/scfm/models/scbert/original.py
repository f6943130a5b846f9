"""What a file of the authors says about its model: almost all of it is in the tensors' names and shapes.

What is not, their code took as keyword arguments of PerformerLM; they can be given as ``options``. Those that weights
do tell are checked against them, and those that change what a model computes and that scfm does not have are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scfm.errors import CheckpointError, ConfigError
from scfm.models.scbert.config import ScbertConfig
from scfm.tokenize.scbert_panel import ScbertPanel

# Arguments that change how the original runs, not what it computes in evaluation.
_WITHOUT_EFFECT = ("ff_chunks", "feature_redraw_interval", "auto_check_redraw")
# Arguments that only their default is computed for.
_ONLY = {
    "causal": False,
    "local_attn_heads": 0,
    "emb_dropout": 0.0,
    "ff_dropout": 0.0,
    "attn_dropout": 0.0,
    "cross_attend": False,
}
_TOLD = {
    "num_tokens": "num_token_ids",
    "dim": "hidden_size",
    "depth": "num_layers",
    "heads": "num_heads",
    "dim_head": "head_dim",
    "nb_features": "num_features",
    "ff_mult": "ffn_mult",
    "ff_glu": "glu",
    "reversible": "reversible",
    "qkv_bias": "qkv_bias",
    "g2v_position_emb": "gene2vec",
    "tie_embed": "tied_head",
}
_FREE = (
    "generalized_attention",
    "no_projection",
    "use_scalenorm",
    "use_rezero",
    "max_seq_len",
    "class_names",
)
_FIRST = "performer.layers.0"
_NO_POSITIONS = "the model was made without gene2vec (g2v_position_emb=False)"

Shapes = Mapping[str, tuple[int, ...]]


def config_of(
    shapes: Shapes,
    path: Path,
    panel: ScbertPanel | None,
    options: Mapping[str, Any] | None = None,
    *,
    reversible: bool = False,
) -> tuple[ScbertConfig, dict[str, str]]:
    """The config that these tensors (our names -> shapes) and options describe, and what the file lacks, with why.

    reversible: the file's names are those of the reversible variant.
    Raises CheckpointError where they are no scBERT's, ConfigError where options contradict them.
    """
    options = dict(options or {})
    num_token_ids, hidden_size = _shape(shapes, "token_emb.weight", 2, path)
    num_features, head_dim = _shape(shapes, f"{_FIRST}.attention.projection_matrix", 2, path)
    inner, _ = _shape(shapes, f"{_FIRST}.attention.to_q.weight", 2, path)
    ffn_in, _ = _shape(shapes, f"{_FIRST}.ffn.w1.weight", 2, path)
    _, ffn_out = _shape(shapes, f"{_FIRST}.ffn.w2.weight", 2, path)
    if inner % head_dim or ffn_out % hidden_size or ffn_in not in (ffn_out, 2 * ffn_out):
        raise CheckpointError(
            f"to_q has {inner} rows for heads of {head_dim}, the feed-forward {ffn_in} rows and {ffn_out} columns for "
            f"states of {hidden_size}: no scBERT has these",
            path=path,
        )
    has_classes = "annotation_head.fc3.weight" in shapes
    has_bins = not has_classes or "to_out.weight" in shapes
    config = ScbertConfig(
        num_genes=_num_positions(shapes, path, panel, options) - 1,
        num_token_ids=num_token_ids,
        hidden_size=hidden_size,
        num_layers=_num_layers(shapes),
        num_heads=inner // head_dim,
        head_dim=head_dim,
        num_features=num_features,
        ffn_mult=ffn_out // hidden_size,
        qkv_bias=f"{_FIRST}.attention.to_q.bias" in shapes,
        attention=_attention(options),
        norm=_norm(shapes),
        glu=ffn_in == 2 * ffn_out,
        reversible=reversible,
        gene2vec="pos_emb" in shapes,
        has_bin_head=has_bins,
        tied_head=has_bins and "to_out.weight" not in shapes,
        **_classes(shapes, options),
    )
    _check_options(options, config)
    return config, {} if config.gene2vec else {"pos_emb.emb.weight": _NO_POSITIONS}


def _shape(shapes: Shapes, name: str, dims: int, path: Path) -> tuple[int, ...]:
    found = shapes.get(name)
    if found is None or len(found) != dims or 0 in found:
        raise CheckpointError(
            f"{name} is {'missing' if found is None else list(found)}; every scBERT has it",
            path=path,
            hint="Is this another model's file?",
        )
    return found


def _num_layers(shapes: Shapes) -> int:
    numbers = {name.split(".")[2] for name in shapes if name.startswith("performer.layers.")}
    return len(numbers)


def _num_positions(shapes: Shapes, path: Path, panel: ScbertPanel | None, options: Mapping[str, Any]) -> int:
    if "pos_emb" in shapes:
        return _shape(shapes, "pos_emb", 2, path)[0]
    if "annotation_head.fc1.weight" in shapes:
        return _shape(shapes, "annotation_head.fc1.weight", 2, path)[1]
    if panel is not None:
        return len(panel) + 1
    given = options.get("max_seq_len")
    if type(given) is int:
        return given
    raise CheckpointError(
        "holds no gene2vec and no annotation head, so nothing tells how many genes it has",
        path=path,
        hint="Give genes=: the gene order that these weights were trained with.",
    )


def _norm(shapes: Shapes) -> Any:
    found = shapes.get(f"{_FIRST}.attention_norm.g")
    if found is None:
        return "layer"
    return "scale" if found == (1,) else "rezero"


def _attention(options: Mapping[str, Any]) -> Any:
    """Weights are alike for all three."""
    if options.get("no_projection"):
        return "unprojected"
    return "generalized" if options.get("generalized_attention") else "favor"


def _classes(shapes: Shapes, options: Mapping[str, Any]) -> dict[str, Any]:
    names = tuple(options.get("class_names") or ())
    if "annotation_head.fc3.weight" not in shapes:
        if names:
            raise ConfigError("the weights have no annotation head", where="class_names")
        return {}
    num_classes = shapes["annotation_head.fc3.weight"][0]
    wide = shapes.get("annotation_head.fc1.weight", (512,))[0]
    narrow = shapes.get("annotation_head.fc2.weight", (128,))[0]
    return {"num_classes": num_classes, "head_sizes": (wide, narrow), "class_names": names}


def _check_options(options: Mapping[str, Any], config: ScbertConfig) -> None:
    known = {*_WITHOUT_EFFECT, *_ONLY, *_TOLD, *_FREE}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(
            f"unknown arguments {unknown[:5]}; PerformerLM has {', '.join(sorted(known))}", where="options"
        )
    for name, only in _ONLY.items():
        if options.get(name, only) != only:
            raise ConfigError(
                f"found {options[name]!r:.60}; only {only!r} is computed here", where=f"options[{name!r}]"
            )
    told = {**{name: getattr(config, ours) for name, ours in _TOLD.items()}}
    told |= {
        "max_seq_len": config.num_positions,
        "use_scalenorm": config.norm == "scale",
        "use_rezero": config.norm == "rezero",
    }
    for name, found in told.items():
        given = options.get(name)
        if given is not None and given != found:
            raise ConfigError(
                f"found {given!r:.60}, but the weights say {found!r}", where=f"options[{name!r}]"
            )
