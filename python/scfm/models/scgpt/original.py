"""The config of a released scGPT: what args.json says, what the weights hold, and what neither can tell.

args.json is the pretraining script's, the model's constructor took other names, and most heads are named in neither:
their tensors are there or they are not. So the weights say what they can; whoever says otherwise is contradicted by
name; and what cannot be seen in weights (attention heads, pooling, thresholds) comes from, in this order,

    1. ``options=`` of scfm.load, keyword arguments of the original's constructor: {"cell_emb_style": "avg-pool"}
    2. model_kwargs.json beside the weights, the same as a file
    3. args.json
    4. the constructor's defaults, so that older releases with fewer arguments load

Source: args.json of the released models; TransformerModel and its relatives' constructors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from scfm.errors import CheckpointError, ConfigError
from scfm.models.scgpt.config import ScgptConfig

__all__ = ["Source", "config_of"]

# The pretraining script's arguments and the constructor's: their names for our fields.
ARGS = {
    "embsize": "hidden_size",
    "nheads": "num_heads",
    "d_hid": "ffn_size",
    "nlayers": "num_layers",
    "n_layers_cls": "num_class_layers",
    "dropout": "dropout",
    "pad_token": "pad_token",
    "pad_value": "pad_value",
    "mask_value": "mask_value",
    "n_bins": "num_bins",
    "max_seq_len": "max_tokens",
    "input_style": "input_style",
    "input_emb_style": "value_style",
}
KWARGS = {
    "ntoken": "vocab_size",
    "d_model": "hidden_size",
    "nhead": "num_heads",
    "d_hid": "ffn_size",
    "nlayers": "num_layers",
    "nlayers_cls": "num_class_layers",
    "n_cls": "num_classes",
    "dropout": "dropout",
    "pad_token": "pad_token",
    "pad_value": "pad_value",
    "do_mvc": "has_mvc",
    "do_dab": "adversary",
    "use_batch_labels": "use_batch_labels",
    "num_batch_labels": "num_batch_labels",
    "domain_spec_batchnorm": "batch_norm",
    "input_emb_style": "value_style",
    "n_input_bins": "num_value_ids",
    "cell_emb_style": "cell_style",
    "mvc_decoder_style": "mvc_style",
    "ecs_threshold": "ecs_threshold",
    "explicit_zero_prob": "explicit_zeros",
    "pre_norm": "pre_norm",
    "use_mod": "has_modalities",
    "ntokens_mod": "num_modalities",
    "pert_pad_id": "pert_pad_id",
    "decoder_activation": "decoder_activation",
    "decoder_adaptive_bias": "adaptive_bias",
    # Not the constructor's, but as useless to guess.
    "max_seq_len": "max_tokens",
    "n_bins": "num_bins",
    "mask_value": "mask_value",
    "input_style": "input_style",
}
_WITHOUT_EFFECT = {"use_fast_transformer", "vocab", "vocab_mod", "use_generative_training"}
# What a tensor's shape cannot contradict: absent heads make these idle.
_IDLE_UNLESS = {
    "num_batch_labels": ("adversary", "use_batch_labels", "domain"),
    "num_class_layers": ("has_cls",),
    "num_value_ids": ("category",),
    "num_modalities": ("has_modalities",),
}
_NO_HEAD = "the file holds none; nothing is left random, and reading it raises an error"


@dataclass(frozen=True)
class Source:
    """Something that states facts: a file or an argument. names: its keys for our fields."""

    label: str
    content: Mapping[str, Any]
    names: Mapping[str, str]
    path: Path | None = None

    def facts(self) -> dict[str, Any]:
        return {self.names[key]: value for key, value in self.content.items() if key in self.names}

    def key_of(self, name: str) -> str:
        return next(key for key, ours in self.names.items() if ours == name and key in self.content)


@dataclass
class _Seen:
    """What the shapes of the tensors show."""

    facts: dict[str, Any]
    shown: dict[str, str] = field(default_factory=dict)

    def show(self, name: str, value: Any, tensor: str) -> None:
        """One fact and the tensor that shows it; two tensors that show different things raise ValueError."""
        if name in self.shown and self.facts[name] != value:
            raise ValueError(f"{self.shown[name]} shows {name} {self.facts[name]}, {tensor} shows {value}")
        self.facts[name], self.shown[name] = value, tensor


def config_of(
    shapes: Mapping[str, tuple[int, ...]],
    weights_path: Path,
    *,
    args: Source | None,
    kwargs: list[Source],
) -> tuple[ScgptConfig, dict[str, str]]:
    """The config, and heads that were announced but are absent -> why that is right.

    shapes: plain tensor name (see names.py) -> shape. kwargs: the constructor's arguments, the weightiest first.
    Raises CheckpointError naming the argument that the weights contradict, ConfigError for values out of bounds.
    """
    try:
        seen = _see(shapes)
    except ValueError as error:
        raise CheckpointError(f"tensors contradict each other: {error}", path=weights_path) from None
    for source in kwargs:
        _check_keys(source)
    stated: dict[str, tuple[Any, Source]] = {}
    for source in (*kwargs, *([] if args is None else [args])):
        for name, value in source.facts().items():
            stated.setdefault(name, (_normal(name, value), source))
    for name, (value, source) in stated.items():
        _expect_not_contradicted(name, value, source, seen, weights_path)
    if "num_heads" not in stated:
        raise ConfigError(
            "the number of attention heads cannot be seen in weights, and nothing says it",
            path=weights_path,
            where="nheads",
            hint='Put args.json beside the weights, or pass options={"nhead": 8} to scfm.load.',
        )
    return _config(seen, stated), _absent(seen, stated, args)


def _see(shapes: Mapping[str, tuple[int, ...]]) -> _Seen:
    """Facts by our field names, and some that only say whether a part is there."""
    table = "encoder.embedding.weight"
    if len(shapes.get(table, ())) != 2:
        raise ValueError(f"there is no {table} of two dimensions: not a scGPT checkpoint")
    seen = _Seen({})
    seen.show("vocab_size", shapes[table][0], table)
    seen.show("hidden_size", shapes[table][1], table)
    seen.show(
        "num_layers", _count(shapes, r"transformer_encoder\.layers\.(\d+)\."), "transformer_encoder.layers"
    )
    sized = {
        "ffn_size": ("transformer_encoder.layers.0.linear1.weight", 0),
        "num_classes": ("cls_decoder.out_layer.weight", 0),
        "num_modalities": ("mod_encoder.embedding.weight", 0),
        "num_value_ids": ("value_encoder.embedding.weight", 0),
    }
    for name, (tensor, dimension) in sized.items():
        if len(shapes.get(tensor, ())) == 2:
            seen.show(name, shapes[tensor][dimension], tensor)
    for tensor in ("batch_encoder.embedding.weight", "grad_reverse_discriminator.out_layer.weight"):
        if len(shapes.get(tensor, ())) == 2:
            seen.show("num_batch_labels", shapes[tensor][0], tensor)
    parts = {
        "adversary": "grad_reverse_discriminator.",
        "use_batch_labels": "batch_encoder.",
        "has_cls": "cls_decoder.",
        "has_mvc": "mvc_decoder.",
        "has_modalities": "mod_encoder.",
        "has_flags": "flag_encoder.",
        "has_imputation": "impute_mvc_decoder.",
        "perturbation": "pert_encoder.",
        "domain": "dsbn.",
        "category": "value_encoder.embedding.",
    }
    for name, prefix in parts.items():
        seen.show(name, any(tensor.startswith(prefix) for tensor in shapes), prefix.rstrip("."))
    if seen.facts["domain"]:
        seen.show("num_batch_labels", _count(shapes, r"dsbn\.bns\.(\d+)\."), "dsbn.bns")
    _see_styles(shapes, seen)
    return seen


def _see_styles(shapes: Mapping[str, tuple[int, ...]], seen: _Seen) -> None:
    plain = any(tensor.startswith("bn.") for tensor in shapes)
    seen.show("batch_norm", "domain" if seen.facts["domain"] else "plain" if plain else None, "bn or dsbn")
    seen.show("explicit_zeros", any("zero_logit" in tensor for tensor in shapes), "zero_logit")
    if seen.facts["has_cls"]:
        seen.show(
            "num_class_layers",
            _count(shapes, r"cls_decoder\._decoder\.(\d+)\.") // 3 + 1,
            "cls_decoder._decoder",
        )
    experts = _count(shapes, r"decoder\.moe\.experts\.(\d+)\.")
    seen.show("num_experts", experts, "decoder.moe.experts")
    continuous = "value_encoder.linear1.weight" in shapes
    style = "category" if seen.facts["category"] else "continuous" if continuous else "scaling"
    seen.show("value_style", style, "value_encoder")
    query = shapes.get("mvc_decoder.gene2query.weight", ())
    seen.show(
        "joint_mvc", len(query) == 2 and query[1] == 2 * seen.facts["hidden_size"], "mvc_decoder.gene2query"
    )
    inner = shapes.get("mvc_decoder.fc1.weight", ())
    if len(inner) == 2 and len(query) == 2:
        style = "concat query" if inner[1] == 2 * query[1] else "sum query"
    else:
        style = "inner product"
    seen.show("mvc_style", style if seen.facts["has_mvc"] else None, "mvc_decoder")


def _normal(name: str, value: Any) -> Any:
    """A stated value in our terms."""
    if name == "batch_norm" and (isinstance(value, bool) or value in ("dsbn", "batchnorm")):
        return {False: None, True: "domain", "dsbn": "domain", "batchnorm": "plain"}[value]
    if name in ("pad_value", "mask_value") and type(value) is int:
        return float(value)
    return value


def _expect_not_contradicted(name: str, value: Any, source: Source, seen: _Seen, weights_path: Path) -> None:
    if name not in seen.facts or (name == "num_classes" and not seen.facts["has_cls"]):
        return  # a constructor always builds a classifier, and the released files hold none
    if name in _IDLE_UNLESS and not any(seen.facts[part] for part in _IDLE_UNLESS[name]):
        return
    found = seen.facts[name]
    if name == "mvc_style":
        if found is None or (isinstance(value, str) and value.removesuffix(", detach") == found):
            return
    elif value == found and isinstance(value, bool) == isinstance(found, bool):
        return
    raise CheckpointError(
        f"{source.label} says {source.key_of(name)} = {value!r:.60}; the weights have {found!r:.60} "
        f"({seen.shown[name]})",
        path=weights_path,
        where=source.key_of(name),
        hint="The arguments belong to another model; correct them, or pass options= to scfm.load.",
    )


def _check_keys(source: Source) -> None:
    unknown = sorted(set(source.content) - set(source.names) - _WITHOUT_EFFECT - {"fast_transformer_backend"})
    if unknown:
        raise ConfigError(
            f"no argument of the original's constructor: {unknown[:5]}",
            path=source.path,
            where=source.label,
            hint=f"Known are {', '.join(sorted(source.names))}.",
        )
    if source.content.get("fast_transformer_backend", "flash") != "flash":
        raise ConfigError(
            "only softmax attention is computed here, as in every released model",
            path=source.path,
            where="fast_transformer_backend",
        )


def _config(seen: _Seen, stated: Mapping[str, tuple[Any, Source]]) -> ScgptConfig:
    ours = {item.name for item in fields(ScgptConfig)}
    values = {name: value for name, (value, _) in stated.items() if name in ours}
    style = values.get("mvc_style")
    values |= {name: value for name, value in seen.facts.items() if name in ours}
    if seen.facts["has_mvc"] and style is not None:
        values["mvc_style"] = style
    if not seen.facts["has_cls"]:
        values["num_classes"] = 0
    if seen.facts["value_style"] == "category":
        # The original gives padding and mask the ids behind the bins; args.json keeps the continuous models' values.
        ids = range(seen.facts["num_value_ids"])
        for name, behind in (("pad_value", 2), ("mask_value", 1)):
            if values.get(name) not in ids:
                values[name] = float(len(ids) - behind)
    if seen.facts["perturbation"] and values.get("num_value_ids"):
        raise ConfigError(
            "the perturbation generator takes values as they are; binning them on the way in is not done here",
            path=stated["num_value_ids"][1].path,
            where="n_input_bins",
        )
    for name in ("num_modalities", "num_value_ids"):
        values[name] = seen.facts.get(name, 0)
    values["num_batch_labels"] = seen.facts.get("num_batch_labels", 0)
    try:
        return ScgptConfig(**values)
    except ConfigError as error:
        if error.where is not None and error.where in stated:
            source = stated[error.where][1]
            where = source.key_of(error.where)
            raise ConfigError(error.message, path=source.path or source.label, where=where) from None
        raise


def _absent(seen: _Seen, stated: Mapping[str, tuple[Any, Source]], args: Source | None) -> dict[str, str]:
    """Heads that somebody announced and the weights lack."""
    absent = {}
    classes, _ = stated.get("num_classes", (0, None))
    announced = args is not None and args.content.get("USE_CLS") is True
    if not seen.facts["has_cls"] and (announced or classes):
        absent["cls_decoder.*"] = _NO_HEAD
    if not seen.facts["has_mvc"] and args is not None and args.content.get("MVC") is True:
        absent["mvc_decoder.*"] = _NO_HEAD
    return absent


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the largest index that the pattern finds in names; 0 for none."""
    found = [int(match[1]) for match in map(re.compile(pattern).match, shapes) if match and len(match[1]) < 6]
    return max(found, default=-1) + 1
