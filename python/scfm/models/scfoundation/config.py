"""The shape of a scFoundation: what models.ckpt says of it, checked before anything is allocated.

The file keeps a configuration beside each variant's weights: that of the model, then that of the data set, whose
entries win. It may come from anywhere, so every number has bounds, every switch that would change the arithmetic must
have the value that this engine computes, and the sizes that the weights show must agree.
Source: the authors' load.py and the configuration of the released models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scfm.errors import ConfigError

__all__ = ["VARIANTS", "ScfoundationConfig", "merged_config"]

# What the authors trained: cell embeddings, their enhancement in depth, and genes.
VARIANTS = ("cell", "rde", "gene")
MODEL_TYPE = "mae_autobin"
_DATA_SET = "rnaseq"
_BOUNDS = {
    "num_genes": (1, 1_000_000),
    "hidden_size": (1, 16_384),
    "num_layers": (1, 200),
    "num_heads": (1, 16_384),
    "ffn_size": (1, 131_072),
    "decoder_size": (1, 16_384),
    "decoder_layers": (1, 200),
    "decoder_heads": (1, 1_024),
    "decoder_head_dim": (1, 1_024),
    "decoder_features": (1, 65_536),
    "num_bins": (1, 100_000),
}
_NUMBERS = {
    "bin_alpha": (-1e6, 1e6),
    "mask_value": (-1e6, 1e6),
    "pad_value": (-1e6, 1e6),
    "dropout": (0.0, 0.999),
    "value_mask_ratio": (0.0, 1.0),
    "zero_mask_ratio": (0.0, 1.0),
    "replace_ratio": (0.0, 1.0),
    "random_ratio": (0.0, 1.0),
}
_NUM_DEPTHS = 2
MAX_PARAMETERS = 20_000_000_000


@dataclass(frozen=True)
class ScfoundationConfig:
    """One variant of scFoundation. Raises ConfigError naming the field, what was found and what is possible.

    num_genes: without the two depths. hidden_size, num_layers, num_heads, ffn_size, dropout: the encoder. decoder_*:
    the Performer over all genes; its heads are decoder_head_dim wide whatever decoder_size is. num_bins, bin_alpha: of
    the value embedding; mask_value, pad_value: numbers that stand for no expression. value_mask_ratio,
    zero_mask_ratio: shares of expressed and other genes that pre-training hides, replace_ratio and random_ratio of them
    behind the mask and a random value, the rest as they are. variant: which of the file's models it is, "" for none.
    """

    num_genes: int
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_size: int = 3072
    decoder_size: int = 512
    decoder_layers: int = 6
    decoder_heads: int = 8
    decoder_head_dim: int = 64
    decoder_features: int = 266
    num_bins: int = 100
    bin_alpha: float = 1.0
    mask_value: float = 102.0
    pad_value: float = 103.0
    dropout: float = 0.1
    value_mask_ratio: float = 0.3
    zero_mask_ratio: float = 0.03
    replace_ratio: float = 0.8
    random_ratio: float = 0.1
    variant: str = ""

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            found = getattr(self, name)
            if type(found) is not int or not low <= found <= high:
                raise ConfigError(
                    f"found {found!r:.60}, expected an integer from {low:,} to {high:,}", where=name
                )
        for name, (least, most) in _NUMBERS.items():
            number = getattr(self, name)
            if type(number) not in (int, float) or not math.isfinite(number) or not least <= number <= most:
                raise ConfigError(
                    f"found {number!r:.60}, expected a number from {least:g} to {most:g}", where=name
                )
        if self.replace_ratio + self.random_ratio > 1:
            raise ConfigError(f"{self.random_ratio} and replace_ratio are more than 1", where="random_ratio")
        if self.mask_value <= 0 or self.pad_value <= 0 or self.mask_value == self.pad_value:
            raise ConfigError(
                f"found {self.mask_value} and pad_value {self.pad_value}; expected two numbers above zero",
                where="mask_value",
            )
        if type(self.variant) is not str or len(self.variant) > 60:
            raise ConfigError(f"found {self.variant!r:.60}, expected a short name", where="variant")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{self.num_heads} heads do not divide a hidden size of {self.hidden_size}", where="num_heads"
            )
        if self.num_parameters() > MAX_PARAMETERS:
            raise ConfigError(f"{self.num_parameters():,} parameters; the limit is {MAX_PARAMETERS:,}")

    @property
    def vocab_size(self) -> int:
        """Positions: the genes, T and S."""
        return self.num_genes + _NUM_DEPTHS

    def num_parameters(self) -> int:
        hidden, ffn, inner = self.hidden_size, self.ffn_size, self.decoder_heads * self.decoder_head_dim
        layer = 4 * (hidden + 1) * hidden + 4 * hidden + (hidden + 1) * ffn + (ffn + 1) * hidden
        size = self.decoder_size
        block = (
            3 * (size + 1) * inner
            + (inner + 1) * size
            + 4 * size
            + (size + 1) * 4 * size
            + (4 * size + 1) * size
        )
        values = 2 * self.num_bins + (self.num_bins + 1) * self.num_bins + (self.num_bins + 2) * hidden
        ends = (self.vocab_size + 1) * hidden + 2 * hidden + (hidden + 1) * size + 4 * size + size + 1
        return values + self.num_layers * layer + self.decoder_layers * block + ends

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], path: str | Path | None = None) -> ScfoundationConfig:
        """From ``to_dict``; a name that is not a field raises ConfigError."""
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(found) - known)
        if unknown or "num_genes" not in found:
            what = f"unknown: {unknown[:5]}" if unknown else "is missing"
            raise ConfigError(what, path=path, where="scfm.config" if unknown else "num_genes")
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(error.message, path=path, where=error.where) from None

    @classmethod
    def from_authors(
        cls, found: Mapping[str, Any], *, variant: str, num_features: int, ffn_size: int, path: str | Path
    ) -> ScfoundationConfig:
        """From a configuration as ``merged_config`` gives it; num_features, ffn_size: as the weights show them."""

        def get(key: str, default: Any = None, section: Mapping[str, Any] = found) -> Any:
            if key not in section and default is None:
                raise ConfigError("is missing", path=path, where=key)
            return section.get(key, default)

        encoder, decoder = (_part(found, name, path) for name in ("encoder", "decoder"))
        for name, part, module in (("encoder", encoder, "transformer"), ("decoder", decoder, "performer")):
            _expect(part.get("module_type"), module, f"{name}.module_type", path)
            _expect(part.get("norm_first", False), False, f"{name}.norm_first", path)
        seq_len = get("seq_len")
        if type(seq_len) is not int:
            raise ConfigError(f"found {seq_len!r:.60}, expected an integer", path=path, where="seq_len")
        values = {
            "num_genes": seq_len - _NUM_DEPTHS,
            "hidden_size": get("hidden_dim", section=encoder),
            "num_layers": get("depth", section=encoder),
            "num_heads": get("heads", section=encoder),
            "ffn_size": ffn_size,
            "decoder_size": get("hidden_dim", section=decoder),
            "decoder_layers": get("depth", section=decoder),
            "decoder_heads": get("heads", section=decoder),
            "decoder_head_dim": get("dim_head", 64, section=decoder),
            "decoder_features": num_features,
            "num_bins": get("bin_num"),
            "bin_alpha": get("bin_alpha"),
            "mask_value": get("mask_token_id"),
            "pad_value": get("pad_token_id"),
            "value_mask_ratio": get("value_mask_prob", 0.3),
            "zero_mask_ratio": get("zero_mask_prob", 0.03),
            "replace_ratio": get("replace_prob", 0.8),
            "random_ratio": get("random_token_prob", 0.1),
            "variant": variant,
        }
        return cls.from_dict(values, path)


def merged_config(found: Any, path: str | Path) -> dict[str, Any]:
    """The model's entries and over them the data set's, of the configuration beside a variant's weights.

    found: plain dicts. Raises ConfigError naming what is missing or is another model.
    """
    whole = _mapping(found, "config", path)
    _expect(whole.get("model"), MODEL_TYPE, "config.model", path)
    model = _mapping(whole.get("model_config"), "config.model_config", path)
    merged = dict(_mapping(model.get(MODEL_TYPE), f"config.model_config.{MODEL_TYPE}", path))
    data = _mapping(whole.get("dataset_config", {}), "config.dataset_config", path)
    return {**merged, **_mapping(data.get(_DATA_SET, {}), f"config.dataset_config.{_DATA_SET}", path)}


def _part(found: Mapping[str, Any], name: str, path: str | Path) -> Mapping[str, Any]:
    return _mapping(found.get(name), name, path)


def _mapping(found: Any, where: str, path: str | Path) -> Mapping[str, Any]:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"expected names and values, found {type(found).__name__}", path=path, where=where)
    return found


def _expect(found: Any, only: Any, where: str, path: str | Path) -> None:
    if found != only or type(found) is not type(only):
        raise ConfigError(f"found {found!r:.60}, expected {only!r}", path=path, where=where)
