"""The model's state in a file of scBERT's authors: beside the optimizer's, or a bare state dict. Read safely."""

from __future__ import annotations

from pathlib import Path

from scfm.errors import FormatError, MissingFileError
from scfm.models.torch_file import load_torch_file
from scfm.models.weights import Weights, read_weights, weights_of

STATE_KEY = "model_state_dict"


def read_state(path: Path, *, trust_pickle: bool = False) -> Weights:
    """Raises MissingFileError, FormatError, CheckpointError or UnsafeCheckpointError."""
    if path.name.endswith((".safetensors", ".index.json")):
        return read_weights(path)
    if not path.is_file():
        raise MissingFileError("no such file", path=path)
    found = load_torch_file(path, trust_pickle=trust_pickle)
    if not isinstance(found, dict):
        raise FormatError(f"expected a dict of tensors, found {type(found).__name__}", path=path)
    return weights_of(found.get(STATE_KEY, found), path)


def names_in(path: Path) -> set[str]:
    """Names in a torch file, of its model's state or at its top; empty where there are none."""
    found = load_torch_file(path)
    if isinstance(found, dict) and isinstance(found.get(STATE_KEY), dict):
        found = found[STATE_KEY]
    return {name for name in found if isinstance(name, str)} if isinstance(found, dict) else set()
