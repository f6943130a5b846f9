"""The shape of a scBERT, and what makes one impossible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from scfm.errors import ConfigError
from scfm.models.nn.performer import PerformerShape

__all__ = ["MAX_PARAMETERS", "ScbertConfig"]

_BOUNDS = {
    "num_genes": (1, 1_000_000),
    "num_token_ids": (3, 1024),
    "hidden_size": (1, 65_536),
    "num_layers": (1, 1024),
    "num_heads": (1, 1024),
    "head_dim": (1, 256),
    "num_features": (1, 65_536),
    "ffn_mult": (1, 64),
    "num_classes": (0, 1_000_000),
}
_CHOICES = {
    "attention": ("favor", "generalized", "unprojected"),
    "norm": ("layer", "scale", "rezero"),
}
MAX_PARAMETERS = 20_000_000_000


@dataclass(frozen=True)
class ScbertConfig:
    """One scBERT; defaults are the released panglao_pretrain's. Raises ConfigError naming the field.

    num_genes: of the panel; behind its positions comes one slot. num_token_ids: bins from 0, and the last one, which
    masks. hidden_size, num_layers, num_heads, head_dim, num_features, ffn_mult: the Performer, whose heads are wider
    than hidden_size / num_heads. qkv_bias, attention, norm, glu, reversible: variants of the original's constructor
    ("generalized" is generalized_attention, "unprojected" no_projection).
    gene2vec: there is a table of positions. has_bin_head, tied_head: bins are predicted, by a layer of its own or by
    the table of bins. num_classes, head_sizes: the annotation head, if any; class_names: its classes, where known.
    """

    num_genes: int
    num_token_ids: int = 7
    hidden_size: int = 200
    num_layers: int = 6
    num_heads: int = 10
    head_dim: int = 64
    num_features: int = 266
    ffn_mult: int = 4
    qkv_bias: bool = False
    attention: Literal["favor", "generalized", "unprojected"] = "favor"
    norm: Literal["layer", "scale", "rezero"] = "layer"
    glu: bool = False
    reversible: bool = False
    gene2vec: bool = True
    has_bin_head: bool = True
    tied_head: bool = False
    num_classes: int = 0
    head_sizes: tuple[int, int] = (512, 128)
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            _expect_int(name, getattr(self, name), low, high)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"found {getattr(self, name)!r:.60}, expected one of {choices}", where=name)
        for field in fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise ConfigError(
                    f"found {getattr(self, field.name)!r:.60}, expected true or false", where=field.name
                )
        sizes = self.head_sizes
        if not isinstance(sizes, list | tuple) or len(sizes) != 2:
            raise ConfigError(f"found {sizes!r:.60}, expected two sizes", where="head_sizes")
        for size in sizes:
            _expect_int("head_sizes", size, 1, 65_536)
        object.__setattr__(self, "head_sizes", tuple(sizes))
        names = self.class_names
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"found {names!r:.60}, expected names", where="class_names")
        object.__setattr__(self, "class_names", tuple(names))
        if names and len(set(names)) != self.num_classes:
            raise ConfigError(
                f"{len(set(names)):,} different names for a head of {self.num_classes:,} classes",
                where="class_names",
                hint="Give the sorted cell types that this head was trained on.",
            )
        if self.num_parameters() > MAX_PARAMETERS:
            raise ConfigError(f"{self.num_parameters():,} parameters; the limit is {MAX_PARAMETERS:,}")

    @property
    def num_positions(self) -> int:
        """Rows of a cell: its panel, and the slot."""
        return self.num_genes + 1

    @property
    def vocab_size(self) -> int:
        """Token ids are positions."""
        return self.num_positions

    @property
    def mask_bin(self) -> int:
        """The id that stands for a hidden bin."""
        return self.num_token_ids - 1

    @property
    def performer(self) -> PerformerShape:
        return PerformerShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            head_dim=self.head_dim,
            num_features=self.num_features,
            ffn_mult=self.ffn_mult,
            qkv_bias=self.qkv_bias,
            attention=self.attention,
            norm=self.norm,
            glu=self.glu,
            reversible=self.reversible,
        )

    def num_parameters(self) -> int:
        """An upper estimate that needs no model."""
        size, inner = self.hidden_size, self.num_heads * self.head_dim
        layer = (
            4 * (size + 1) * (inner + 1)
            + 3 * self.ffn_mult * (size + 1) ** 2
            + self.num_features * self.head_dim
        )
        wide, narrow = self.head_sizes
        head = (
            wide * (self.num_positions + 1) + narrow * (wide + 1) + self.num_classes * (narrow + 1)
            if self.num_classes
            else 0
        )
        return (self.num_positions + 2 * self.num_token_ids + 2) * size + self.num_layers * layer + head

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], path: str | Path | None = None) -> ScbertConfig:
        """From field name -> value, as ``to_dict`` gives it; unknown or missing fields raise ConfigError."""
        unknown = sorted(set(found) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown fields {unknown[:5]}", path=path, where="scfm.config")
        if "num_genes" not in found:
            raise ConfigError("is missing", path=path, where="num_genes")
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(error.message, path=path, where=error.where, hint=error.hint) from None

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value, for JSON."""
        plain = asdict(self)
        return plain | {"head_sizes": list(self.head_sizes), "class_names": list(self.class_names)}


def _expect_int(name: str, found: Any, low: int, high: int) -> None:
    if type(found) is not int or not low <= found <= high:
        raise ConfigError(f"found {found!r:.60}, expected an integer from {low:,} to {high:,}", where=name)
