"""Gene vectors to start from: genes that vary together over the training cells get vectors that lie together.

The leading right singular vectors of the cells' log1p CP10k values, genes centred and weighted by 1 / sqrt(standard
deviation), so that neither the loudest genes nor the noise of rare ones decide. A model whose gene table starts there
need not find in its first epochs what a matrix product can tell it, which is what makes small corpora enough; training
then goes on from it. In the same spirit scBERT starts from gene2vec, vectors of genes by co-expression.

Up to MOST_CELLS training cells are looked at, chosen by (seed, cell). Genes that too few of them express get zeros.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, svds

from scfm.data.csr import CsrBlock
from scfm.errors import ConfigError

__all__ = ["MOST_CELLS", "coexpression_vectors", "counts_by_token"]

MOST_CELLS = 20_000
_LEAST_CELLS = 20  # that express a gene
_LEAST_DEVIATION = 0.05
_PURPOSE = 0x636F6578  # "coex"


def counts_by_token(block: CsrBlock, column_tokens: NDArray[np.int32], num_tokens: int) -> sparse.csr_matrix:
    """The block's counts, (cells, num_tokens): columns of one token are added, those without one left out."""
    tokens = column_tokens[block.indices]
    known = tokens >= 0
    cells = np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
    entries = (block.data[known].astype(np.float64), (cells[known], tokens[known]))
    return sparse.csr_matrix(entries, shape=(block.num_cells, num_tokens))


def coexpression_vectors(
    counts: sparse.csr_matrix,
    library_size: NDArray[np.float64],
    num_components: int,
    *,
    seed: int,
) -> NDArray[np.float32]:
    """float32 (genes, num_components), columns by falling singular value, root mean square 1 over genes with vectors.

    counts: raw, (cells, genes); library_size: float64 (cells,). A component's sign makes its largest entry positive.
    Raises ConfigError for fewer cells or genes than the components need.
    """
    matrix = sparse.csr_matrix(counts, dtype=np.float64, copy=True)
    cell = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    matrix.data = np.log1p(matrix.data / library_size[cell] * 1e4)
    seen = np.bincount(matrix.indices[matrix.data > 0], minlength=matrix.shape[1])
    genes = np.flatnonzero(seen >= _LEAST_CELLS)
    if min(matrix.shape[0], len(genes)) <= num_components:
        raise ConfigError(
            f"{num_components} components of {matrix.shape[0]:,} cells and {len(genes):,} genes that {_LEAST_CELLS} of "
            "them express; there must be fewer",
            where="coexpression_size",
        )
    matrix = matrix[:, genes]
    mean = np.asarray(matrix.mean(axis=0)).ravel()
    variance = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - mean**2
    weight = 1.0 / np.sqrt(np.maximum(np.sqrt(np.maximum(variance, 0.0)), _LEAST_DEVIATION))
    weighted = sparse.csr_matrix(matrix @ sparse.diags(weight))
    components = _leading(weighted, mean * weight, num_components, seed)
    loadings = components * weight[:, None]
    loadings *= np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(num_components)])
    vectors = np.zeros((counts.shape[1], num_components), dtype=np.float32)
    vectors[genes] = loadings / np.sqrt(np.square(loadings).mean())
    return vectors


def _leading(
    matrix: sparse.csr_matrix, mean: NDArray[np.float64], num_components: int, seed: int
) -> NDArray[np.float64]:
    """Right singular vectors (genes, num_components) of the centred matrix, which is never made."""
    centred = LinearOperator(
        matrix.shape,
        matvec=lambda x: matrix @ x.ravel() - mean @ x.ravel(),
        rmatvec=lambda x: matrix.T @ x.ravel() - mean * x.sum(),
        dtype=np.float64,
    )
    start = np.random.Generator(np.random.Philox(key=[seed, _PURPOSE])).standard_normal(min(matrix.shape))
    _, values, right = svds(centred, k=num_components, v0=start)
    found: NDArray[np.float64] = right[np.argsort(-values)].T
    return found
