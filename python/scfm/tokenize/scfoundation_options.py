"""What scFoundation's rows are made of: how values are normalised, and the two read depths that stand behind them.

The names are those of the authors' get_embedding.py, so that a command of theirs can be said here. What each
combination means, in one table (x a value, total = sum of x over the model's genes, all logs of depths to base 10):

    input_type  pre_normalized   value                  S                  T
    singlecell  "F"              ln(1 + x/total 1e4)    log(total)         by target
    singlecell  "T"              x                      log(total)         by target     (total of LOG values)
    singlecell  "A"              x                      log(listed total)  by target
    bulk        "F"              ln(1 + x/total m)      log(sum of values) S             (m = median total of the file)
    bulk        "T"              x                      total              S             (no log)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from scfm.errors import InvalidArgumentError

__all__ = ["ScfoundationOptions", "parse_target"]

InputType = Literal["singlecell", "bulk"]
PreNormalized = Literal["F", "T", "A"]

_KINDS = {"t": "fixed", "f": "times", "a": "plus"}
_TARGET_HINT = (
    't4 is a depth of 10^4 counts, f5 five times the cell\'s own, a1 ten times (10^1) the cell\'s own: "t", "f" or '
    '"a" and a number.'
)


@dataclass(frozen=True)
class ScfoundationOptions:
    """How ScfoundationTokenizer reads its input; see there and the head of this file."""

    target: str = "t4"
    input_type: InputType = "singlecell"
    pre_normalized: PreNormalized = "F"
    total_counts: str | None = None
    bulk_target_sum: float | None = None
    arithmetic: Literal["float64", "float32"] = "float64"
    depth_tokens: Literal["authors", "error"] = "authors"
    duplicate_genes: Literal["sum", "first"] = "sum"
    gene_column: str | None = None
    gene_rules: Literal["auto", "authors", "all"] = "auto"

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[str, ...]] = {
            "input_type": ("singlecell", "bulk"),
            "pre_normalized": ("F", "T", "A"),
            "arithmetic": ("float64", "float32"),
            "depth_tokens": ("authors", "error"),
            "duplicate_genes": ("sum", "first"),
            "gene_rules": ("auto", "authors", "all"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InvalidArgumentError(f"{getattr(self, name)!r}; expected one of {values}", where=name)
        parse_target(self.target)
        if self.input_type == "bulk" and self.pre_normalized == "A":
            raise InvalidArgumentError(
                "bulk samples have no listed totals in the original",
                where="pre_normalized",
                hint='Give "F" or "T".',
            )
        if (self.pre_normalized == "A") != (self.total_counts is not None):
            raise InvalidArgumentError(
                'the column of obs with raw totals belongs to pre_normalized="A"', where="total_counts"
            )
        given = self.bulk_target_sum
        if given is not None and not (
            self.takes_median and isinstance(given, int | float) and 0 < given < math.inf
        ):
            raise InvalidArgumentError(
                f'{given!r}; expected a depth above 0, for input_type="bulk" with pre_normalized="F"',
                where="bulk_target_sum",
            )

    @property
    def takes_counts(self) -> bool:
        """Whether the values must be raw counts."""
        return self.input_type == "singlecell" and self.pre_normalized == "F"

    @property
    def takes_median(self) -> bool:
        """Whether values are scaled to the median depth of their file."""
        return self.input_type == "bulk" and self.pre_normalized == "F"

    def native(self) -> dict[str, Any]:
        """The arguments of the native tokenizer that do not depend on the source."""
        bulk, logs = self.input_type == "bulk", self.pre_normalized
        target, number = ("same", 0.0) if bulk else parse_target(self.target)
        values = {"F": "per_median" if bulk else "per_total"}.get(logs, "given")
        total = {"A": "listed"}.get(logs, "outputs" if self.takes_median else "inputs")
        return {
            "values": values,
            "total": total,
            "total_is_logged": not (bulk and logs == "T"),
            "target": target,
            "target_number": number,
            "single": self.arithmetic == "float32",
        }


def parse_target(target: str) -> tuple[str, float]:
    """ "t4" -> ("fixed", 4.0), "f5" -> ("times", 5.0), "a1" -> ("plus", 1.0). Raises InvalidArgumentError."""
    found = (
        re.fullmatch(r"([tfa])([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", target)
        if isinstance(target, str)
        else None
    )
    if found is None:
        raise InvalidArgumentError(f"{target!r:.60} is no target depth", where="target", hint=_TARGET_HINT)
    kind, number = found[1], float(found[2])
    if not math.isfinite(number) or (kind in "tf" and number <= 0):
        raise InvalidArgumentError(
            f"{target!r}: only a number above zero leaves a token for the target's depth",
            where="target",
            hint=_TARGET_HINT,
        )
    return _KINDS[kind], number
