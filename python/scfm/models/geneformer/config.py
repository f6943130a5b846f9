"""The shape of a Geneformer: what its config.json says, checked before anything is allocated.

The authors' models are Hugging Face BertForMaskedLM with relu, absolute positions and a tied head. A
config.json may come from anywhere, so every number has bounds and every switch that would change the
arithmetic must have the value that this engine computes; nothing in it is imported or followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scfm.errors import ConfigError

__all__ = ["GeneformerConfig"]

_BOUNDS = {
    "num_layers": (1, 200),
    "hidden_size": (1, 16_384),
    "num_heads": (1, 16_384),
    "ffn_size": (1, 131_072),
    "max_tokens": (1, 1_000_000),
    "vocab_size": (2, 10_000_000),
    "type_vocab_size": (1, 1_000),
}
MAX_PARAMETERS = 20_000_000_000
# Each field's name in the file, and what BertConfig takes where the file is silent (None: required).
_HF_NAMES: dict[str, tuple[str, Any]] = {
    "num_layers": ("num_hidden_layers", None),
    "hidden_size": ("hidden_size", None),
    "num_heads": ("num_attention_heads", None),
    "ffn_size": ("intermediate_size", None),
    "max_tokens": ("max_position_embeddings", None),
    "vocab_size": ("vocab_size", None),
    "hidden_dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "initializer_range": ("initializer_range", 0.02),
    "activation": ("hidden_act", "gelu"),
    "type_vocab_size": ("type_vocab_size", 2),
    "pad_token_id": ("pad_token_id", 0),
}
# Switches of BertConfig that change the arithmetic, with the only value that is computed here.
_HF_FIXED: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "quantization_config": None,
}
_HF_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")


@dataclass(frozen=True)
class GeneformerConfig:
    """The architecture of one Geneformer.

    num_layers, hidden_size, num_heads, ffn_size: the encoder. max_tokens: most tokens a cell may have.
    vocab_size: rows of the token embedding. hidden_dropout, attention_dropout: in training only.
    activation: of the feed-forward network and the head's transform. Raises ConfigError naming the field,
    what was found and what is possible.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    max_tokens: int
    vocab_size: int
    hidden_dropout: float = 0.02
    attention_dropout: float = 0.02
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    activation: Literal["relu", "gelu"] = "relu"
    type_vocab_size: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            _expect_int(name, getattr(self, name), low, high)
        _expect_int("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)
        for name in ("hidden_dropout", "attention_dropout"):
            _expect_number(name, getattr(self, name), 0.0, 1.0, includes_low=True)
        _expect_number("layer_norm_eps", self.layer_norm_eps, 0.0, 1.0)
        _expect_number("initializer_range", self.initializer_range, 0.0, 100.0)
        if self.activation not in ("relu", "gelu"):
            raise ConfigError(f"found {self.activation!r}, expected 'relu' or 'gelu'", where="activation")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{self.num_heads} heads do not divide a hidden size of {self.hidden_size}", where="num_heads"
            )
        if self.num_parameters() > MAX_PARAMETERS:
            raise ConfigError(f"{self.num_parameters():,} parameters; the limit is {MAX_PARAMETERS:,}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def num_parameters(self) -> int:
        """Parameters with the masked-token head; its matrix is the token embedding, counted once."""
        hidden, ffn = self.hidden_size, self.ffn_size
        norm = 2 * hidden
        rows = self.vocab_size + self.max_tokens + self.type_vocab_size
        layer = 4 * (hidden + 1) * hidden + norm + (hidden + 1) * ffn + (ffn + 1) * hidden + norm
        head = (hidden + 1) * hidden + norm + self.vocab_size
        return rows * hidden + norm + self.num_layers * layer + head

    @classmethod
    def preset(cls, name: str, vocab_size: int | None = None) -> GeneformerConfig:
        """The authors' architecture ``name``: "V1-10M", "V1-12L", "V2-104M" or "V2-316M".

        ``vocab_size`` replaces the authors' (25,426 in V1, 20,275 in V2) for another vocabulary.
        """
        if name not in _PRESETS:
            raise ConfigError(f"found {name!r}, expected one of {', '.join(_PRESETS)}", where="preset")
        config = _PRESETS[name]
        return config if vocab_size is None else replace(config, vocab_size=vocab_size)

    @classmethod
    def from_hf(cls, found: Mapping[str, Any], path: str | Path | None = None) -> GeneformerConfig:
        """The architecture that a Hugging Face BertConfig (the object in config.json) describes.

        ``path`` is only named in errors. Keys that do not touch the arithmetic are passed over; those that
        would run code or change the model into another raise ConfigError.
        """
        for key in _HF_CODE:
            if found.get(key):
                raise ConfigError(
                    "a model that brings its own code is not loaded",
                    path=path,
                    where=key,
                    hint="Remove the key.",
                )
        if found.get("model_type") != "bert":
            raise ConfigError(
                f"found {found.get('model_type')!r}, expected 'bert'", path=path, where="model_type"
            )
        for key, only in _HF_FIXED.items():
            if key in found and (found[key] or None) != (only or None):
                raise ConfigError(f"found {found[key]!r:.80}, expected {only!r}", path=path, where=key)
        values: dict[str, Any] = {}
        for field, (key, default) in _HF_NAMES.items():
            if default is None and key not in found:
                raise ConfigError("is missing", path=path, where=key)
            values[field] = found.get(key, default)
        try:
            return cls(**values)
        except ConfigError as error:
            where = _HF_NAMES[error.where][0] if error.where in _HF_NAMES else error.where
            raise ConfigError(error.message, path=path, where=where) from None

    def to_hf(self) -> dict[str, Any]:
        """A config.json with which Hugging Face's BertForMaskedLM opens the model."""
        named = {key: getattr(self, field) for field, (key, _) in _HF_NAMES.items()}
        return {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            **named,
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value."""
        return asdict(self)


def _expect_int(name: str, found: Any, low: int, high: int) -> None:
    if type(found) is not int or not low <= found <= high:
        raise ConfigError(f"found {found!r:.60}, expected an integer from {low:,} to {high:,}", where=name)


def _expect_number(name: str, found: Any, low: float, high: float, *, includes_low: bool = False) -> None:
    number = type(found) is int or (type(found) is float and math.isfinite(found))
    if not number or not (low < found < high or (includes_low and found == low)):
        bracket = "[" if includes_low else "("
        raise ConfigError(
            f"found {found!r:.60}, expected a number in {bracket}{low:g}, {high:g})", where=name
        )


_V1 = GeneformerConfig(6, 256, 4, 512, max_tokens=2048, vocab_size=25_426)
_V2 = GeneformerConfig(
    12, 768, 12, 3072, max_tokens=4096, vocab_size=20_275, hidden_dropout=0.1, attention_dropout=0.1
)
_PRESETS = {
    "V1-10M": _V1,
    "V1-12L": replace(_V1, num_layers=12, hidden_size=512, num_heads=8, ffn_size=1024),
    "V2-104M": _V2,
    "V2-316M": replace(_V2, num_layers=18, hidden_size=1152, num_heads=18, ffn_size=4608),
}
