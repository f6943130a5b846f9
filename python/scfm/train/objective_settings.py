"""Settings of each family's pretraining objective, the table ``objective`` of a run, checked by name and value.

Defaults are the authors'. A run must not train something else than was asked for because of a typing error, so an
unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from scfm.errors import ConfigError

__all__ = ["GeneformerSettings", "ObjectiveSettings", "objective_settings"]


@dataclass(frozen=True)
class GeneformerSettings:
    """mask_ratio: share of the tokens that are chosen; of these 80 % become <mask>, 10 % a random token, 10 % stay."""

    mask_ratio: float = 0.15

    def __post_init__(self) -> None:
        _expect_number("mask_ratio", self.mask_ratio, 0.0, 1.0)


ObjectiveSettings = GeneformerSettings
_OF_FAMILY: dict[str, type[ObjectiveSettings]] = {"geneformer": GeneformerSettings}


def objective_settings(family: str, given: Mapping[str, Any]) -> ObjectiveSettings:
    """The family's settings with those that are given. Raises ConfigError naming the key."""
    if family not in _OF_FAMILY:
        raise ConfigError(f"{family!r} has no pretraining objective", where="family")
    settings = _OF_FAMILY[family]
    known = [field.name for field in fields(settings)]
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        near = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
        told = [
            f"{name!r}" + "".join(f" (did you mean {found!r}?)" for found in near[name]) for name in unknown
        ]
        raise ConfigError(
            f"unknown settings of {family}'s objective: {', '.join(told)}; known are {', '.join(known)}",
            where="objective",
        )
    return settings(**given)


def _expect_number(name: str, found: Any, low: float, high: float) -> None:
    """Above ``low`` and at most ``high``."""
    if isinstance(found, bool) or not isinstance(found, int | float) or not low < found <= high:
        raise ConfigError(
            f"{found!r:.60}; expected a number above {low:g}, at most {high:g}", where=f"objective.{name}"
        )
