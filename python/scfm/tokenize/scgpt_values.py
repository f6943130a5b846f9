"""What stands for "no token" and "hidden" among scGPT's values, and how many ids a table of values needs.

Continuous values leave room below zero; values that are rows of a table need rows of their own, behind the bins.
Source: the authors' fine-tuning scripts.
"""

from __future__ import annotations

from dataclasses import dataclass

from scfm.errors import ConfigError

__all__ = ["ValueCodes", "value_codes"]


@dataclass(frozen=True)
class ValueCodes:
    """pad_value: of padding and, in pretraining, of <cls>; mask_value: of a hidden value; num_value_ids: rows of the
    table of values, None where values are no ids.
    """

    pad_value: float
    mask_value: float
    num_value_ids: int | None


def value_codes(value_style: str, input_style: str = "binned", num_bins: int = 51) -> ValueCodes:
    """The authors' codes: -2 and -1, or num_bins and num_bins + 1 for "category".

    value_style: "continuous", "category" or "scaling"; input_style: "binned", "log1p" or "normed_raw". Raises
    ConfigError where they contradict each other: a table of values needs bins, and scaling by bins means nothing.
    """
    known = {
        "value_style": ("continuous", "category", "scaling"),
        "input_style": ("binned", "log1p", "normed_raw"),
    }
    for name, given in (("value_style", value_style), ("input_style", input_style)):
        if given not in known[name]:
            raise ConfigError(f"{given!r}; expected one of {known[name]}", where=name)
    if value_style == "category" and input_style != "binned":
        raise ConfigError(
            f"{input_style!r} gives continuous values; {value_style!r} takes rows of a table",
            where="input_style",
            hint='Give input_style="binned", or value_style="continuous".',
        )
    if value_style == "scaling" and input_style == "binned":
        raise ConfigError(
            'bins are no amounts to scale by; "scaling" takes continuous values',
            where="input_style",
            hint='Give input_style="log1p" or "normed_raw".',
        )
    if value_style == "category":
        return ValueCodes(float(num_bins), float(num_bins + 1), num_bins + 2)
    return ValueCodes(-2.0, -1.0, None)
