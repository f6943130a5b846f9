"""Which token budget suits the lengths of a corpus: what is left of it where cells of like length do not divide it.

A plan never exceeds its budget, so where most cells have the same length (cut to max_tokens, or a whole panel of genes)
a budget that is no multiple of it leaves the rest of every microbatch unused, however cells are packed. Then the
nearest budget that they do fill is named.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from scfm import _native

__all__ = ["MOST_UNUSED", "better_budget", "unused_share"]

# Of the budget; what is more deserves to be told.
MOST_UNUSED = 0.02
_SAMPLE = 4096
# Budgets that are tried: from half to twice, in these steps, and multiples of the commonest length.
_FARTHEST = 2.0
_STEPS = 64
# A hundredth less unused is worth a budget that is farther off by this many hundredths.
_WEIGHT = 5


def unused_share(lengths: NDArray[np.unsignedinteger], token_budget: int) -> float:
    """Of the budgets of full microbatches of these cells: what no token fills. lengths: 1 to token_budget."""
    longest_first = np.sort(lengths.astype(np.int64))[::-1]
    used = np.bincount(
        _native.first_fit(np.ascontiguousarray(longest_first), token_budget), weights=longest_first
    )
    # The last one is not full for want of cells, which says nothing of the budget.
    used = np.sort(used)[1:] if len(used) > 1 else used
    return 1.0 - float(used.mean()) / token_budget if len(used) else 0.0


def better_budget(lengths: NDArray[np.unsignedinteger], token_budget: int) -> tuple[float, int, float] | None:
    """What this budget leaves unused, a better one, and what that leaves; None where this one is good enough.

    lengths: of cells that are trained on. Of the budgets that leave at most 2 % a near one is taken, else the one that
    leaves least.
    """
    sample = lengths[:: max(len(lengths) // _SAMPLE, 1)]
    unused = unused_share(sample, token_budget)
    if unused <= MOST_UNUSED:
        return None
    found = [(unused_share(sample, budget), budget) for budget in _candidates(sample, token_budget)]
    good = [(share, budget) for share, budget in found if share <= MOST_UNUSED]
    if good:
        share, budget = min(good, key=lambda one: abs(math.log(one[1] / token_budget)) + _WEIGHT * one[0])
        return unused, budget, share
    share, budget = min(found, default=(unused, token_budget))
    return (unused, budget, share) if share < unused / 2 else None


def _candidates(lengths: NDArray[np.unsignedinteger], token_budget: int) -> list[int]:
    commonest = int(np.bincount(lengths).argmax())
    multiples = np.arange(1, int(_FARTHEST * token_budget) // commonest + 1) * commonest
    steps = token_budget * _FARTHEST ** np.linspace(-1, 1, _STEPS)
    tried = np.union1d(multiples[-_STEPS:], np.ceil(steps).astype(np.int64))
    longest = int(lengths.max())
    return [int(b) for b in tried if max(longest, token_budget / _FARTHEST) <= b <= token_budget * _FARTHEST]
