"""Medians of genes: those of the definition, over what the tokenizer ranks."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import scfm
from scfm.data.gene_tables import human_symbols
from scfm.train.corpus.corpus import build_dictionaries
from scfm.train.corpus.gene_medians import GeneMedians


def test_medians_equal_the_definition(tiny_adata) -> None:
    source = scfm.read(tiny_adata)
    collected = GeneMedians(tiny_adata.n_vars)
    for block in source.blocks(block_size=7):
        collected.add(block, np.arange(tiny_adata.n_vars, dtype=np.int32))
    dense = tiny_adata.X.toarray().astype(np.float64)
    cp10k = dense / dense.sum(1, keepdims=True) * 1e4
    for gene, median in enumerate(collected.medians()):
        expressed = cp10k[dense[:, gene] > 0, gene]
        assert median == pytest.approx(np.median(expressed), rel=1e-6) if expressed.size else np.isnan(median)


def test_medians_are_of_what_the_tokenizer_ranks() -> None:
    """The same library size, columns summed where it sums them, and training cells only."""
    gene, other = sorted({gene for several in human_symbols().values() for gene in several})[:2]
    adata = ad.AnnData(sp.csr_matrix(np.float32([[2, 3, 5], [1, 1, 8], [9, 9, 0]])))
    adata.var_names = [gene, f"{gene}.5", other]
    adata.obs["n_counts"] = [100.0, 50.0, 10.0]
    held_out = [np.array([False, False, True])]
    vocab = build_dictionaries([scfm.read(adata)], version="V2", held_out=held_out)
    assert vocab.median[gene] == pytest.approx((500 + 400) / 2)
    assert vocab.median[other] == pytest.approx((500 + 1600) / 2)
