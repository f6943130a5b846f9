"""Gene medians of a corpus: what rank-value encoding divides by.

The median over the cells that express a gene (non-zero counts) of its CP10k value, exactly what the tokenizer
will divide: the same library size, the same cells, columns of one gene summed where the tokenizer sums them.
Exact, not sketched: every value is kept until the end, 8 bytes a non-zero count and 24 more while sorting.
Source: the authors' corpus medians, which are t-digest estimates of the same quantity.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from scfm import _native
from scfm.data.csr import CsrBlock


class GeneMedians:
    """Collects blocks; ``medians()`` then gives float64 (genes,), NaN where no cell expressed the gene."""

    def __init__(self, num_genes: int) -> None:
        self.num_genes = num_genes
        self._genes: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(
        self,
        block: CsrBlock,
        column_gene: np.ndarray,
        *,
        library_size: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        sum_columns: bool = False,
    ) -> None:
        """column_gene: int32 (columns,), the gene each column counts for, or -1. library_size: (cells,),
        default the row sums; rows: bool (cells,), those that count; sum_columns: add columns of one gene.
        """
        sizes = _native.row_sums(block.indptr, block.data) if library_size is None else library_size
        cells = np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
        genes = column_gene[block.indices]
        kept = (genes >= 0) & (block.data != 0)
        if rows is not None:
            kept &= rows[cells]
        counts, cells, genes = block.data[kept].astype(np.float64), cells[kept], genes[kept]
        if sum_columns:
            shape = (block.num_cells, self.num_genes)
            summed = sp.coo_matrix((counts, (cells, genes)), shape=shape).tocsr()
            counts, genes = summed.data, summed.indices
            cells = np.repeat(np.arange(block.num_cells), np.diff(summed.indptr))
        self._genes.append(genes.astype(np.int32))
        self._values.append((counts / sizes[cells] * 1e4).astype(np.float32))

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
