"""Is a cell known again from other genes of its own? Two views of each cell, and every view must find its other half.

    loss = cross-entropy of cos(first, second) / temperature over a group's cells;   accuracy: the nearest is its own

Beside a model stand chance, and principal components of train cells, genes weighted by 1 / sqrt(standard deviation).
Two halves of a cell share no gene, so the components must carry which genes go together; and as what one half has the
other lacks, a gene's mere presence would tell halves apart rather than bring them together. A view's point is therefore
made of how much more than usual each of its genes is expressed, and centred over the group. Number of components and
temperature are for the caller to choose, on train cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scfm.errors import InvalidArgumentError
from scfm.evaluate.expression_baselines import Pca, fit_pca

__all__ = ["NUM_COMPONENTS", "TEMPERATURES", "GenePca", "contrast_scores"]

TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
NUM_COMPONENTS = (10, 25, 50)
NUM_GENES = 3000
_LEAST_DEVIATION = 0.05


def contrast_scores(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    groups: NDArray[np.int64],
    *,
    temperature: float,
    symmetric: bool = True,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Nats, float64 (C,), and whether the nearest is the cell itself, bool (C,).

    first, second: (C, size), two views of the same cells; groups: int64 (C,), a cell is told from those of its own;
    symmetric: the mean of both directions. Raises InvalidArgumentError for shapes that do not fit.
    """
    if first.shape != second.shape or groups.shape != first.shape[:1]:
        raise InvalidArgumentError(
            f"views of shapes {first.shape} and {second.shape}, groups {groups.shape}",
            where="contrast_scores",
        )
    losses, correct = np.zeros(len(first)), np.zeros(len(first), dtype=bool)
    for group in np.unique(groups):
        cells = np.flatnonzero(groups == group)
        logits = _unit(first[cells]) @ _unit(second[cells]).T / temperature
        losses[cells] = _own_losses(logits)
        correct[cells] = logits.argmax(axis=1) == np.arange(len(cells))
        if symmetric:
            losses[cells] = (losses[cells] + _own_losses(logits.T)) / 2
    return losses, correct


class GenePca:
    """Principal components of train cells that any part of a cell's genes can be projected on.

    matrix: (cells, genes), log expression or whatever the views hold; at least two cells.
    """

    def __init__(self, matrix: sparse.csr_matrix) -> None:
        mean = np.asarray(matrix.mean(axis=0)).ravel()
        variance = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - mean**2
        expressed = np.bincount(matrix.indices[matrix.data != 0], minlength=matrix.shape[1])
        self.genes = np.sort(np.argsort(-variance, kind="stable")[:NUM_GENES])
        deviation = np.sqrt(np.maximum(variance[self.genes], 0.0))
        self.weight = 1.0 / np.sqrt(np.maximum(deviation, _LEAST_DEVIATION))
        self.usual = (mean * matrix.shape[0] / np.maximum(expressed, 1))[self.genes]
        weighted = sparse.csr_matrix(matrix[:, self.genes] @ sparse.diags(self.weight))
        self.pca: Pca = fit_pca(weighted, num_components=max(NUM_COMPONENTS))

    def of(
        self, view: sparse.csr_matrix, groups: NDArray[np.int64], num_components: int
    ) -> NDArray[np.float64]:
        """The views' points, (C, num_components) or fewer, around zero in each group."""
        known = sparse.csr_matrix(view[:, self.genes])
        known.data = (known.data - self.usual[known.indices]) * self.weight[known.indices]
        points = np.asarray(known @ self.pca.components[:num_components].T, dtype=np.float64)
        for group in np.unique(groups):
            points[groups == group] -= points[groups == group].mean(axis=0)
        return points


def _own_losses(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    highest = logits.max(axis=1)
    total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return np.asarray(total - np.diagonal(logits))


def _unit(points: NDArray[np.floating]) -> NDArray[np.float64]:
    norm = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(norm > 0.0, norm, 1.0), dtype=np.float64)
