"""scfm.tl.attention: a table of genes by groups, from sums that equal those of the whole attention maps."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scfm
from models.scbert_goldens import largest, pack
from scfm.errors import InvalidArgumentError
from scfm.models.scbert.attention_sums import attention_sums
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from scfm.ops.favor_attention import EPS
from scfm.tasks.attention import attention
from scfm.tokenize.scbert_panel import ScbertPanel

GENES = [f"GENE{number}" for number in range(60)]
SHAPE = {
    "num_genes": 60,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 3,
    "head_dim": 8,
    "num_features": 20,
}


@pytest.fixture(scope="module")
def model() -> Scbert:
    return Scbert.from_config(ScbertConfig(**SHAPE), ScbertPanel(GENES))


@pytest.fixture
def adata() -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(0.7, (9, 60)).astype(np.float32)
    counts[8] = 0
    obs = pd.DataFrame(
        {"type": ["B", "T", "B", "T", None, "B", "T", "T", "B"]}, index=[f"c{i}" for i in range(9)]
    )
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


def quadratic(model: Scbert, tokens: np.ndarray) -> torch.Tensor:
    """The authors' way: every map, then its sum."""
    hidden = model.embed_bins(torch.from_numpy(tokens)[None]).double()
    offsets = torch.tensor([0, len(hidden)], dtype=torch.int32)
    out = torch.zeros(len(hidden), dtype=torch.float64)
    for block in model.performer.blocks():
        hidden = hidden + block.attention_branch(hidden.float(), offsets).double()
        q, k, _ = (x.double() for x in block.attention.qkv(block.normed(hidden.float())))
        weights = block.attention.projection_matrix.double()
        c = weights.shape[1] ** -0.25
        a_q, a_k = (torch.einsum("ihd,fd->hif", c * x, weights) for x in (q, k))
        n_q, n_k = ((c * x).square().sum(-1).T.unsqueeze(-1) / 2 for x in (q, k))
        q_features = torch.exp(a_q - n_q - a_q.amax(-1, keepdim=True)) + EPS
        k_features = torch.exp(a_k - n_k - a_k.amax()) + EPS
        maps = q_features @ k_features.transpose(1, 2)
        out += (maps / maps.sum(-1, keepdim=True)).mean(dim=(0, 1))
        hidden = hidden + block.ffn_branch(hidden.float()).double()
    return out / out.sum()


def test_sums_of_whole_maps(model) -> None:
    rng = np.random.default_rng(1)
    tokens = np.where(rng.random((3, 61)) < 0.3, rng.integers(1, 6, (3, 61)), 0)
    with torch.no_grad():
        found = attention_sums(model, pack(tokens))
        for cell in range(3):
            wanted = quadratic(model, tokens[cell])
            assert largest(found[cell], wanted) <= 1e-5 * float(wanted.max())
    assert largest(found.sum(dim=1), torch.ones(3)) < 1e-5


def test_table(model, adata) -> None:
    attention(adata, model, groupby="type")
    table = adata.uns["attention_scbert"]
    assert table.columns.tolist() == ["B", "T"]
    assert table.index.tolist() == GENES
    packed = model.tokenize(adata)
    with torch.no_grad():
        shares = attention_sums(model, packed)[:, :-1].double()
    of_b = shares[[0, 2, 5]].mean(dim=0)
    assert largest(table["B"].to_numpy(), of_b) < 1e-9
    copied = attention(adata, model, key_added="all_cells", copy=True)
    assert copied.uns["all_cells"].columns.tolist() == ["all"]
    assert "all_cells" not in adata.uns
    assert largest(copied.uns["all_cells"]["all"].to_numpy(), shares.mean(dim=0)) < 1e-9


def test_wrong_arguments(model, adata) -> None:
    with pytest.raises(InvalidArgumentError, match="groupby"):
        attention(adata, model, groupby="absent")
    other = Scbert.from_config(ScbertConfig(**SHAPE, attention="unprojected"), ScbertPanel(GENES))
    with pytest.raises(InvalidArgumentError, match="unprojected"):
        attention(adata, other)
    adata.obs["type"] = None
    with pytest.raises(InvalidArgumentError, match="no cell"):
        attention(adata, model, groupby="type")
    with pytest.raises(scfm.ScfmError):
        attention(adata, object())
