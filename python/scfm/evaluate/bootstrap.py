"""Is a difference between two methods larger than the luck of the test set?

Both methods are scored on the same cells (or masked positions), so the differences are resampled, not the
scores: what is hard for both cancels. Positions of one cell are not independent; with ``groups`` whole
cells are resampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm.errors import InvalidArgumentError
from scfm.evaluate.split import keyed_generator

__all__ = ["Interval", "paired_bootstrap"]


@dataclass(frozen=True)
class Interval:
    """Mean difference with its percentile interval (95 % unless asked otherwise)."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of ``first - second`` over items, with a percentile bootstrap interval.

    first, second: one number an item (correct or not, loss in nats); groups: the cell of each item,
    resampled whole. Raises InvalidArgumentError when lengths differ or there is nothing to resample.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if np.shape(first) != np.shape(second) or difference.ndim != 1 or difference.size == 0:
        raise InvalidArgumentError(
            f"paired items are needed, found shapes {np.shape(first)} and {np.shape(second)}",
            where="paired_bootstrap",
        )
    if groups is None:
        codes = np.arange(difference.size)
    else:
        if np.shape(groups) != difference.shape:
            raise InvalidArgumentError(f"groups has shape {np.shape(groups)}, expected {difference.shape}")
        codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(codes, weights=difference).astype(np.float64)
    sizes = np.bincount(codes).astype(np.float64)
    means = _resampled_means(sums, sizes, num_resamples, keyed_generator(seed, "boot"))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(estimate=float(difference.mean()), low=float(low), high=float(high))


def _resampled_means(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], num_resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    means = np.empty(num_resamples)
    rows = max(1, 4_000_000 // sums.size)  # bounds memory at about 32 MB of drawn positions
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        drawn = generator.integers(0, sums.size, size=(count, sums.size))
        means[start : start + count] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means
