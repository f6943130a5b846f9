"""scBERT's tensor names in the authors' files, and ours. The head of a fine-tuned file stands under ``to_out`` too."""

from __future__ import annotations

from collections.abc import Iterable

from scfm.models.nn.performer_names import our_performer_name, their_performer_name

COUNTER = "performer.calls_since_last_redraw"
REVERSIBLE = "performer.net.blocks."
_POSITIONS = ("pos_emb.emb.weight", "pos_emb")
_HEAD_PARTS = ("conv1", "fc1", "fc2", "fc3")
SIGNATURE = ("token_emb.weight", COUNTER)


def plain_name(name: str) -> str:
    """Without what DistributedDataParallel puts before a name."""
    return name.removeprefix("module.")


def our_name(name: str) -> str:
    """The authors' name -> ours."""
    name = plain_name(name)
    theirs, ours = _POSITIONS
    if name == theirs:
        return ours
    if name.startswith("to_out.") and name.split(".")[1] in _HEAD_PARTS:
        return f"annotation_head.{name.removeprefix('to_out.')}"
    return our_performer_name(name)


def their_name(name: str, *, reversible: bool = False) -> str:
    """Our name -> the authors'."""
    theirs, ours = _POSITIONS
    if name == ours:
        return theirs
    if name.startswith("annotation_head."):
        return f"to_out.{name.removeprefix('annotation_head.')}"
    return their_performer_name(name, reversible=reversible)


def is_scbert(names: Iterable[str]) -> bool:
    """Whether these are a scBERT's tensors and no other known family's."""
    plain = {plain_name(name) for name in names}
    has_features = any(name.endswith(".fast_attention.projection_matrix") for name in plain)
    return has_features and all(name in plain for name in SIGNATURE)
