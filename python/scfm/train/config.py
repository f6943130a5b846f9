"""The settings of a pretraining run: one dataclass, read from TOML, changed by ``key=value``, checked at once.

Every unknown key is named together with the nearest known one, and every value is checked before any data is
read: a run of hours must not die of a typing error at its end.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scfm.errors import ConfigError, MissingFileError

_SHAPES = {
    "V1-10M": {"num_layers": 6, "hidden_size": 256, "num_heads": 4, "ffn_size": 512, "max_tokens": 2048},
    "V1-12L": {"num_layers": 12, "hidden_size": 512, "num_heads": 8, "ffn_size": 1024, "max_tokens": 2048},
    "V2-104M": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "ffn_size": 3072, "max_tokens": 4096},
    "V2-316M": {"num_layers": 18, "hidden_size": 1152, "num_heads": 18, "ffn_size": 4608, "max_tokens": 4096},
}


@dataclass
class PretrainConfig:
    """One pretraining run of a Geneformer.

    data: files or AnnData objects with raw counts; out: folder for the model, metrics and settings.
    preset: one of the released shapes, else num_layers .. max_tokens; special_tokens: <cls> and <eos> around
    each cell (V2) or not (V1). dictionaries: take tokens and medians from there instead of from the corpus.
    mask_ratio, batch_cells, learning_rate, weight_decay, warmup_ratio, schedule ("linear" | "cosine"),
    clip_norm: as usual. The run ends at num_epochs, max_steps or max_minutes, whichever comes first; the
    learning rate reaches zero there. held_out_fraction: cells kept out for evaluation, chosen by
    (seed, cell). dropout: on hidden states (attention probabilities are not dropped).
    """

    data: list[Any] = field(default_factory=list)
    out: str | Path = "scfm-pretrained"
    preset: str | None = None
    num_layers: int = 6
    hidden_size: int = 256
    num_heads: int = 4
    ffn_size: int = 512
    max_tokens: int = 2048
    special_tokens: bool = True
    dictionaries: str | Path | None = None
    layer: str | None = None
    species: str = "human"
    mask_ratio: float = 0.15
    batch_cells: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    warmup_ratio: float = 0.05
    schedule: str = "linear"
    clip_norm: float = 1.0
    num_epochs: int = 3
    max_steps: int | None = None
    max_minutes: float | None = None
    held_out_fraction: float = 0.0
    evaluate_every: int | None = None
    dropout: float = 0.02
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.preset is not None:
            if self.preset not in _SHAPES:
                raise ConfigError(f"{self.preset!r}; expected one of {sorted(_SHAPES)}", where="preset")
            defaults = {f.name: f.default for f in fields(self)}
            for name, value in _SHAPES[self.preset].items():
                if getattr(self, name) == defaults[name]:
                    setattr(self, name, value)
        given: Any = self.data
        self.data = list(given) if isinstance(given, list | tuple) else [given]
        self._check()

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, path: str | Path | None = None) -> PretrainConfig:
        """From a plain mapping; every unknown key is named in one ConfigError."""
        known = [f.name for f in fields(cls)]
        unknown = [key for key in settings if key not in known]
        if unknown:
            advice = [
                f"{key!r}" + "".join(f" (did you mean {near!r}?)" for near in _nearest(key, known))
                for key in unknown
            ]
            raise ConfigError(f"unknown settings: {', '.join(advice)}", path=path)
        return cls(**settings)

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
        """From a TOML file, then ``key=value`` overrides (values in TOML's syntax, or bare text)."""
        path = Path(path)
        if not path.is_file():
            raise MissingFileError("no such settings file", path=path)
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"not valid TOML: {error}", path=path) from error
        return cls.from_mapping({**settings, **parse_overrides(overrides)}, path=path)

    def to_dict(self) -> dict[str, Any]:
        """Plain settings; data held in memory is named, not stored."""
        plain = asdict(self) if all(isinstance(item, str | Path) for item in self.data) else vars(self).copy()
        plain["data"] = [str(d) if isinstance(d, str | Path) else type(d).__name__ for d in self.data]
        plain["out"] = str(self.out)
        plain["dictionaries"] = None if self.dictionaries is None else str(self.dictionaries)
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def _check(self) -> None:
        whole = {"num_layers": 200, "hidden_size": 16384, "num_heads": 512, "ffn_size": 65536}
        whole |= {"max_tokens": 1_000_000, "batch_cells": 1_000_000, "num_epochs": 1_000_000}
        for name, most in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"{value!r}; expected a whole number from 1 to {most}", where=name)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{self.hidden_size} is not a multiple of num_heads = {self.num_heads}", where="hidden_size"
            )
        bounds = {"mask_ratio": (0.0, 1.0), "held_out_fraction": (0.0, 1.0), "dropout": (0.0, 1.0)}
        bounds |= {"warmup_ratio": (0.0, 1.0), "learning_rate": (0.0, 10.0), "weight_decay": (0.0, 10.0)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
                raise ConfigError(f"{value!r}; expected a number from {low} to below {high}", where=name)
        for name in ("max_steps", "max_minutes", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not value > 0):
                raise ConfigError(f"{value!r}; expected a positive number", where=name)
        if self.mask_ratio == 0 or self.learning_rate == 0:
            raise ConfigError("0; nothing would be learned", where="mask_ratio or learning_rate")
        if self.schedule not in ("linear", "cosine"):
            raise ConfigError(f'{self.schedule!r}; expected "linear" or "cosine"', where="schedule")


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["learning_rate=3e-3", "data=['a.h5ad']"]`` to a mapping; a value that is no TOML is text."""
    settings: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ConfigError(f"{override!r}; expected key=value", where="override")
        try:
            settings[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key.strip()] = value
    return settings


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(key, known, n=1)
