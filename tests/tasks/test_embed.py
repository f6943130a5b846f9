"""scfm.tl.embed writes where scanpy users look, with provenance that survives a round trip to disk."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import scfm
from scfm.errors import InvalidArgumentError


def test_writes_obsm_and_provenance(tiny_model, tiny_adata, tmp_path) -> None:
    before = tiny_adata.X.copy()
    assert scfm.tl.embed(tiny_adata, tiny_model) is None
    X = tiny_adata.obsm["X_geneformer"]
    np.testing.assert_array_equal(X, tiny_model.embed(tiny_adata))
    assert (before != tiny_adata.X).nnz == 0
    facts = tiny_adata.uns["scfm"]["X_geneformer"]
    assert (facts["layer"], facts["pooling"], facts["dtype"]) == (-1, "cls", "float32")
    assert facts["tokenization"]["report"]["coverage"]["share_of_counts"] == 1.0
    tiny_adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(again.obsm["X_geneformer"], X)
    assert again.uns["scfm"]["X_geneformer"]["family"] == "geneformer"


def test_two_embeddings_stand_side_by_side(tiny_model, tiny_adata) -> None:
    copy = scfm.tl.embed(tiny_adata, tiny_model, pooling="mean", key_added="X_mean", copy=True)
    assert "X_mean" not in tiny_adata.obsm
    scfm.tl.embed(copy, tiny_model)
    assert set(copy.uns["scfm"]) == {"X_mean", "X_geneformer"} == set(copy.obsm)


def test_rows_cannot_be_skipped(tiny_model, tiny_adata) -> None:
    with pytest.raises(InvalidArgumentError, match="skip"):
        scfm.tl.embed(tiny_adata, tiny_model, on_bad_cell="skip")


def test_state_embeddings_are_means_and_medians(tiny_model, tiny_adata) -> None:
    with pytest.raises(InvalidArgumentError, match=r"scfm\.tl\.embed"):
        scfm.tl.state_embeddings(tiny_adata, "kind")
    scfm.tl.embed(tiny_adata, tiny_model)
    X = tiny_adata.obsm["X_geneformer"]
    means = scfm.tl.state_embeddings(tiny_adata, "kind")
    medians = scfm.tl.state_embeddings(tiny_adata, "kind", statistic="median")
    for kind in tiny_adata.obs["kind"].unique():
        cells = X[(tiny_adata.obs["kind"] == kind).to_numpy()]
        np.testing.assert_allclose(means[kind], cells.mean(0), atol=1e-6)
        middle = np.sort(cells, axis=0)[(len(cells) - 1) // 2]
        np.testing.assert_array_equal(medians[kind], middle)
    with pytest.raises(InvalidArgumentError, match="colour"):
        scfm.tl.state_embeddings(tiny_adata, "colour")
