"""A few cells of three kinds, and the genes that the tiny model knows."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

GENES = [f"ENSG{i:011d}" for i in range(1, 121)]


def counts_of(num_cells: int = 40, num_genes: int = 120, *, seed: int = 0) -> sp.csr_matrix:
    """Raw counts with three kinds of cells; every cell expresses something."""
    generator = np.random.default_rng(seed)
    kinds = generator.gamma(0.3, 4.0, size=(3, num_genes)) + 0.05
    counts = generator.poisson(kinds[np.arange(num_cells) % 3]).astype(np.float32)
    counts[:, 0] += 1
    return sp.csr_matrix(counts)
