"""Gene vectors to start from: the singular vectors that numpy finds of the dense matrix, for training cells only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from scfm.errors import ConfigError
from scfm.train.config import PretrainConfig
from scfm.train.corpus.coexpression import coexpression_vectors
from scfm.train.corpus.corpus import read_corpus
from scfm.train.new_model import new_model

SMALL = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 16, "max_tokens": 64}


def some_counts(cells: int = 120, genes: int = 60) -> sparse.csr_matrix:
    """Two programmes of genes, one of which each cell has, over a noise of others."""
    rng = np.random.default_rng(0)
    rate = np.full((cells, genes), 0.6)
    rate[: cells // 2, :10] = 8.0
    rate[cells // 2 :, 10:20] = 8.0
    counts = rng.poisson(rate)
    counts[:, -3:] = 0
    counts[:5, -3] = 1  # too few cells for a vector
    return sparse.csr_matrix(counts, dtype=np.float32)


def test_they_are_the_singular_vectors_of_the_dense_matrix() -> None:
    counts = some_counts()
    size = np.asarray(counts.sum(1)).ravel().astype(np.float64)
    found = coexpression_vectors(counts, size, 4, seed=3)
    assert found.dtype == np.float32 and found.shape == (60, 4)
    genes = np.flatnonzero((counts > 0).sum(0).A1 >= 20)
    assert not found[np.setdiff1d(np.arange(60), genes)].any()
    dense = np.log1p(counts.toarray() / size[:, None] * 1e4)[:, genes]
    weight = 1 / np.sqrt(np.maximum(dense.std(0), 0.05))
    _, _, right = np.linalg.svd((dense - dense.mean(0)) * weight, full_matrices=False)
    expected = right[:4].T * weight[:, None]
    expected *= np.sign(expected[np.abs(expected).argmax(0), np.arange(4)])
    expected /= np.sqrt(np.square(expected).mean())
    np.testing.assert_allclose(found[genes], expected, atol=2e-4)
    # The first of them tells the two programmes apart.
    assert found[:10, 0].mean() * found[10:20, 0].mean() < 0


def test_counts_scale_and_seed_do_not_matter() -> None:
    counts = some_counts()
    size = np.asarray(counts.sum(1)).ravel().astype(np.float64)
    one = coexpression_vectors(counts, size, 3, seed=0)
    np.testing.assert_allclose(coexpression_vectors(counts * 3, size * 3, 3, seed=7), one, atol=2e-4)


def test_too_many_components_are_refused() -> None:
    counts = some_counts(cells=30)
    with pytest.raises(ConfigError, match="coexpression_size"):
        coexpression_vectors(counts, np.full(30, 100.0), 30, seed=0)


@pytest.fixture
def adata(tiny_adata):
    from scfm.data.gene_tables import human_symbols

    symbols = [s for s, genes in human_symbols().items() if len(genes) == 1][: tiny_adata.n_vars]
    tiny_adata.var_names = symbols
    tiny_adata.var["ensembl_id"] = [human_symbols()[s][0] for s in symbols]
    return tiny_adata


@pytest.mark.parametrize("family", ["geneformer", "scgpt", "scbert", "scfoundation"])
def test_a_gene_table_begins_with_them(family: str, adata, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("scfm.train.corpus.coexpression._LEAST_CELLS", 3)
    shape = (
        SMALL if family in ("geneformer", "scgpt") else {"num_layers": 1, "hidden_size": 16, "num_heads": 2}
    )
    settings = {**shape, "family": family, "data": [adata], "out": tmp_path, "coexpression_size": 6}
    if family == "scfoundation":
        settings["ffn_size"] = 16
        settings["model"] = {
            "decoder_size": 16,
            "decoder_layers": 1,
            "decoder_heads": 2,
            "decoder_head_dim": 8,
        }
        settings["model"]["decoder_features"] = 8
    random = PretrainConfig.from_mapping(settings)
    corpus = read_corpus(random)
    config = PretrainConfig.from_mapping({**settings, "gene_embeddings": "coexpression"})
    plain, started = (new_model(c, corpus) for c in (random, config))
    names, before = plain.gene_table_embeddings()
    _, table = started.gene_table_embeddings()
    vectors = corpus.coexpression(6)[[corpus.tokenizer.vocab.token[name] for name in names]]
    has_vector = vectors.any(axis=1)
    assert has_vector.any()
    np.testing.assert_array_equal(table[~has_vector], before[~has_vector])
    if family != "scgpt":  # whose table is told behind its norm
        ratio = table[has_vector][:, :6] / np.where(vectors[has_vector] == 0, 1, vectors[has_vector])
        ratio = ratio[vectors[has_vector] != 0]
        np.testing.assert_allclose(ratio, np.full_like(ratio, ratio.flat[0]), rtol=1e-4)
        np.testing.assert_allclose(table[has_vector][:, 6:], before[has_vector][:, 6:] * 0.1, rtol=1e-5)
    assert not np.allclose(table[has_vector], before[has_vector])
    changed = [
        n
        for (n, a), b in zip(plain.named_parameters(), started.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert len(changed) == 1


def test_held_out_cells_are_never_looked_at(adata, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("scfm.train.corpus.coexpression._LEAST_CELLS", 3)
    settings = {**SMALL, "family": "scgpt", "out": tmp_path, "held_out_fraction": 0.4}
    one = read_corpus(PretrainConfig.from_mapping({**settings, "data": [adata]}))
    other = adata.copy()
    held_out = np.flatnonzero(one.held_out)
    assert len(held_out)
    dense = other.X.toarray()
    dense[held_out] = np.roll(dense[held_out], 7, axis=1)
    other.X = sparse.csr_matrix(dense)
    two = read_corpus(PretrainConfig.from_mapping({**settings, "data": [other]}))
    np.testing.assert_array_equal(one.coexpression(4), two.coexpression(4))
