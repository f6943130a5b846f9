"""A cell's label from its neighbours' labels, and how sure the vote was.

A voter counts 1 ("uniform"), 1 / its distance ("distance"; voters at distance 0 then decide alone), or 1 / how many
cells of the reference bear its label ("frequency"), so that rare types are not outvoted by common ones.
Source: majority voting of scGPT's reference-mapping tutorial; "frequency" is weighted_vote of its atlas index.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scfm.errors import InvalidArgumentError

__all__ = ["Ties", "Weights", "vote"]

Weights = Literal["uniform", "distance", "frequency"]
Ties = Literal["nearest", "last"]


def vote(
    codes: NDArray[np.int64],
    distances: NDArray[np.float64],
    cells_of_label: NDArray[np.int64],
    *,
    weights: Weights = "uniform",
    ties: Ties = "nearest",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The winning label of each query, int64 (queries,), and its share of the votes, float64 (queries,).

    codes, distances: (queries, k), nearest first; cells_of_label: (labels,), cells of the reference with each label.
    ties: of labels with equally many votes the one whose first voter is nearest, or the last one by name, as the
    authors' atlas index decides. Raises InvalidArgumentError.
    """
    if weights not in ("uniform", "distance", "frequency"):
        raise InvalidArgumentError(
            f'{weights!r}; expected "uniform", "distance" or "frequency"', where="weights"
        )
    if ties not in ("nearest", "last"):
        raise InvalidArgumentError(f'{ties!r}; expected "nearest" or "last"', where="ties")
    num_queries, num_labels = len(codes), len(cells_of_label)
    voters = np.ones(codes.shape) if weights != "distance" else _closeness(distances)
    places = (np.arange(num_queries)[:, None] * num_labels + codes).ravel()
    counted = np.bincount(places, weights=voters.ravel(), minlength=num_queries * num_labels)
    votes = counted.astype(np.float64).reshape(num_queries, num_labels)
    if weights == "frequency":
        # One division a label: equal shares stay equal, as sums of reciprocals would not.
        votes = votes / np.maximum(cells_of_label, 1)
    if ties == "last":
        winner = num_labels - 1 - votes[:, ::-1].argmax(axis=1)
    else:
        by_neighbor = np.take_along_axis(votes, codes, axis=1)
        winner = np.take_along_axis(codes, by_neighbor.argmax(axis=1)[:, None], axis=1)[:, 0]
    share = votes[np.arange(num_queries), winner] / votes.sum(axis=1)
    return winner.astype(np.int64), share


def _closeness(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / distance; where some are 0, 1 for these and 0 for the others."""
    same = distances <= 0.0
    closeness = 1.0 / np.where(same, 1.0, distances)
    return np.where(same.any(axis=1, keepdims=True), same.astype(np.float64), closeness)
