"""The baselines every embedding is shown beside: highly variable genes and their principal components.

From raw counts as CSR arrays: log1p of counts per 10,000, genes with the largest dispersion for their mean
(the "seurat" rule: log(variance / mean) of CP10k values, standardised within 20 bins of log1p mean), then
PCA. Genes and components are chosen on the TRAIN cells only; the other cells are projected. Nothing here
sees a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, sparse

from scfm.errors import InvalidArgumentError

__all__ = ["Pca", "expression_baselines", "fit_pca", "highly_variable_genes", "log1p_cp10k"]

TARGET = 10_000.0
NUM_MEAN_BINS = 20


@dataclass(frozen=True)
class Pca:
    """Principal axes: mean (genes,), components (k, genes) with orthonormal rows, variance (k,)."""

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    variance: NDArray[np.float64]

    def transform(self, matrix: Any) -> NDArray[np.float32]:
        """Scores of each row of a (cells, genes) matrix, dense or sparse: float32 (cells, k)."""
        scores = matrix @ self.components.T - self.mean @ self.components.T
        return np.asarray(scores, dtype=np.float32)


def log1p_cp10k(
    indptr: ArrayLike,
    indices: ArrayLike,
    data: ArrayLike,
    num_genes: int,
    *,
    library_size: ArrayLike | None = None,
) -> sparse.csr_matrix:
    """log1p(counts / library size * 10,000) as CSR float64 (cells, num_genes).

    library_size: counts of each cell, (cells,); the row sums unless given (give it when genes were left out
    before). A cell without counts stays zero. Raises InvalidArgumentError when a library size with counts
    is not positive.
    """
    row_ends = np.asarray(indptr, dtype=np.int64)
    values = np.asarray(data, dtype=np.float64)
    num_cells = row_ends.size - 1
    rows = np.repeat(np.arange(num_cells), np.diff(row_ends))
    sums = np.bincount(rows, weights=values, minlength=num_cells)
    sizes = sums if library_size is None else np.asarray(library_size, dtype=np.float64)
    if sizes.shape != (num_cells,):
        raise InvalidArgumentError(
            f"library_size has shape {sizes.shape}, expected ({num_cells},)", where="log1p_cp10k"
        )
    wrong = np.flatnonzero(~((sizes > 0.0) & np.isfinite(sizes)) & (sums > 0.0))
    if wrong.size:
        raise InvalidArgumentError(
            f"cell {wrong[0]} has counts but a library size of {sizes[wrong[0]]}", where="log1p_cp10k"
        )
    scale = np.divide(TARGET, sizes, out=np.zeros(num_cells), where=sums > 0.0)
    return sparse.csr_matrix(
        (np.log1p(values * scale[rows]), np.asarray(indices), row_ends), shape=(num_cells, num_genes)
    )


def highly_variable_genes(log_expression: sparse.csr_matrix, *, num_genes: int = 2000) -> NDArray[np.int64]:
    """Columns of the ``num_genes`` most variable genes for their mean, ascending; all expressed genes if
    there are fewer.

    log_expression: log1p CP10k (cells, genes), at least two cells. Source: the dispersion rule of Seurat 1
    as scanpy's ``flavor="seurat"`` states it.
    """
    num_cells = log_expression.shape[0]
    if num_cells < 2:
        raise InvalidArgumentError(f"{num_cells} cells have no variance", where="highly_variable_genes")
    linear = log_expression.copy()
    linear.data = np.expm1(linear.data)
    mean = np.asarray(linear.mean(axis=0)).ravel()
    linear.data **= 2
    variance = (np.asarray(linear.mean(axis=0)).ravel() - mean**2) * (num_cells / (num_cells - 1))
    usable = (mean > 0.0) & (variance > 1e-12 * mean**2)
    score = np.full(mean.size, -np.inf)
    score[usable] = _standardised_in_bins(
        np.log(variance[usable] / mean[usable]), np.log1p(mean[usable]), NUM_MEAN_BINS
    )
    candidates = np.flatnonzero(usable)
    best = candidates[np.argsort(-score[candidates], kind="stable")[:num_genes]]
    return np.sort(best)


def fit_pca(matrix: sparse.csr_matrix, *, num_components: int = 50) -> Pca:
    """Exact principal components of (cells, genes) by the eigenvectors of the gene covariance or, with
    fewer cells than genes, of the cell Gram matrix.

    At most min(cells - 1, genes) components. Signs are fixed: the largest loading of each is positive.
    """
    num_cells, num_genes = matrix.shape
    k = min(num_components, num_cells - 1, num_genes)
    if k < 1:
        raise InvalidArgumentError(
            f"{num_cells} cells x {num_genes} genes have no components", where="fit_pca"
        )
    mean = np.asarray(matrix.mean(axis=0), dtype=np.float64).ravel()
    if num_genes <= num_cells:
        covariance = np.asarray((matrix.T @ matrix).todense(), dtype=np.float64)
        covariance -= num_cells * np.outer(mean, mean)
        values, vectors = linalg.eigh(covariance, subset_by_index=[num_genes - k, num_genes - 1])
        components = vectors[:, ::-1].T
    else:
        centered = np.asarray(matrix.todense(), dtype=np.float64) - mean
        values, vectors = linalg.eigh(centered @ centered.T, subset_by_index=[num_cells - k, num_cells - 1])
        components = vectors[:, ::-1].T @ centered
        norm = np.linalg.norm(components, axis=1, keepdims=True)
        components /= np.where(norm > 0.0, norm, 1.0)
    largest = np.abs(components).argmax(axis=1)
    components = components * np.where(components[np.arange(k), largest] < 0.0, -1.0, 1.0)[:, None]
    return Pca(
        mean=mean, components=components, variance=np.maximum(values[::-1], 0.0) / max(num_cells - 1, 1)
    )


def expression_baselines(
    indptr: ArrayLike,
    indices: ArrayLike,
    data: ArrayLike,
    num_genes: int,
    train: ArrayLike,
    *,
    library_size: ArrayLike | None = None,
    num_variable_genes: int = 2000,
    num_components: int = 50,
) -> dict[str, NDArray[np.float32]]:
    """Baseline embeddings of every cell: ``{"PCA-50": (cells, 50), "raw HVG": (cells, genes)}``, float32.

    indptr, indices, data: raw counts, CSR over ``num_genes``; train: positions or mask of the cells that
    choose genes and components. "raw HVG" is log1p CP10k of the chosen genes.
    """
    expression = log1p_cp10k(indptr, indices, data, num_genes, library_size=library_size)
    rows = np.asarray(train)
    chosen = highly_variable_genes(expression[rows], num_genes=num_variable_genes)
    variable = expression[:, chosen]
    pca = fit_pca(variable[rows], num_components=num_components)
    return {
        f"PCA-{num_components}": pca.transform(variable),
        "raw HVG": np.asarray(variable.todense(), dtype=np.float32),
    }


def _standardised_in_bins(
    values: NDArray[np.float64], position: NDArray[np.float64], num_bins: int
) -> NDArray[np.float64]:
    """z-score of each value among those whose position falls in the same of ``num_bins`` equal bins.

    A bin with one value has no deviation: its value gets score 1, so that a lone gene is neither dropped
    nor first.
    """
    edges = np.linspace(position.min(), position.max(), num_bins + 1)[1:-1]
    bins = np.searchsorted(edges, position, side="left")
    counts = np.bincount(bins, minlength=num_bins)
    mean = np.bincount(bins, weights=values, minlength=num_bins) / np.maximum(counts, 1)
    squares = np.bincount(bins, weights=(values - mean[bins]) ** 2, minlength=num_bins)
    deviation = np.sqrt(squares / np.maximum(counts - 1, 1))
    alone = counts[bins] == 1
    scale = np.where(deviation[bins] > 0.0, deviation[bins], 1.0)
    return np.where(alone, 1.0, (values - mean[bins]) / scale)
