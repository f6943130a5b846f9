"""The authors' tensor names and ours: one table, read in both directions.

    encoder.transformer_encoder.3.self_attn.in_proj_weight    layers.3.qkv.weight
    decoder.performer.net.layers.3.0.fn.to_q.weight           decoder.performer.layers.3.attention.to_q.weight
    decoder.norm   norm   decoder_embed   to_final            decoder.performer_norm   .norm   .embed   .to_final

``model.`` is what their training puts before a name.
"""

from __future__ import annotations

import re

from scfm.models.nn.performer_names import our_performer_name, their_performer_name

COUNTER = "decoder.performer.calls_since_last_redraw"
_IN_LAYER = {
    "self_attn.in_proj_weight": "qkv.weight",
    "self_attn.in_proj_bias": "qkv.bias",
    "self_attn.out_proj": "attention_out",
    "norm1": "attention_norm",
    "linear1": "ffn_in",
    "linear2": "ffn_out",
    "norm2": "ffn_norm",
}
_OF_LAYER = {ours: theirs for theirs, ours in _IN_LAYER.items()}
_MODULES = {
    "encoder.norm": "encoder_norm",
    "decoder_embed": "decoder.embed",
    "decoder.norm": "decoder.performer_norm",
    "norm": "decoder.norm",
    "to_final": "decoder.to_final",
}
_OF_MODULE = {ours: theirs for theirs, ours in _MODULES.items()}


def plain_name(name: str) -> str:
    """A name of the authors without what distributed training and their trainer put before it."""
    for prefix in ("module.", "model."):
        name = name.removeprefix(prefix)
    return name


def our_name(plain: str) -> str:
    """The name that a tensor has in our model, from its plain name."""
    found = re.fullmatch(r"encoder\.transformer_encoder\.(\d+)\.(.+)", plain)
    if found is not None:
        return f"layers.{found[1]}.{_translated(found[2], _IN_LAYER)}"
    return our_performer_name(_translated(plain, _MODULES))


def their_name(ours: str) -> str:
    """The plain name of one of our tensors."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", ours)
    if found is not None:
        return f"encoder.transformer_encoder.{found[1]}.{_translated(found[2], _OF_LAYER)}"
    return their_performer_name(_translated(ours, _OF_MODULE))


def _translated(name: str, table: dict[str, str]) -> str:
    """The name with its stem, or itself, looked up."""
    stem, _, kind = name.rpartition(".")
    return table[name] if name in table else f"{table[stem]}.{kind}" if stem in table else name
