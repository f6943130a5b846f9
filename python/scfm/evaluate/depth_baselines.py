"""What imputation of expression must beat: the counts themselves, scaled, and averaged over similar cells.

Where a part of a cell's counts was hidden, every method says how the hidden part is spread over the genes, and is
scored against it cell by cell. The counts that were left are a strong opponent: they are drawn from the same cell.
Source: the thinning ("molecular cross-validation") of Batson, Royer & Webber 2019; kNN smoothing: Wagner et al. 2018.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scfm.errors import InvalidArgumentError
from scfm.evaluate.expression_baselines import fit_pca, highly_variable_genes, log1p_cp10k
from scfm.evaluate.neighbors import nearest_neighbors

__all__ = ["cell_correlations", "cell_errors", "log_profiles", "shares_of", "smoothed_over_neighbors"]

_TARGET = 10_000.0
_NUM_COMPONENTS = 50
_NUM_VARIABLE = 2000


def shares_of(amounts: sparse.csr_matrix | NDArray[np.float64]) -> sparse.csr_matrix:
    """Each cell's amounts over its total, CSR float64 (cells, genes). Raises InvalidArgumentError for an empty cell."""
    matrix = sparse.csr_matrix(amounts, dtype=np.float64)
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    empty = np.flatnonzero(~(totals > 0))
    if empty.size:
        raise InvalidArgumentError(f"cell {empty[0]} has no counts", where="amounts")
    return sparse.csr_matrix(sparse.diags(1.0 / totals) @ matrix)


def log_profiles(shares: sparse.csr_matrix) -> sparse.csr_matrix:
    """ln(1 + 10,000 share)."""
    found = sparse.csr_matrix(shares * _TARGET)
    found.data = np.log1p(found.data)
    return found


def smoothed_over_neighbors(counts: sparse.csr_matrix, *, num_neighbors: int) -> sparse.csr_matrix:
    """Shares of each cell's genes, averaged over the cells nearest to it (itself the first) by what was left to see.

    Nearest in 50 principal components of log counts of the variable genes.
    """
    matrix = sparse.csr_matrix(counts, dtype=np.float64)
    num_cells = matrix.shape[0]
    logged = log1p_cp10k(matrix.indptr, matrix.indices, matrix.data, matrix.shape[1])
    variable = logged[:, highly_variable_genes(logged, num_genes=_NUM_VARIABLE)]
    points = fit_pca(variable, num_components=_NUM_COMPONENTS).transform(variable)
    nearest, _ = nearest_neighbors(points, points, k=min(num_neighbors, num_cells), metric="euclidean")
    rows = np.repeat(np.arange(num_cells), nearest.shape[1])
    weights = np.full(nearest.size, 1.0 / nearest.shape[1])
    average = sparse.csr_matrix((weights, (rows, nearest.ravel())), shape=(num_cells, num_cells))
    return sparse.csr_matrix(average @ shares_of(matrix))


def cell_errors(predicted: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean squared error of each cell over its genes, (cells,)."""
    return np.asarray(np.mean((predicted - truth) ** 2, axis=1))


def cell_correlations(predicted: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's correlation of each cell over its genes, (cells,); 0 where one of them is constant."""
    first = predicted - predicted.mean(axis=1, keepdims=True)
    second = truth - truth.mean(axis=1, keepdims=True)
    size = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    product = (first * second).sum(axis=1)
    found: NDArray[np.float64] = np.divide(product, size, out=np.zeros_like(product), where=size > 0)
    return found
