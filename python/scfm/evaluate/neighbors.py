"""Label accuracy of the k nearest training cells: does an embedding put cells of one kind together?

Exact brute force in chunks: at the sizes people evaluate, an approximate index saves little and makes the
score depend on itself. Equal distances are ordered by cell position; an equal vote goes to the label whose
first voter is nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm.errors import InvalidArgumentError
from scfm.evaluate.arrays import check_embedding, check_split, encode_labels

__all__ = ["KnnScore", "knn_label_score", "macro_f1", "nearest_neighbors"]

Distance = Literal["cosine", "euclidean"]


@dataclass(frozen=True)
class KnnScore:
    """kNN label prediction of the test cells. ``correct``: bool (test cells,), for paired comparisons."""

    accuracy: float
    macro_f1: float
    correct: NDArray[np.bool_]
    predictions: list[str]
    num_train: int
    num_test: int
    num_neighbors: int
    metric: str


def nearest_neighbors(
    queries: ArrayLike,
    references: ArrayLike,
    *,
    k: int,
    metric: Distance = "cosine",
    chunk_cells: int = 1024,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ``k`` nearest references of each query, nearest first: positions and distances, each (queries, k).

    Exact. Cosine distance is ``1 - cos`` (a zero vector has distance 1 to everything). Ties go to the lower
    position. Raises InvalidArgumentError when dimensions differ or ``k`` is not in 1..number of references.
    """
    query = check_embedding(queries, "queries")
    reference = check_embedding(references, "references")
    if query.shape[1] != reference.shape[1]:
        raise InvalidArgumentError(
            f"queries have {query.shape[1]} dimensions, references {reference.shape[1]}"
        )
    if not 1 <= k <= len(reference):
        raise InvalidArgumentError(f"k is {k}, expected 1..{len(reference)} (the number of reference cells)")
    if metric == "cosine":
        query, reference = _unit_rows(query), _unit_rows(reference)
    elif metric != "euclidean":
        raise InvalidArgumentError(f"metric is {metric!r}, expected 'cosine' or 'euclidean'")
    positions = np.empty((len(query), k), dtype=np.int64)
    distances = np.empty((len(query), k))
    for start in range(0, len(query), chunk_cells):
        rows = slice(start, start + chunk_cells)
        distance = _distances(query[rows], reference, metric)
        positions[rows] = _smallest(distance, k)
        distances[rows] = np.take_along_axis(distance, positions[rows], axis=1)
    return positions, distances


def knn_label_score(
    embedding: ArrayLike,
    labels: Sequence[Any] | NDArray[Any],
    train: ArrayLike,
    test: ArrayLike,
    *,
    k: int = 15,
    metric: Distance = "cosine",
    chunk_cells: int = 1024,
) -> KnnScore:
    """Predict each test cell's label by the vote of its ``k`` nearest train cells.

    embedding: (cells, dimensions); train, test: positions or masks without overlap (checked). Accuracy is
    over test cells; macro-F1 is the mean F1 over the labels that occur in test or among the predictions
    (scikit-learn's rule).
    """
    points = check_embedding(embedding, "knn_label_score")
    codes, names = encode_labels(labels, len(points), "knn_label_score")
    train_rows, test_rows = check_split(train, test, len(points), "knn_label_score")
    if k > train_rows.size:
        raise InvalidArgumentError(
            f"k is {k} but there are {train_rows.size} train cells", where="knn_label_score", hint="Lower k."
        )
    neighbors, _ = nearest_neighbors(
        points[test_rows], points[train_rows], k=k, metric=metric, chunk_cells=chunk_cells
    )
    predicted = _vote(codes[train_rows][neighbors], len(names))
    correct = predicted == codes[test_rows]
    return KnnScore(
        accuracy=float(correct.mean()),
        macro_f1=macro_f1(codes[test_rows], predicted),
        correct=correct,
        predictions=[names[code] for code in predicted],
        num_train=train_rows.size,
        num_test=test_rows.size,
        num_neighbors=k,
        metric=metric,
    )


def macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Mean over labels of ``2 TP / (2 TP + FP + FN)``; every label that occurs on either side counts once."""
    size = int(max(truth.max(), predicted.max())) + 1
    hits = np.bincount(truth[truth == predicted], minlength=size)
    total = np.bincount(truth, minlength=size) + np.bincount(predicted, minlength=size)
    present = total > 0
    return float((2.0 * hits[present] / total[present]).mean())


def _unit_rows(points: NDArray[np.float64]) -> NDArray[np.float64]:
    norm = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(norm > 0.0, norm, 1.0))


def _distances(
    query: NDArray[np.float64], reference: NDArray[np.float64], metric: str
) -> NDArray[np.float64]:
    product = query @ reference.T
    if metric == "cosine":
        return np.asarray(1.0 - product)
    squares = (query**2).sum(axis=1)[:, None] + (reference**2).sum(axis=1)[None, :]
    return np.asarray(np.sqrt(np.maximum(squares - 2.0 * product, 0.0)))


def _smallest(distance: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Columns of the k smallest values of each row in stable order."""
    if k == distance.shape[1]:
        return np.argsort(distance, axis=1, kind="stable")
    chosen = np.sort(np.argpartition(distance, k - 1, axis=1)[:, :k], axis=1)
    values = np.take_along_axis(distance, chosen, axis=1)
    chosen = np.take_along_axis(chosen, np.argsort(values, axis=1, kind="stable"), axis=1)
    # argpartition picks arbitrarily among values equal to the k-th; only such rows need the full sort.
    tied = np.flatnonzero((distance <= values.max(axis=1, keepdims=True)).sum(axis=1) > k)
    chosen[tied] = np.argsort(distance[tied], axis=1, kind="stable")[:, :k]
    return chosen


def _vote(neighbor_codes: NDArray[np.int64], num_labels: int) -> NDArray[np.int64]:
    """Most frequent code of each row (rows nearest first); of equal counts the one that comes first."""
    num_rows, k = neighbor_codes.shape
    cells = np.repeat(np.arange(num_rows), k) * num_labels + neighbor_codes.ravel()
    counts = np.bincount(cells, minlength=num_rows * num_labels).reshape(num_rows, num_labels)
    votes = np.take_along_axis(counts, neighbor_codes, axis=1)
    return np.take_along_axis(neighbor_codes, votes.argmax(axis=1)[:, None], axis=1)[:, 0]
