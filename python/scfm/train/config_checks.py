"""What a pretraining run's settings may be: kinds, bounds, choices, and which of them go together.

Checked before any data is read. Sizes of a model are checked a second time, with the vocabulary, by its family's own
configuration.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from scfm.errors import ConfigError, InvalidArgumentError
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.nn.precision import resolve_device
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scgpt.config import ScgptConfig
from scfm.train.objectives.settings import objective_settings

if TYPE_CHECKING:
    from scfm.train.config import PretrainConfig

__all__ = ["SHAPE", "check_settings", "check_shape", "family_fields", "released_shape", "unknown_settings"]

_FAMILIES: dict[str, Any] = {
    "geneformer": GeneformerConfig,
    "scgpt": ScgptConfig,
    "scbert": ScbertConfig,
    "scfoundation": ScfoundationConfig,
}
_FROM_THE_DATA = frozenset(("vocab_size", "num_genes"))
# least and most
_WHOLE: dict[str, tuple[int, int]] = {
    "num_layers": (1, 200),
    "hidden_size": (1, 16384),
    "num_heads": (1, 512),
    "ffn_size": (1, 131072),
    "max_tokens": (2, 1_000_000),
    "coexpression_size": (1, 4096),
    "token_budget": (2, 2**31 - 1),
    "microbatches_per_step": (1, 1_000_000),
    "shuffle_block": (1, 2**31 - 1),
    "shuffle_window": (1, 2**31 - 1),
    "num_epochs": (1, 1_000_000),
    "max_steps": (1, 10**12),
    "seed": (0, 2**63 - 1),
    "shard_size": (1, 1_000_000),
    "activation_checkpointing": (0, 1000),
    "evaluate_every": (1, 10**12),
    "held_out_cells": (1, 10**9),
    "checkpoint_every": (1, 10**12),
    "keep_last": (2, 10**6),
    "keep_every": (1, 10**12),
    "max_bad_steps": (1, 10**6),
}
# from (or above, where the second is False) .. to below
_NUMBERS: dict[str, tuple[float, bool, float]] = {
    "dropout": (0, True, 1),
    "gene_std": (0, False, 1000),
    "branch_scale": (0, False, 1000),
    "held_out_fraction": (0, True, 1),
    "learning_rate": (0, False, 10),
    "weight_decay": (0, True, 10),
    "warmup_ratio": (0, True, 1),
    "clip_norm": (0, False, 1e9),
    "max_minutes": (0, False, math.inf),
    "timeout_seconds": (0, False, 1e9),
}
SHAPE = ("num_layers", "hidden_size", "num_heads", "ffn_size", "max_tokens")
_OPTIONAL = {*SHAPE, "token_budget", "dropout", "max_steps", "max_minutes", "shard_size", "evaluate_every"}
_OPTIONAL |= {"checkpoint_every", "keep_every", "gene_std"}
_CHOICES = {
    "family": tuple(_FAMILIES),
    "schedule": ("linear", "cosine", "constant"),
    "species": ("human", "mouse"),
    "gene_embeddings": ("random", "coexpression"),
    "precision": ("auto", "float32", "bfloat16"),
    "parallel": ("ddp", "fsdp", "hsdp"),
}
_KINDS: dict[str, tuple[Any, ...]] = {
    "out": (str, Path),
    "data_folder": (str, Path, NoneType),
    "preset": (str, NoneType),
    "layer": (str, NoneType),
    "dictionaries": (str, Path, NoneType),
    "genes": (str, Path, NoneType),
    "device": (str,),
    "special_tokens": (bool,),
    "centred_start": (bool,),
    "compile": (bool,),
    "resume": (bool,),
    "tensorboard": (bool,),
    "model": (dict,),
    "objective": (dict,),
    "probe": (list,),
    "allow_change": (list,),
}
_DATA_KEYS = ("path", "layer", "keep", "held_out")
_PROBE_KEYS = ("path", "label", "layer", "keep")


def check_settings(config: PretrainConfig) -> None:
    """Raise ConfigError for the first setting that cannot be."""
    for name, kinds in _KINDS.items():
        if not isinstance(getattr(config, name), kinds):
            found = getattr(config, name)
            expected = " or ".join("nothing" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ConfigError(f"{found!r:.80} is a {type(found).__name__}; expected {expected}", where=name)
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{getattr(config, name)!r:.80}; expected one of {allowed}", where=name)
    for name, (least, most) in _WHOLE.items():
        _expect_whole(name, getattr(config, name), least, most)
    for name, bounds in _NUMBERS.items():
        _expect_number(name, getattr(config, name), *bounds)
    _check_model(config)
    objective_settings(config.family, config.objective)
    _check_tables(config)
    _check_machine(config)
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise ConfigError("is a file; expected a folder to write to", path=config.out, where="out")


def family_fields(family: str) -> list[str]:
    """Fields of the family's configuration."""
    return [f.name for f in fields(_FAMILIES[family])]


