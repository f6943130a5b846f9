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
from types import NoneType
from typing import Any

from scfm.errors import ConfigError, InvalidArgumentError, MissingFileError
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.nn.precision import resolve_device

_SHAPE = ("num_layers", "hidden_size", "num_heads", "ffn_size", "max_tokens")
_DEFAULT_PRESET = "V1-10M"


@dataclass
class PretrainConfig:
    """One pretraining run of a Geneformer.

    data: files or AnnData objects with raw counts; out: folder for the model, metrics and settings.
    preset: one of the released shapes; num_layers .. max_tokens take its values unless given.
    special_tokens: <cls> and <eos> around each cell (V2) or not (V1). dictionaries: take tokens and medians
    from there instead of from the corpus.
    mask_ratio, batch_cells, learning_rate, weight_decay, warmup_ratio, schedule ("linear" | "cosine"),
    clip_norm: as usual. The run ends at num_epochs, max_steps or max_minutes, whichever comes first; the
    learning rate reaches zero there. held_out_fraction: cells kept out for evaluation, chosen by
    (seed, cell). dropout: on hidden states (attention probabilities are not dropped).
    """

    data: list[Any] = field(default_factory=list)
    out: str | Path = "scfm-pretrained"
    preset: str = _DEFAULT_PRESET
    num_layers: int = None  # type: ignore[assignment]  # filled from the preset when not given
    hidden_size: int = None  # type: ignore[assignment]
    num_heads: int = None  # type: ignore[assignment]
    ffn_size: int = None  # type: ignore[assignment]
    max_tokens: int = None  # type: ignore[assignment]
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
        if not isinstance(self.preset, str):
            raise ConfigError(f"{self.preset!r}; expected a name such as 'V1-10M'", where="preset")
        shape = GeneformerConfig.preset(self.preset)
        for name in _SHAPE:
            if getattr(self, name) is None:
                setattr(self, name, getattr(shape, name))
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
        for name, most in _WHOLE.items():
            _expect_whole(name, getattr(self, name), 0 if name == "seed" else 1, most)
        for name, below in _FRACTIONS.items():
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < below:
                raise ConfigError(f"{value!r}; expected a number from 0 to below {below}", where=name)
        for name in ("mask_ratio", "learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{getattr(self, name)!r}; expected more than 0", where=name)
        for name in ("max_steps", "evaluate_every"):
            if getattr(self, name) is not None:
                _expect_whole(name, getattr(self, name), 1, 10**12)
        if self.max_minutes is not None and not (_is_number(self.max_minutes) and self.max_minutes > 0):
            raise ConfigError(f"{self.max_minutes!r}; expected a positive number", where="max_minutes")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{getattr(self, name)!r}; expected one of {allowed}", where=name)
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(self, name), kinds):
                raise ConfigError(
                    f"{getattr(self, name)!r} is a {type(getattr(self, name)).__name__}", where=name
                )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{self.hidden_size} is not a multiple of num_heads = {self.num_heads}", where="hidden_size"
            )
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise ConfigError("is a file; expected a folder to write to", path=self.out, where="out")
        try:
            resolve_device(self.device)
        except InvalidArgumentError as error:
            raise ConfigError(error.message, where="device") from error


_WHOLE = {"num_layers": 200, "hidden_size": 16384, "num_heads": 512, "ffn_size": 65536}
_WHOLE |= {"max_tokens": 1_000_000, "batch_cells": 1_000_000, "num_epochs": 1_000_000, "seed": 2**63 - 1}
_FRACTIONS: dict[str, float] = {"mask_ratio": 1, "held_out_fraction": 1, "dropout": 1, "warmup_ratio": 1}
_FRACTIONS |= {"learning_rate": 10, "weight_decay": 10, "clip_norm": 1e9}
_CHOICES = {"schedule": ("linear", "cosine"), "species": ("human", "mouse"), "special_tokens": (True, False)}
_KINDS: dict[str, Any] = {
    "out": (str, Path),
    "layer": (str, NoneType),
    "dictionaries": (str, Path, NoneType),
    "device": str,
    "special_tokens": bool,
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expect_whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{value!r}; expected a whole number from {least} to {most}", where=name)


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
