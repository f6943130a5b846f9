"""Gene medians of a corpus: what rank-value encoding divides by.

The median over the cells that express a gene (non-zero counts) of its CP10k value. Exact, not sketched: every
value is kept as float32 until the end, 6 bytes a non-zero count. Source: the authors' corpus medians, which
are t-digest estimates of the same quantity.
"""

from __future__ import annotations

import numpy as np

from scfm import _native
from scfm.data.csr import CsrBlock


class GeneMedians:
    """Collects blocks; ``medians()`` then gives float64 (genes,), NaN where no cell expressed the gene."""

    def __init__(self, num_genes: int) -> None:
        self.num_genes = num_genes
        self._genes: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, block: CsrBlock, column_gene: np.ndarray) -> None:
        """column_gene: int32 (columns,), the gene each column counts for, or -1."""
        library_size = _native.row_sums(block.indptr, block.data)
        genes = column_gene[block.indices]
        kept = (genes >= 0) & (block.data != 0)
        sizes = np.repeat(library_size, np.diff(block.indptr))[kept]
        self._genes.append(genes[kept].astype(np.int32))
        self._values.append((block.data[kept] / sizes * 1e4).astype(np.float32))

    def medians(self) -> np.ndarray:
        out = np.full(self.num_genes, np.nan)
        if not self._genes:
            return out
        genes, values = np.concatenate(self._genes), np.concatenate(self._values)
        order = np.lexsort((values, genes))
        genes, values = genes[order], values[order]
        starts = np.searchsorted(genes, np.arange(self.num_genes + 1))
        counts = np.diff(starts)
        seen = np.flatnonzero(counts)
        low = values[starts[seen] + (counts[seen] - 1) // 2].astype(np.float64)
        high = values[starts[seen] + counts[seen] // 2].astype(np.float64)
        out[seen] = (low + high) / 2
        return out
