"""The authors' tensor names and ours: one table, read in both directions.

Three layouts of the released files differ in the attention only: flash-attn 1 (``self_attn.Wqkv``), torch
(``self_attn.in_proj_weight``) and the wrapper of version 0.2.5 (``self_attn._impl.Wqkv``). The rows of query, key and
value lie in the same order in all of them, and in ours. ``module.`` is what distributed training puts before a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_IN_LAYER = {
    "self_attn.in_proj_weight": "qkv.weight",
    "self_attn.in_proj_bias": "qkv.bias",
    "self_attn.out_proj": "attention_out",
    "norm1": "attention_norm",
    "linear1": "ffn_in",
    "linear2": "ffn_out",
    "norm2": "ffn_norm",
}
_OURS = {ours: theirs for theirs, ours in _IN_LAYER.items()}
IGNORED = {
    "*num_batches_tracked": "a count of training batches: the momentum is fixed, so nothing depends on it",
}
# Modules that this engine computes, by the first part of the authors' names.
KNOWN_MODULES = frozenset(
    {
        "encoder",
        "flag_encoder",
        "value_encoder",
        "batch_encoder",
        "mod_encoder",
        "pert_encoder",
        "dsbn",
        "bn",
        "transformer_encoder",
        "decoder",
        "cls_decoder",
        "mvc_decoder",
        "impute_mvc_decoder",
        "grad_reverse_discriminator",
    }
)


def plain_name(name: str) -> str:
    """A name of any of the layouts in torch's layout: without ``module.`` and ``_impl.``, Wqkv as in_proj."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name.replace("self_attn._impl.", "self_attn.").replace("self_attn.Wqkv.", "self_attn.in_proj_")


def our_name(plain: str) -> str:
    """The name that a tensor has in our model, from its plain name."""
    found = re.fullmatch(r"transformer_encoder\.layers\.(\d+)\.(.+)", plain)
    if found is None:
        return plain
    index, rest = found.groups()
    if rest in _IN_LAYER:
        return f"layers.{index}.{_IN_LAYER[rest]}"
    stem, _, kind = rest.rpartition(".")
    return f"layers.{index}.{_IN_LAYER[stem]}.{kind}" if stem in _IN_LAYER else plain


def their_name(ours: str) -> str:
    """The plain name of one of our tensors."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", ours)
    if found is None:
        return ours
    index, rest = found.groups()
    stem, _, kind = rest.rpartition(".")
    theirs = _OURS[rest] if rest in _OURS else f"{_OURS[stem]}.{kind}"
    return f"transformer_encoder.layers.{index}.{theirs}"


def unknown_modules(plain_names: Iterable[str]) -> list[str]:
    """First parts of names that belong to no module of any released scGPT."""
    return sorted({name.partition(".")[0] for name in plain_names} - KNOWN_MODULES)
