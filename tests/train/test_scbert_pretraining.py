"""scBERT's pretraining objective: the authors' loss and gradients, and sums that do not know of microbatches."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch

import scfm
from models.scbert_goldens import genes_of, load, pack
from scfm.errors import ConfigError
from scfm.models.scbert.model import Scbert
from scfm.train.config import PretrainConfig
from scfm.train.objectives.protocol import make_objective, new_model
from scfm.train.objectives.scbert import hidden_bin_loss, hide_bins
from scfm.train.objectives.scbert_pretraining import AskedBins
from tiny_cells import counts_of

TERM = "hidden_bins"
SYMBOLS = [f"GENE{i}" for i in range(120)]
SHAPE = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seed": 5}
SHAPE |= {"family": "scbert", "model": {"head_dim": 8, "num_features": 12}}


@pytest.fixture
def cells() -> ad.AnnData:
    adata = ad.AnnData(counts_of())
    adata.var_names = SYMBOLS
    return adata


@pytest.fixture
def model() -> Scbert:
    corpus = SimpleNamespace(tokenizer=scfm.ScbertTokenizer(SYMBOLS))
    found = new_model(PretrainConfig(**SHAPE), corpus)
    assert isinstance(found, Scbert) and found.config.num_genes == 120 and found.config.head_dim == 8
    return found


def objective_of(model, **objective):
    return make_objective(PretrainConfig(family="scbert", seed=5, objective=objective), model)


@pytest.mark.golden
def test_loss_and_gradients_are_the_authors(goldens) -> None:
    folder = goldens("scbert")
    stored = np.load(folder / "tiny_pretrain.npz")
    model = load(folder / "tiny.pth", genes_of(folder, np.load(folder / "tiny_expected.npz")))
    labels = torch.from_numpy(stored["labels"]).flatten()
    rows = (labels != model.config.mask_bin).nonzero().flatten()
    packed = pack(stored["masked_input"])
    prepared = AskedBins(packed, {TERM: len(rows)}, 0, rows, labels[rows])
    loss = objective_of(model, kmax_scope="batch").losses(prepared)[TERM] / len(rows)
    assert loss.item() == pytest.approx(float(stored["loss"]), rel=1e-5)
    loss.backward()
    want = torch.from_numpy(stored["grad/to_out.weight"])
    assert (model.to_out.weight.grad - want).abs().max() <= 1e-3 * want.abs().max()


def test_sums_of_microbatches_add_up(model, cells) -> None:
    packed = model.tokenize(cells)
    objective = objective_of(model, mask_ratio=0.3)
    whole = objective.prepare(packed, epoch=2)
    order = np.random.default_rng(0).permutation(packed.num_cells)
    parts = [objective.prepare(packed.select(some), epoch=2) for some in np.array_split(order, 3)]
    assert sum(part.counts[TERM] for part in parts) == whole.counts[TERM] > 0
    assert whole.num_tokens == 40 * 121 == int(objective.lengths_of(packed).sum())
    total = sum(objective.losses(part)[TERM].item() for part in parts)
    assert total == pytest.approx(objective.losses(whole)[TERM].item(), rel=1e-5)
    mean = hidden_bin_loss(model, hide_bins(packed, model, seed=5, epoch=2, mask_ratio=0.3))
    assert total / whole.counts[TERM] == pytest.approx(mean.item(), rel=1e-5)


def test_every_weight_but_the_positions_is_trained(model, cells) -> None:
    objective = objective_of(model)
    sum(objective.losses(objective.prepare(model.tokenize(cells), epoch=0)).values()).backward()
    untrained = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert untrained == {"pos_emb"} and not model.pos_emb.requires_grad


def test_a_new_model_is_saved_with_what_it_needs(model, cells, tmp_path) -> None:
    again = scfm.load(model.save(tmp_path / "model"), dtype="float32")
    np.testing.assert_array_equal(again.embed(cells), model.embed(cells))


def test_a_model_without_a_head_for_bins_is_named(model) -> None:
    model.add_annotation_head(["A", "B"])
    with pytest.raises(ConfigError, match="has_bin_head"):
        objective_of(model)
    with pytest.raises(ConfigError, match="did you mean 'replaced'"):
        objective_of(model, replace=0.5)
