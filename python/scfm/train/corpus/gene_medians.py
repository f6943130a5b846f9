"""Gene medians of a corpus: what rank-value encoding divides by.

The median over the cells that express a gene (non-zero counts) of its CP10k value, exactly what the tokenizer
will divide: the same library size, the same cells, columns of one gene summed where the tokenizer sums them.

Values are float32, and each different value of a gene is kept once with its number, so the medians are exact while
different values fit. Where they no longer do, the last bits of all values are dropped, one after another, until they
fit: values then share a bin of relative width 2^-(23 - bits dropped), whose middle stands for them. Memory is bounded,
and what comes out depends on the values alone, not on their order.
Source: the authors' corpus medians, which are t-digest estimates of the same quantity.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm import _native
from scfm.data.csr import CsrBlock

__all__ = ["GeneMedians"]

# 16 bytes each, up to three times that while more are merged in.
MOST_VALUES = 1 << 25
_MANTISSA_BITS = 23


class GeneMedians:
    """Collects blocks; ``medians()`` then gives float64 (genes,), NaN where no cell expressed the gene.

    num_bits_dropped: 0 as long as the medians are exact.
    """

    def __init__(self, num_genes: int, *, most_values: int = MOST_VALUES) -> None:
        self.num_genes = num_genes
        self.num_bits_dropped = 0
        self._most = most_values
        # Gene number above, bits of the value below: sorted keys are sorted genes, and values within them, because
        # the bits of positive floats are ordered as the floats are.
        self._keys = np.empty(0, dtype=np.uint64)
        self._numbers = np.empty(0, dtype=np.int64)
        self._new: list[NDArray[np.uint64]] = []
        self._num_new = 0

    def add(
        self,
        block: CsrBlock,
        column_gene: NDArray[np.int32],
        *,
        library_size: NDArray[np.floating] | None = None,
        rows: NDArray[np.bool_] | None = None,
        sum_columns: bool = False,
    ) -> None:
        """column_gene: int32 (columns,), the gene each column counts for, or -1. library_size: (cells,),
        default the row sums; rows: bool (cells,), those that count; sum_columns: add columns of one gene.
        """
        sizes = _native.row_sums(block.indptr, block.data) if library_size is None else library_size
        # A cell with counts and no library size is the tokenizer's to refuse, by name.
        counted = sizes > 0 if rows is None else rows & (sizes > 0)
        indptr, columns, data = block.indptr, block.indices, block.data
        if sum_columns:
            summed = self._summed(block, column_gene)
            indptr, columns, data = summed.indptr.astype(np.int64), summed.indices, summed.data
            column_gene = np.arange(self.num_genes, dtype=np.int32)
        keys = _native.gene_values(
            indptr,
            columns,
            data,
            column_gene,
            np.ascontiguousarray(sizes, dtype=np.float64),
            counted.astype(np.uint8),
        )
        self._new.append(keys)
        self._num_new += len(keys)
        # Merging only when as much has come anew as is kept costs each value a few merges at most.
        if self._num_new >= max(len(self._keys), self._most // 4):
            self._merge()

    def _summed(self, block: CsrBlock, column_gene: NDArray[np.int32]) -> sp.csr_matrix:
        """The block by genes instead of columns, float64."""
        cells = np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
        genes = column_gene[block.indices]
        kept = genes >= 0
        entries = (block.data[kept].astype(np.float64), (cells[kept], genes[kept]))
        return sp.coo_matrix(entries, shape=(block.num_cells, self.num_genes)).tocsr()

    def medians(self) -> NDArray[np.float64]:
        self._merge()
        out = np.full(self.num_genes, np.nan)
        if not len(self._keys):
            return out
        bounds = np.searchsorted(self._keys >> np.uint64(32), np.arange(self.num_genes + 1, dtype=np.uint64))
        before = np.concatenate([[0], np.cumsum(self._numbers)])
        counts = np.diff(before[bounds])
        seen = np.flatnonzero(counts)
        first = before[bounds[seen]]
        low = self._value_at(before, first + (counts[seen] - 1) // 2)
        high = self._value_at(before, first + counts[seen] // 2)
        out[seen] = (low + high) / 2
        return out

    def _value_at(self, before: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.float64]:
        """The values at places of the sorted list of all values."""
        keys = self._keys[np.searchsorted(before, places, side="right") - 1]
        bits = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        bits |= np.uint32((1 << self.num_bits_dropped) >> 1)
        return bits.view(np.float32).astype(np.float64)

    def _merge(self) -> None:
        more = np.sort(np.concatenate([*self._new, self._keys[:0]]))
        self._new, self._num_new = [], 0
        while True:
            self._keys, self._numbers = _native.merge_keys(
                self._keys, self._numbers, more, self.num_bits_dropped
            )
            if len(self._keys) <= self._most or self.num_bits_dropped == _MANTISSA_BITS:
                return
            self.num_bits_dropped += 1
            more = more[:0]
