"""Geneformer's pretraining objective: the authors' loss and gradients, and sums that do not know of microbatches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import scfm
from scfm.data.packed import PackedCells
from scfm.errors import ConfigError
from scfm.models.geneformer.names import to_authors
from scfm.train.config import PretrainConfig
from scfm.train.objectives import mask_genes, masked_gene_loss
from scfm.train.objectives.geneformer_pretraining import MaskedGenes
from scfm.train.objectives.protocol import make_objective, new_model

TERM = "masked_genes"
SMALL = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "ffn_size": 32, "max_tokens": 64}


def objective_of(model, **objective):
    return make_objective(PretrainConfig(seed=5, objective=objective), model)


@pytest.mark.golden
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_loss_and_gradients_are_the_authors(goldens, version: str) -> None:
    from safetensors.torch import load_file

    folder = goldens(f"geneformer/model/{version}")
    stored = load_file(folder / "mlm_grad.safetensors")
    dictionaries = folder.parent / f"token_dictionary_{version}.json"
    model = scfm.load(folder / "hf_safetensors", dictionaries=dictionaries, dtype="float32")
    real = stored["attention_mask"].bool()
    shown, labels = stored["input_ids"], stored["labels"][real]
    packed = PackedCells.from_lists([row[keep].tolist() for row, keep in zip(shown, real, strict=True)])
    positions = (labels != -100).nonzero().flatten()
    prepared = MaskedGenes(packed, {TERM: len(positions)}, packed.num_tokens, positions, labels[positions])
    loss = objective_of(model).losses(prepared)[TERM] / prepared.counts[TERM]
    loss.backward()
    assert loss.item() == pytest.approx(float(stored["loss"]), rel=1e-5)
    ours = to_authors({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in ours.items():
        want = stored[f"grad.{name}"]
        # A key bias shifts all scores of a query alike: its gradient is zero but for rounding, hence the floor.
        assert (gradient - want).norm() <= 1e-4 * want.norm() + 1e-6, name


def test_sums_of_microbatches_add_up(tiny_model, tiny_adata) -> None:
    """In any order and company, and to the mean that the objective had of one batch."""
    packed = tiny_model.tokenize(tiny_adata)
    objective = objective_of(tiny_model, mask_ratio=0.3)
    whole = objective.prepare(packed, epoch=2)
    order = np.random.default_rng(0).permutation(packed.num_cells)
    parts = [objective.prepare(packed.select(some), epoch=2) for some in np.array_split(order, 3)]
    assert sum(part.counts[TERM] for part in parts) == whole.counts[TERM] > 0
    assert sum(part.num_cells for part in parts) == packed.num_cells
    total = sum(objective.losses(part)[TERM].item() for part in parts)
    assert total == pytest.approx(objective.losses(whole)[TERM].item(), rel=1e-5)
    cells = mask_genes(packed, tiny_model, seed=5, epoch=2, mask_ratio=0.3)
    assert masked_gene_loss(tiny_model, cells).item() == pytest.approx(total, rel=1e-5)


def test_every_weight_is_trained_and_a_microbatch_without_masks_is_no_accident(
    tiny_model, tiny_adata
) -> None:
    objective = objective_of(tiny_model, mask_ratio=1e-9)
    nothing = objective.prepare(tiny_model.tokenize(tiny_adata), epoch=0)
    assert nothing.counts[TERM] == 0
    loss = objective.losses(nothing)[TERM]
    loss.backward()
    for name, parameter in tiny_model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    objective = objective_of(tiny_model)
    objective.losses(objective.prepare(tiny_model.tokenize(tiny_adata), epoch=0))[TERM].backward()
    assert all(parameter.grad.any() for name, parameter in tiny_model.named_parameters())


def test_lengths_are_tokens(tiny_model, tiny_adata) -> None:
    packed = tiny_model.tokenize(tiny_adata)
    lengths = objective_of(tiny_model).lengths_of(packed)
    assert lengths.dtype == torch.int64 and int(lengths.sum()) == packed.num_tokens


@pytest.mark.parametrize(
    ("objective", "what"),
    [
        ({"mask_ration": 0.2}, "mask_ratio"),
        ({"mask_ratio": 0.0}, "above 0"),
        ({"mask_ratio": "0.2"}, "number"),
        ({"mask_ratio": 1.5}, "at most 1"),
    ],
)
def test_settings_that_cannot_be_are_named(objective, what) -> None:
    with pytest.raises(ConfigError, match=what):
        PretrainConfig(objective=objective)


def test_a_new_model_is_saved_with_what_it_needs(tiny_adata, tiny_vocab, tmp_path) -> None:
    corpus = SimpleNamespace(tokenizer=scfm.GeneformerTokenizer(tiny_vocab, max_tokens=64))
    config = PretrainConfig(**SMALL, seed=3, dropout=0.0, model={"activation": "gelu"})
    model = new_model(config, corpus)
    assert (model.config.activation, model.config.max_tokens, model.config.hidden_dropout) == (
        "gelu",
        64,
        0.0,
    )
    again = scfm.load(model.save(tmp_path / "model"), dtype="float32")
    np.testing.assert_array_equal(again.embed(tiny_adata), model.embed(tiny_adata))
    assert torch.equal(new_model(config, corpus).gene_table, model.gene_table)