def unknown_settings(given: Mapping[str, Any], known: Sequence[str]) -> str:
    """The keys that are not known, each with the nearest that is; empty if there is none."""
    advice = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice.append(f"{key!r}" + "".join(f" (did you mean {name!r}?)" for name in near))
    return ", ".join(advice)


def _check_model(config: PretrainConfig) -> None:
    if config.family == "geneformer":
        assert config.preset is not None
        GeneformerConfig.preset(config.preset)
    elif config.preset is not None:
        raise ConfigError(
            f"{config.preset!r}; {config.family} has no presets", where="preset", hint="Leave it out."
        )
    known = family_fields(config.family)
    unknown = unknown_settings(config.model, known)
    if unknown:
        raise ConfigError(f"unknown fields of {config.family}: {unknown}", where="model")
    for name in _FROM_THE_DATA & set(config.model):
        raise ConfigError(
            "follows from the vocabulary", where=f"model.{name}", hint="Leave it out, or give ``genes``."
        )


def released_shape(family: str, preset: str | None) -> dict[str, int]:
    """The released model's sizes, of those that the settings name."""
    if preset is not None:
        return {name: getattr(GeneformerConfig.preset(preset), name) for name in SHAPE}
    released = _FAMILIES[family]  # whose defaults are the released model's
    return {name: getattr(released, name) for name in SHAPE if hasattr(released, name)}


def check_shape(config: PretrainConfig) -> None:
    """Raise ConfigError for sizes that do not go together."""
    width, heads = config.hidden_size, config.num_heads
    # scBERT's heads are wider than hidden_size / num_heads.
    if config.family != "scbert" and width is not None and heads is not None and width % heads:
        raise ConfigError(f"{width} is not a multiple of num_heads = {heads}", where="hidden_size")


def _check_tables(config: PretrainConfig) -> None:
    for number, item in enumerate(config.data):
        if isinstance(item, Mapping):
            _expect_table(f"data[{number}]", item, _DATA_KEYS, required=("path",))
    for number, item in enumerate(config.probe):
        if not isinstance(item, Mapping):
            raise ConfigError(
                f"{item!r:.80}; expected a table with {', '.join(_PROBE_KEYS)}", where=f"probe[{number}]"
            )
        _expect_table(f"probe[{number}]", item, _PROBE_KEYS, required=("path", "label"))
    for name in config.allow_change:
        if name not in [f.name for f in fields(config)] and name != "data":
            unknown = unknown_settings({str(name): None}, [f.name for f in fields(config)])
            raise ConfigError(f"no such setting: {unknown}", where="allow_change")


def _expect_table(where: str, item: Mapping[str, Any], known: Sequence[str], required: Sequence[str]) -> None:
    unknown = unknown_settings(item, known)
    if unknown:
        raise ConfigError(f"unknown keys: {unknown}; known are {', '.join(known)}", where=where)
    for key in required:
        if key not in item:
            raise ConfigError(f"has no {key!r}", where=where)
    for key in ("keep", "held_out"):
        chosen = item.get(key)
        if chosen is not None and not (
            isinstance(chosen, Mapping)
            and all(isinstance(values, list | tuple) for values in chosen.values())
        ):
            raise ConfigError(
                f"{chosen!r:.80}; expected a table of obs columns, each with a list of values",
                where=f"{where}.{key}",
            )


def _check_machine(config: PretrainConfig) -> None:
    if config.shard_size is not None and config.parallel != "hsdp":
        raise ConfigError(
            f"{config.shard_size} with parallel = {config.parallel!r}; only 'hsdp' has shard groups",
            where="shard_size",
        )
    if config.shuffle_window < config.shuffle_block:
        raise ConfigError(
            f"{config.shuffle_window} is less than shuffle_block = {config.shuffle_block}",
            where="shuffle_window",
        )
    try:
        resolve_device(config.device)
    except InvalidArgumentError as error:
        raise ConfigError(error.message, where="device") from error


def _expect_whole(name: str, value: Any, least: int, most: int) -> None:
    if value is None and name in _OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{value!r:.80}; expected a whole number from {least:,} to {most:,}", where=name)


def _expect_number(name: str, value: Any, least: float, inclusive: bool, below: float) -> None:
    if value is None and name in _OPTIONAL:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (least <= value < below) or (value == least and not inclusive):
        lower = f"from {least:g}" if inclusive else f"above {least:g}"
        raise ConfigError(f"{value!r:.80}; expected a number {lower} to below {below:g}", where=name)
