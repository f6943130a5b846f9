"""scfm.tl.annotate: the head's likeliest types in obs, as it gives them cell by cell."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scfm
from scfm.errors import InvalidArgumentError
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from scfm.tokenize.scbert_panel import ScbertPanel

GENES = [f"GENE{number}" for number in range(60)]
TYPES = ["B", "NK", "T"]


@pytest.fixture
def model() -> Scbert:
    config = ScbertConfig(num_genes=60, hidden_size=16, num_layers=1, num_heads=2, num_features=20)
    model = Scbert.from_config(config, ScbertPanel(GENES))
    model.add_annotation_head(TYPES)
    return model


@pytest.fixture
def adata() -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(0.7, (9, 60)).astype(np.float32)
    return ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=GENES))


def test_writes_types_and_their_probabilities(adata, model, tmp_path) -> None:
    assert scfm.tl.annotate(adata, model) is None
    table = adata.obsm["cell_type_scbert_probabilities"]
    expected = model.forward(model.tokenize(adata)).cls.softmax(1).detach().numpy()
    np.testing.assert_allclose(table.to_numpy(), expected, rtol=1e-5)
    assert list(table.columns) == TYPES == list(adata.obs["cell_type_scbert"].cat.categories)
    assert (adata.obs["cell_type_scbert"] == table.idxmax(axis=1)).all()
    np.testing.assert_array_equal(adata.obs["cell_type_scbert_probability"], table.max(axis=1))
    adata.write_h5ad(tmp_path / "annotated.h5ad")


def test_unlikely_cells_are_unassigned(adata, model) -> None:
    likeliest = scfm.tl.annotate(adata, model, copy=True).obs["cell_type_scbert_probability"]
    threshold = float(likeliest.median())
    found = scfm.tl.annotate(adata, model, unassigned_below=threshold, key_added="type", copy=True)
    assert ((found.obs["type"] == "Unassigned") == (likeliest < threshold)).all()
    assert "type" not in adata.obs


def test_other_models_are_refused(adata, tiny_model) -> None:
    with pytest.raises(InvalidArgumentError, match="scBERT"):
        scfm.tl.annotate(adata, tiny_model)
