"""The shape of a scGPT: its encoder, how values enter, and which heads it has; checked before anything is allocated.

scGPT is one encoder with many optional parts. A released folder says some of them in args.json, some only by the
tensors it holds, some not at all; ``original.py`` settles that. Here every number has bounds and every choice its
list. Source: TransformerModel, MultiOmicTransformerModel and TransformerGenerator of the released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from scfm.errors import ConfigError

__all__ = ["ScgptConfig"]

_BOUNDS = {
    "vocab_size": (2, 10_000_000),
    "hidden_size": (1, 16_384),
    "num_heads": (1, 16_384),
    "ffn_size": (1, 131_072),
    "num_layers": (1, 200),
    "max_tokens": (2, 1_000_000),
    "num_bins": (2, 1_000_000),
    "num_value_ids": (0, 1_000_000),
    "num_classes": (0, 10_000_000),
    "num_class_layers": (1, 100),
    "num_batch_labels": (0, 1_000_000),
    "num_modalities": (0, 1_000_000),
    "num_experts": (0, 1_000),
    "experts_per_token": (1, 1_000),
    "pert_pad_id": (0, 2),
}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "input_style": ("binned", "log1p", "normed_raw"),
    "value_style": ("continuous", "category", "scaling"),
    "cell_style": ("cls", "avg-pool", "w-pool"),
    "mvc_style": (None, "inner product", "inner product, detach", "concat query", "sum query"),
    "batch_norm": (None, "domain", "plain"),
    "decoder_activation": (None, "ReLU", "LeakyReLU", "ELU", "GELU", "SELU", "Sigmoid", "Softplus", "Tanh"),
}
_NUMBERS = {
    "dropout": (0.0, 0.999),
    "pad_value": (-1e6, 1e6),
    "mask_value": (-1e6, 1e6),
    "ecs_threshold": (0.0, 1.0),
}
MAX_PARAMETERS = 20_000_000_000


@dataclass(frozen=True)
class ScgptConfig:
    """One scGPT. Raises ConfigError naming the field, what was found and what is possible.

    vocab_size, hidden_size, num_heads, ffn_size, num_layers, dropout: the encoder; pre_norm: the released flash
    layer's order of norms, which is not the usual one (see layers.py).
    max_tokens, num_bins, pad_token, pad_value, mask_value, input_style: how cells are tokenized; <cls> has the pad
    value.
    value_style: "continuous" (a small network), "category" (a table of num_value_ids rows) or "scaling" (the value
    multiplies the gene's embedding).
    cell_style: where a cell's embedding is read: "cls", "avg-pool" or "w-pool" (weighted by the values).
    Heads: explicit_zeros (probability that a gene is expressed at all), mvc_style (expression from the cell's
    embedding; None for none), joint_mvc (its keys carry batch and modality, as in the multi-omic model),
    num_classes with num_class_layers, adversary (batch classifier behind a gradient reversal), ecs_threshold.
    num_batch_labels, use_batch_labels (they enter the decoders), batch_norm ("domain": one for each batch label).
    num_modalities: of the multi-omic model. has_flags: the table that marks genes to be generated.
    num_experts, experts_per_token, has_imputation: the spatial model's mixture decoder and neighbourhood head.
    perturbation, pert_pad_id, decoder_activation, adaptive_bias: the perturbation generator.
    unit_embeddings: rows of ``embed`` have length 1, as the original's embed_data gives them.
    """

    vocab_size: int
    hidden_size: int = 512
    num_heads: int = 8
    ffn_size: int = 512
    num_layers: int = 12
    dropout: float = 0.2
    pre_norm: bool = False
    max_tokens: int = 1200
    num_bins: int = 51
    pad_token: str = "<pad>"
    pad_value: float = -2.0
    mask_value: float = -1.0
    input_style: Literal["binned", "log1p", "normed_raw"] = "binned"
    value_style: Literal["continuous", "category", "scaling"] = "continuous"
    num_value_ids: int = 0
    cell_style: Literal["cls", "avg-pool", "w-pool"] = "cls"
    explicit_zeros: bool = False
    mvc_style: Literal["inner product", "inner product, detach", "concat query", "sum query"] | None = None
    joint_mvc: bool = False
    num_classes: int = 0
    num_class_layers: int = 3
    ecs_threshold: float = 0.3
    adversary: bool = False
    num_batch_labels: int = 0
    use_batch_labels: bool = False
    batch_norm: Literal["domain", "plain"] | None = None
    num_modalities: int = 0
    has_flags: bool = False
    num_experts: int = 0
    experts_per_token: int = 2
    has_imputation: bool = False
    perturbation: bool = False
    pert_pad_id: int = 2
    decoder_activation: str | None = None
    adaptive_bias: bool = False
    unit_embeddings: bool = True

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            _expect_int(name, getattr(self, name), low, high)
        for name, (lowest, highest) in _NUMBERS.items():
            _expect_number(name, getattr(self, name), lowest, highest)
        for name, choices in _CHOICES.items():
            found = getattr(self, name)
            if found not in choices:
                raise ConfigError(f"found {found!r:.60}, expected one of {choices}", where=name)
        for field in fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise ConfigError(
                    f"found {getattr(self, field.name)!r:.60}, expected true or false", where=field.name
                )
        if not isinstance(self.pad_token, str) or not self.pad_token:
            raise ConfigError(f"found {self.pad_token!r:.60}, expected a token", where="pad_token")
        self._expect_consistent()

    def _expect_consistent(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{self.num_heads} heads do not divide a hidden size of {self.hidden_size}", where="num_heads"
            )
        if self.value_style == "category":
            if self.input_style != "binned":
                raise ConfigError(
                    f'"category" values are rows of a table; input_style {self.input_style!r} gives continuous ones',
                    where="value_style",
                )
            if not self.num_value_ids:
                raise ConfigError('"category" values need the number of their ids', where="num_value_ids")
        if self.value_style == "scaling" and self.perturbation:
            raise ConfigError("the perturbation generator takes continuous values only", where="value_style")
        needs_labels = [name for name in ("adversary", "use_batch_labels") if getattr(self, name)]
        if self.batch_norm == "domain":
            needs_labels.append("batch_norm")
        if needs_labels and not self.num_batch_labels:
            raise ConfigError(f"{', '.join(needs_labels)} need a number of batches", where="num_batch_labels")
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"{self.experts_per_token} of {self.num_experts} experts", where="experts_per_token"
            )
        if self.num_experts and (self.explicit_zeros or self.perturbation):
            raise ConfigError(
                "the mixture decoder has no zero probabilities and no values", where="num_experts"
            )
        if self.num_parameters() > MAX_PARAMETERS:
            raise ConfigError(f"{self.num_parameters():,} parameters; the limit is {MAX_PARAMETERS:,}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def context_size(self) -> int:
        """Columns that batch label and modality add to the decoders' input."""
        return self.hidden_size if self.use_batch_labels or self.num_modalities else 0

    def num_parameters(self) -> int:
        """An upper estimate that needs no model: gene table, encoder, and every head counted as a layer."""
        hidden, ffn = self.hidden_size, self.ffn_size
        rows = (
            self.vocab_size
            + self.num_value_ids
            + 3 * self.num_batch_labels
            + self.num_modalities
            + self.num_classes
        )
        layer = 4 * (hidden + 1) * hidden + 4 * hidden + (hidden + 1) * ffn + (ffn + 1) * hidden
        heads = (8 + self.num_class_layers + 2 * self.num_experts) * (hidden + 1) * 2 * hidden
        return rows * hidden + self.num_layers * layer + heads

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], path: str | Path | None = None) -> ScgptConfig:
        """From field name -> value, as ``to_dict`` gives it; unknown or missing fields raise ConfigError."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(found) - known)
        if unknown:
            raise ConfigError(f"unknown fields {unknown[:5]}", path=path, where="scfm.config")
        if "vocab_size" not in found:
            raise ConfigError("is missing", path=path, where="vocab_size")
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(error.message, path=path, where=error.where, hint=error.hint) from None

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value."""
        return asdict(self)


def _expect_int(name: str, found: Any, low: int, high: int) -> None:
    if type(found) is not int or not low <= found <= high:
        raise ConfigError(f"found {found!r:.60}, expected an integer from {low:,} to {high:,}", where=name)


def _expect_number(name: str, found: Any, low: float, high: float) -> None:
    if type(found) not in (int, float) or not math.isfinite(found) or not low <= found <= high:
        raise ConfigError(f"found {found!r:.60}, expected a number from {low:g} to {high:g}", where=name)
