"""Agreement of clusters with labels: k-means with as many clusters as labels, then NMI and ARI.

NMI = I(U; V) / mean(H(U), H(V)) (arithmetic mean, natural log); ARI = Hubert & Arabie's Rand index
corrected for chance. Both are written out from the contingency table; only k-means itself is
scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm.errors import InvalidArgumentError, MissingDependencyError
from scfm.evaluate.arrays import check_embedding, encode_labels

__all__ = ["ClusterScore", "adjusted_rand_index", "cluster_score", "normalized_mutual_information"]


@dataclass(frozen=True)
class ClusterScore:
    """NMI (0..1) and ARI (about 0 by chance, 1 perfect) of k-means clusters with labels."""

    nmi: float
    ari: float
    num_clusters: int
    num_cells: int


def cluster_score(
    embedding: ArrayLike,
    labels: Sequence[Any] | NDArray[Any],
    *,
    num_clusters: int | None = None,
    seed: int = 0,
    num_starts: int = 10,
) -> ClusterScore:
    """k-means of all the given cells (k = number of labels unless given), compared with the labels.

    Uses labels only to choose k and to score. Needs the extra ``evaluate``. Raises InvalidArgumentError
    when there are fewer cells than clusters.
    """
    points = check_embedding(embedding, "cluster_score")
    codes, names = encode_labels(labels, len(points), "cluster_score")
    k = len(names) if num_clusters is None else num_clusters
    if not 1 <= k <= len(points):
        raise InvalidArgumentError(f"{len(points)} cells cannot form {k} clusters", where="cluster_score")
    clusters = _k_means(points, k, seed, num_starts)
    return ClusterScore(
        nmi=normalized_mutual_information(codes, clusters),
        ari=adjusted_rand_index(codes, clusters),
        num_clusters=k,
        num_cells=len(points),
    )


def normalized_mutual_information(first: ArrayLike, second: ArrayLike) -> float:
    """I(U; V) / mean(H(U), H(V)). Two partitions of one part each agree fully: 1."""
    joint = _contingency(first, second) / float(np.size(first))
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    mean_entropy = (_entropy(rows) + _entropy(columns)) / 2.0
    if mean_entropy == 0.0:
        return 1.0
    filled = joint > 0.0
    information = float((joint[filled] * np.log(joint[filled] / np.outer(rows, columns)[filled])).sum())
    return min(max(information / mean_entropy, 0.0), 1.0)


def adjusted_rand_index(first: ArrayLike, second: ArrayLike) -> float:
    """(RI - E[RI]) / (max RI - E[RI]) over pairs of cells. Two equal trivial partitions: 1."""
    table = _contingency(first, second)
    together = _pairs(table).sum()
    rows, columns = _pairs(table.sum(axis=1)).sum(), _pairs(table.sum(axis=0)).sum()
    all_pairs = _pairs(np.array(float(np.size(first))))
    expected = rows * columns / all_pairs if all_pairs else 0.0
    largest = (rows + columns) / 2.0
    if largest == expected:
        return 1.0
    return float((together - expected) / (largest - expected))


def _k_means(points: NDArray[np.float64], k: int, seed: int, num_starts: int) -> NDArray[np.int64]:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise MissingDependencyError(
            "k-means needs scikit-learn, which is not installed",
            hint="Install it with: pip install 'scfm[evaluate]'",
        ) from error
    return np.asarray(
        KMeans(n_clusters=k, n_init=num_starts, random_state=seed).fit_predict(points), dtype=np.int64
    )


def _contingency(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(first), np.asarray(second)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise InvalidArgumentError(
            f"two labelings of the same cells are needed, found shapes {a.shape} and {b.shape}"
        )
    a_codes = np.unique(a, return_inverse=True)[1]
    b_codes = np.unique(b, return_inverse=True)[1]
    table = np.zeros((a_codes.max() + 1, b_codes.max() + 1))
    np.add.at(table, (a_codes, b_codes), 1.0)
    return table


def _entropy(probabilities: NDArray[np.float64]) -> float:
    filled = probabilities[probabilities > 0.0]
    return float(-(filled * np.log(filled)).sum())


def _pairs(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(counts * (counts - 1.0) / 2.0)
