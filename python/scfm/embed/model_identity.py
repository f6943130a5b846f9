"""What makes two models give the same embeddings: weights, configuration and tokenizer, as hashes.

Where a model lies does not matter, so a run can be resumed from a copy of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, is_dataclass
from typing import Any

from scfm.models.base import FoundationModel

__all__ = ["model_identity"]

_PLACES = ("dictionaries", "vocab")  # where files lie; what they say is hashed


def model_identity(model: FoundationModel) -> dict[str, str]:
    """family, weights_sha256, config_sha256, tokenizer_sha256, and sha256 over these."""
    weights = "" if model.load_report is None else model.load_report.weights_sha256
    config: Any = model.config
    config = asdict(config) if is_dataclass(config) and not isinstance(config, type) else vars(config)
    settings = {key: value for key, value in model.tokenizer.describe().items() if key not in _PLACES}
    to_json = getattr(model.vocab, "to_json", None)
    vocabulary = to_json() if callable(to_json) else getattr(model.vocab, "token", "")
    facts = {
        "family": model.family,
        "weights_sha256": weights or _state_sha256(model),
        "config_sha256": _sha256(config),
        "tokenizer_sha256": _sha256({"settings": settings, "vocabulary": vocabulary}),
    }
    return {**facts, "sha256": _sha256(facts)}


def _sha256(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _state_sha256(model: FoundationModel) -> str:
    """For a model that came from no file: its tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()
