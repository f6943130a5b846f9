"""Settings of each family's pretraining objective, the table ``objective`` of a run, checked by name and value.

Defaults are the authors'. A run must not train something else than was asked for because of a typing error, so an
unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from scfm.errors import ConfigError

__all__ = [
    "GeneformerSettings",
    "ObjectiveSettings",
    "ScbertSettings",
    "ScfoundationSettings",
    "ScgptSettings",
    "objective_settings",
]


@dataclass(frozen=True)
class GeneformerSettings:
    """mask_ratio: share of the tokens that are chosen; of these 80 % become <mask>, 10 % a random token, 10 % stay."""

    mask_ratio: float = 0.15

    def __post_init__(self) -> None:
        _expect_number("mask_ratio", self.mask_ratio, 0.0, 1.0)


@dataclass(frozen=True)
class ScgptSettings:
    """kind: "generative" or "masked", see scgpt_pretraining.py. mask_ratio: share of a cell's genes that must be found
    out; for "generative" several, of which each cell draws one. None: 0.25, 0.5 and 0.75, and 0.4 where "masked".

    expression .. dab: weights of the parts, 0 leaving one out. second_pass_after: optimiser steps without it.
    Of "masked" alone: views: the contrast's, "dropout", "random" or "disjoint" genes; view_share: of the genes in each
    "random" one; view_tokens: most tokens of such a view, any at random; depths: least and most counts of the cell that
    it is thinned to, any order of magnitude equally likely, and most_kept: of its counts it keeps at most a share drawn
    between these. temperature: of the contrast; symmetric: each view's cells must be known in the other; batch: the
    column of obs that tells a cell's batch, for dab; within_batch: a cell need only be told from those of its batch;
    cross_mvc: mvc asks for all genes of one view from the embedding of the other, which never saw them, and not for the
    hidden ones.
    """

    kind: str = "generative"
    mask_ratio: float | list[float] | None = None
    expression: float = 1.0
    mvc: float = 1.0
    second_pass: float = 1.0
    second_pass_after: int = 1000
    expressed: float = 1.0
    mvc_expressed: float = 1.0
    ecs: float = 0.0
    cce: float = 0.0
    dab: float = 0.0
    views: Literal["dropout", "random", "disjoint"] = "dropout"
    view_share: float = 0.5
    view_tokens: int | None = None
    depths: list[float] | None = None
    most_kept: list[float] = field(default_factory=lambda: [0.6, 0.9])
    temperature: float = 0.5
    symmetric: bool = False
    batch: str | None = None
    within_batch: bool = False
    cross_mvc: bool = False

    def __post_init__(self) -> None:
        _expect_choice("kind", self.kind, ("generative", "masked"))
        _expect_choice("views", self.views, ("dropout", "random", "disjoint"))
        for name in ("expression", "mvc", "second_pass", "expressed", "mvc_expressed", "ecs", "cce", "dab"):
            _expect_number(name, getattr(self, name), 0.0, 1e6, or_low=True)
        for ratio in self.mask_ratio if isinstance(self.mask_ratio, list) else [self.mask_ratio]:
            if ratio is not None:
                _expect_number("mask_ratio", ratio, 0.0, 0.999, or_low=self.kind == "masked")
        if isinstance(self.mask_ratio, list) and (self.kind == "masked" or not self.mask_ratio):
            raise ConfigError(f"{self.mask_ratio!r}; expected one number", where="objective.mask_ratio")
        _expect_number("view_share", self.view_share, 0.0, 1.0)
        _expect_number("temperature", self.temperature, 0.0, 100.0)
        if type(self.second_pass_after) is not int or self.second_pass_after < 0:
            raise ConfigError(
                f"{self.second_pass_after!r:.60}; expected a whole number",
                where="objective.second_pass_after",
            )
        if self.batch is not None and not isinstance(self.batch, str):
            raise ConfigError(f"{self.batch!r:.60}; expected a column of obs", where="objective.batch")
        self._check_views()
        if (self.dab or self.within_batch) and self.batch is None:
            raise ConfigError(
                "dab and within_batch need the column of obs that tells a cell's batch",
                where="objective.batch",
            )
        only = _GENERATIVE_ONLY if self.kind == "masked" else _MASKED_ONLY
        for one in fields(self):
            if one.name in only and getattr(self, one.name) != one.default:
                raise ConfigError(
                    f"has no meaning where kind is {self.kind!r}", where=f"objective.{one.name}"
                )
        if not any(getattr(self, name) for name in ("expression", "mvc", "ecs", "cce", "dab")):
            raise ConfigError("every part has weight 0", where="objective")

    def _check_views(self) -> None:
        for name in ("symmetric", "within_batch", "cross_mvc"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{getattr(self, name)!r:.60}; expected true or false", where=f"objective.{name}"
                )
        two = self.cce and self.views != "dropout"
        for name in ("view_tokens", "depths", "cross_mvc"):
            if getattr(self, name) and not two:
                raise ConfigError(
                    'needs a contrast (cce) of "random" or "disjoint" views', where=f"objective.{name}"
                )
        if self.depths is not None:
            _expect_range("depths", self.depths, 1.0, 1e9)
        _expect_range("most_kept", self.most_kept, 0.0, 1.0)
        if self.view_tokens is not None and (type(self.view_tokens) is not int or self.view_tokens < 2):
            raise ConfigError(
                f"{self.view_tokens!r:.60}; expected a whole number from 2", where="objective.view_tokens"
            )

    def known_ratios(self) -> float | list[float]:
        """Shares of the genes that are unknown in generation."""
        return [0.25, 0.5, 0.75] if self.mask_ratio is None else self.mask_ratio

    def hidden_ratio(self) -> float:
        """The share of the values that is hidden."""
        assert not isinstance(self.mask_ratio, list)
        return 0.4 if self.mask_ratio is None else self.mask_ratio


@dataclass(frozen=True)
class ScbertSettings:
    """mask_ratio: share of a cell's expressed genes whose bins are asked for; replaced: of these, those hidden.

    kmax_scope: "batch" for the released code's attention, which depends on the cells of the microbatch.
    """

    mask_ratio: float = 0.15
    replaced: float = 0.9
    kmax_scope: Literal["cell", "batch"] = "cell"

    def __post_init__(self) -> None:
        _expect_number("mask_ratio", self.mask_ratio, 0.0, 1.0)
        _expect_number("replaced", self.replaced, 0.0, 1.0, or_low=True)
        _expect_choice("kmax_scope", self.kmax_scope, ("cell", "batch"))


@dataclass(frozen=True)
class ScfoundationSettings:
    """deep_cell: counts from which a cell may be down-sampled; down_sampled: how often it is. kmax_scope: as scBERT's.

    The shares of genes that are hidden are fields of the model: model.value_mask_ratio, model.zero_mask_ratio, ...
    """

    deep_cell: float = 1000.0
    down_sampled: float = 0.5
    kmax_scope: Literal["cell", "batch"] = "cell"

    def __post_init__(self) -> None:
        _expect_number("deep_cell", self.deep_cell, 0.0, 1e12, or_low=True)
        _expect_number("down_sampled", self.down_sampled, 0.0, 1.0, or_low=True)
        _expect_choice("kmax_scope", self.kmax_scope, ("cell", "batch"))


_GENERATIVE_ONLY = ("second_pass", "second_pass_after")
_MASKED_ONLY: tuple[str, ...] = (
    "expressed",
    "mvc_expressed",
    "ecs",
    "cce",
    "dab",
    "batch",
    "within_batch",
    "cross_mvc",
)
_MASKED_ONLY += ("views", "view_share", "view_tokens", "depths", "temperature", "symmetric")
ObjectiveSettings = GeneformerSettings | ScgptSettings | ScbertSettings | ScfoundationSettings
_OF_FAMILY: dict[str, Callable[..., ObjectiveSettings]] = {
    "geneformer": GeneformerSettings,
    "scgpt": ScgptSettings,
    "scbert": ScbertSettings,
    "scfoundation": ScfoundationSettings,
}


def objective_settings(family: str, given: Mapping[str, Any]) -> ObjectiveSettings:
    """The family's settings with those that are given. Raises ConfigError naming the key."""
    if family not in _OF_FAMILY:
        raise ConfigError(f"{family!r} has no pretraining objective", where="family")
    settings = _OF_FAMILY[family]
    known = [one.name for one in fields(settings())]
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


def _expect_number(name: str, found: Any, low: float, high: float, *, or_low: bool = False) -> None:
    """Above ``low`` (or equal to it) and at most ``high``."""
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if not number or not low <= found <= high or (found == low and not or_low):
        bound = f"from {low:g}" if or_low else f"above {low:g}"
        raise ConfigError(
            f"{found!r:.60}; expected a number {bound}, at most {high:g}", where=f"objective.{name}"
        )


def _expect_range(name: str, found: Any, low: float, high: float) -> None:
    """Two numbers, the lesser first, from ``low`` (not itself where it is 0) to ``high``."""
    if not isinstance(found, list) or len(found) != 2:
        raise ConfigError(f"{found!r:.60}; expected two numbers", where=f"objective.{name}")
    for number in found:
        _expect_number(name, number, low, high, or_low=low > 0)
    if found[0] > found[1]:
        raise ConfigError(f"{found!r:.60}; expected the lesser first", where=f"objective.{name}")


def _expect_choice(name: str, found: Any, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        raise ConfigError(f"{found!r:.60}; expected one of {allowed}", where=f"objective.{name}")
