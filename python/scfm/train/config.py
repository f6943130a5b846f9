"""The settings of a pretraining run: one flat dataclass, read from TOML, changed by ``key=value``, checked at once.

Every unknown key is named together with the nearest known one, and every value is checked before any data is
read: a run of days must not die of a typing error at its end. The rules themselves are in config_checks.py.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from scfm.errors import ConfigError, MissingFileError
from scfm.train.config_checks import (
    SHAPE,
    check_settings,
    check_shape,
    family_fields,
    released_shape,
    unknown_settings,
)
from scfm.train.model_shape import check_model_shape

__all__ = ["PretrainConfig", "parse_overrides"]

# What may differ when a run is resumed: none of these changes what a step computes from which cells. (Whether the
# data are the same is not for the settings to say: the corpus has a fingerprint.)
_FREE_TO_CHANGE = {
    "data",
    "data_folder",
    "out",
    "device",
    "parallel",
    "shard_size",
    "activation_checkpointing",
}
_FREE_TO_CHANGE |= {"compile", "timeout_seconds", "max_minutes", "max_bad_steps", "evaluate_every", "probe"}
_FREE_TO_CHANGE |= {"held_out_cells", "checkpoint_every", "keep_last", "keep_every", "resume", "allow_change"}
_FREE_TO_CHANGE |= {"tensorboard"}
# scBERT and scFoundation compute a whole panel, up to 16,907 or 19,266 positions, for each cell.
_TOKEN_BUDGET = {"geneformer": 8192, "scgpt": 8192, "scbert": 67_628, "scfoundation": 77_064}


@dataclass
class PretrainConfig:
    """One pretraining run.

    Data. data: files, AnnData objects or tables {path, layer, keep, held_out} with raw counts; ``keep`` and
    ``held_out`` map a column of obs to the values whose cells are used at all, or kept for evaluation. data_folder:
    where relative paths start. layer, species: of all of them. held_out_fraction: cells kept for evaluation, chosen
    by (seed, cell).
    dictionaries (Geneformer), genes (scGPT's vocab.json, or the gene order of scBERT and scFoundation): the vocabulary;
    made from the training cells where not given. special_tokens: Geneformer's <cls> and <eos> around each cell.

    Model. family, preset: "geneformer" with one of its released shapes, or "scgpt", "scbert", "scfoundation" with their
    released defaults; num_layers .. max_tokens and dropout replace single values, ``model`` any other field of the
    family's configuration. dropout: on hidden states (attention probabilities are not dropped). objective: settings of
    the family's objective, such as {"mask_ratio": 0.15}.

    gene_embeddings: how the gene table begins, "random" or "coexpression": its first coexpression_size columns are then
    vectors of genes that vary together over the training cells (corpus/coexpression.py). gene_std: standard deviation
    of a random gene table, None for the family's; branch_scale: how much smaller what each layer adds begins;
    centred_start: of scGPT, whether its cell embeddings begin around zero (first_weights.py).

    Steps. A microbatch holds at most token_budget tokens of whole cells (8,192 where not given, and four panels of the
    families that compute every gene of every cell); a step adds up microbatches_per_step of them,
    shared out evenly between the ranks. shuffle_block, shuffle_window: consecutive cells read together, and cells
    shuffled together. The run ends after num_epochs or max_steps, whichever comes first; max_minutes stops it earlier,
    at a step's end, to be resumed. The learning rate rises over the first warmup_ratio of all tokens, then falls by
    schedule: "linear" and "cosine" to zero at the end, "constant" not at all.

    Machine. precision: of matrix products; parallel: "ddp", "fsdp" or "hsdp" (shard_size ranks share one copy);
    activation_checkpointing: recompute every k-th block (0: none); compile: torch.compile; timeout_seconds: how long
    ranks wait for each other.

    Safety. checkpoint_every steps, the keep_last newest and every keep_every-th step are kept; resume: continue the run
    found in ``out``; allow_change: settings that may differ from it. A step whose loss or gradient is not finite on any
    rank is applied on none, and max_bad_steps of them in a row end the run.

    Watching. evaluate_every steps: the objective on at most held_out_cells held-out cells beside its baselines, and for
    each of ``probe`` (tables {path, label, layer, keep}) how well labels are found in the cell embedding. tensorboard:
    write its files as well.

    Raises ConfigError naming the setting, what was found and what is possible.
    """

    data: list[Any] = field(default_factory=list)
    data_folder: str | Path | None = None
    out: str | Path = "scfm-pretrained"
    family: str = "geneformer"
    preset: str | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    ffn_size: int | None = None
    max_tokens: int | None = None
    dropout: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    gene_embeddings: str = "random"
    coexpression_size: int = 32
    gene_std: float | None = None
    branch_scale: float = 1.0
    centred_start: bool = False
    special_tokens: bool = True
    dictionaries: str | Path | None = None
    genes: str | Path | None = None
    layer: str | None = None
    species: str = "human"
    held_out_fraction: float = 0.0
    token_budget: int = None  # type: ignore[assignment]  # the family's, when not given
    microbatches_per_step: int = 4
    shuffle_block: int = 64
    shuffle_window: int = 4096
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    warmup_ratio: float = 0.05
    schedule: str = "linear"
    clip_norm: float = 1.0
    num_epochs: int = 3
    max_steps: int | None = None
    max_minutes: float | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    parallel: str = "ddp"
    shard_size: int | None = None
    activation_checkpointing: int = 0
    compile: bool = False
    timeout_seconds: float = 600.0
    evaluate_every: int | None = None
    held_out_cells: int = 2000
    probe: list[dict[str, Any]] = field(default_factory=list)
    checkpoint_every: int | None = 1000
    keep_last: int = 2
    keep_every: int | None = None
    resume: bool = True
    allow_change: list[str] = field(default_factory=list)
    max_bad_steps: int = 3
    tensorboard: bool = False

    def __post_init__(self) -> None:
        given: Any = self.data
        self.data = list(given) if isinstance(given, list | tuple) else [given]
        if self.family == "geneformer" and self.preset is None:
            self.preset = "V1-10M"
        check_settings(self)
        for name, value in released_shape(self.family, self.preset).items():
            if getattr(self, name) is None:
                setattr(self, name, self.model.get(name, value))
        check_shape(self)
        check_model_shape(self)
        budget: Any = self.token_budget
        self.token_budget = _TOKEN_BUDGET[self.family] if budget is None else budget

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, path: str | Path | None = None) -> PretrainConfig:
        """From a plain mapping; every unknown key is named in one ConfigError."""
        unknown = unknown_settings(settings, [f.name for f in fields(cls)])
        if unknown:
            raise ConfigError(f"unknown settings: {unknown}", path=path)
        try:
            return cls(**settings)
        except ConfigError as error:
            if path is None or error.path is not None:
                raise
            raise ConfigError(error.message, path=path, where=error.where, hint=error.hint) from error

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
        return cls.from_mapping(_overridden(settings, parse_overrides(overrides)), path=path)

    def model_fields(self) -> dict[str, Any]:
        """Fields of the family's configuration that were given, by the names they have there."""
        known = family_fields(self.family)
        named = {name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None}
        if self.dropout is not None:
            named["hidden_dropout" if "hidden_dropout" in known else "dropout"] = self.dropout
        return {**{name: value for name, value in named.items() if name in known}, **self.model}

    def identity(self) -> dict[str, Any]:
        """What makes it this run and no other: what a resumed run must not change without being told."""
        return {name: value for name, value in self.to_dict().items() if name not in _FREE_TO_CHANGE}

    def to_dict(self) -> dict[str, Any]:
        """Plain settings; data held in memory is named, not stored."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        plain["data"] = [
            _plain(d) if isinstance(d, str | Path | Mapping) else type(d).__name__ for d in self.data
        ]
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["learning_rate=3e-3", "data=['a.h5ad']", "objective.mask_ratio=0.3"]`` to a mapping.

    A value that is no TOML is text; a dotted key goes into the table of that name.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        table, dot, name = key.strip().rpartition(".")
        if not equals or not name.isidentifier() or (dot and not table.isidentifier()):
            raise ConfigError(f"{override!r}; expected key=value or table.key=value", where="override")
        try:
            found = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found = value
        place = settings.setdefault(table, {}) if dot else settings
        if not isinstance(place, dict):
            raise ConfigError(f"{override!r}; {table!r} is already given as {place!r:.60}", where="override")
        place[name] = found
    return settings


def _overridden(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with the changes; tables are changed key by key, as ``model.num_bins=51`` means it."""
    merged = dict(settings)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
