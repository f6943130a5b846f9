"""Performer's tensor names in the authors' files, and ours.

    net.layers.3.0.fn.to_q.weight            layers.3.attention.to_q.weight
    net.layers.3.1.fn.fn.w1.weight           layers.3.ffn.w1.weight            (nano-scBERT: one fn fewer)
    net.blocks.3.f.net.norm.weight           layers.3.attention_norm.weight    (reversible)

Whatever stands before, such as ``performer.`` or ``decoder.performer.``, stays.
"""

from __future__ import annotations

import re

_LAYER = re.compile(r"\bnet\.layers\.(\d+)\.([01])\.")
_REVERSIBLE = re.compile(r"\bnet\.blocks\.(\d+)\.([fg])\.net\.")
_OURS = re.compile(r"\blayers\.(\d+)\.(attention_norm|attention|ffn_norm|ffn)\.")


def our_performer_name(name: str) -> str:
    """The authors' name of a tensor -> ours; names of other tensors stay as they are."""
    found = _LAYER.search(name) or _REVERSIBLE.search(name)
    if found is None:
        return name
    before, rest = name[: found.start()], name[found.end() :]
    part = "attention" if found[2] in "0f" else "ffn"
    if rest == "g" or rest.startswith("norm."):
        return f"{before}layers.{found[1]}.{part}_norm.{rest.removeprefix('norm.')}"
    rest = rest.removeprefix("fn.").removeprefix("fn.").removeprefix("fast_attention.")
    return f"{before}layers.{found[1]}.{part}.{rest}"


def their_performer_name(name: str, *, reversible: bool = False) -> str:
    """Our name of a tensor -> the authors'; names of other tensors stay as they are."""
    found = _OURS.search(name)
    if found is None:
        return name
    before, rest, number = name[: found.start()], name[found.end() :], found[1]
    part, _, is_norm = found[2].partition("_")
    letter = "01fg"[(part == "ffn") + 2 * reversible]
    home = (
        f"{before}net.blocks.{number}.{letter}.net."
        if reversible
        else f"{before}net.layers.{number}.{letter}."
    )
    if is_norm:
        return f"{home}{rest}" if rest == "g" else f"{home}norm.{rest}"
    if part == "ffn":
        return f"{home}fn.fn.{rest}"
    return f"{home}fn.fast_attention.{rest}" if rest == "projection_matrix" else f"{home}fn.{rest}"
