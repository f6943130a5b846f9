"""scFoundation's pretraining objective: the authors' loss, and sums that do not know of microbatches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import scfm
from models import scfoundation_cells
from models.scfoundation_cells import GENES, NUM_GENES, counts
from scfm.models.scfoundation.model import Scfoundation
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.train.config import PretrainConfig
from scfm.train.objectives import hide_genes, read_depth_loss
from scfm.train.objectives.protocol import make_objective, new_model
from scfm.train.objectives.scfoundation_pretraining import ReadDepthCells

pytestmark = pytest.mark.filterwarnings("ignore::scfm.ScfmWarning")
TERM = "hidden_genes"


def objective_of(model, **objective):
    return make_objective(PretrainConfig(family="scfoundation", seed=5, objective=objective), model)


@pytest.mark.golden
def test_the_loss_is_the_authors(goldens) -> None:
    stored = scfoundation_cells.Goldens(goldens("scfoundation"))
    model = stored.load("gene")
    cells = model.tokenize(stored.counts()).select([0, 1])
    rows, columns = (torch.from_numpy(x.astype(np.int64)) for x in stored["masked/mask_rc"])
    owner = torch.repeat_interleave(torch.arange(2), cells.lengths.long())
    truth = torch.zeros(2, model.config.vocab_size)
    truth[owner, cells.token_ids.long()] = cells.values
    masked = torch.zeros_like(truth, dtype=torch.bool)
    masked[rows, columns] = True
    kept = ~masked[owner, cells.token_ids.long()]
    shown = [
        [part[kept & (owner == cell)].tolist() for cell in (0, 1)] for part in (cells.token_ids, cells.values)
    ]
    late = [columns[rows == cell].tolist() for cell in (0, 1)]
    prepared = ReadDepthCells(
        scfm.PackedCells.from_lists(*shown),
        {TERM: len(rows)},
        0,
        0,
        scfm.PackedCells.from_lists(late, [[model.config.mask_value] * len(one) for one in late]),
        rows,
        columns,
        truth[rows, columns],
    )
    with torch.no_grad():
        loss = objective_of(model, kmax_scope="batch").losses(prepared)[TERM] / len(rows)
    assert loss.item() == pytest.approx(float(stored["masked/mse_masked"]), abs=1e-5)


def test_sums_of_microbatches_add_up() -> None:
    model = scfoundation_cells.model(variant="gene")
    adata = counts(30, seed=2)
    adata.X = (adata.X * 20).tocsr()
    packed = model.tokenize(adata)
    objective = objective_of(model, deep_cell=500.0, down_sampled=0.8)
    whole = objective.prepare(packed, epoch=2)
    order = np.random.default_rng(0).permutation(packed.num_cells)
    parts = [objective.prepare(packed.select(some), epoch=2) for some in np.array_split(order, 3)]
    assert sum(part.counts[TERM] for part in parts) == whole.counts[TERM] > 0
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    assert whole.planned_tokens == int(objective.lengths_of(packed).sum())
    assert (
        whole.num_cells * model.config.vocab_size
        < whole.num_tokens
        <= int(objective.lengths_of(packed).sum())
    )
    with torch.no_grad():
        total = sum(objective.losses(part)[TERM].item() for part in parts)
        assert total == pytest.approx(objective.losses(whole)[TERM].item(), rel=1e-5)
        hidden = hide_genes(packed, model, seed=5, epoch=2, deep_cell=500.0, down_sampled=0.8)
        mean = read_depth_loss(model, hidden)
    assert total / whole.counts[TERM] == pytest.approx(mean.item(), rel=1e-5)


def test_every_weight_but_paddings_is_trained() -> None:
    model = scfoundation_cells.model(variant="gene")
    objective = objective_of(model)
    objective.losses(objective.prepare(model.tokenize(counts(30, seed=2)), epoch=0))[TERM].backward()
    untrained = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert untrained == {"token_emb.emb_pad.weight"}


def test_a_new_model_is_saved_with_what_it_needs(tmp_path) -> None:
    corpus = SimpleNamespace(tokenizer=scfm.ScfoundationTokenizer(ScfoundationGenes.of(GENES)))
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 16, "dropout": 0.0}
    decoder = {
        "decoder_size": 8,
        "decoder_layers": 1,
        "decoder_heads": 1,
        "decoder_features": 8,
        "num_bins": 10,
    }
    config = PretrainConfig(family="scfoundation", **shape, model=decoder)
    model = new_model(config, corpus)
    assert isinstance(model, Scfoundation) and model.config.num_genes == NUM_GENES
    again = scfm.load(model.save(tmp_path / "model"), dtype="float32")
    adata = counts(8)
    np.testing.assert_array_equal(again.embed(adata), model.embed(adata))
    assert make_objective(config, again).prepare(again.tokenize(adata), epoch=0).num_cells == 8
