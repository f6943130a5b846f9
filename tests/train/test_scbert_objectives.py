"""scBERT's objectives: the authors' rule of hiding, draws that belong to the cell, losses, freezing, the schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.scbert_goldens import largest, pack
from scfm.errors import InvalidArgumentError
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from scfm.train.objectives.scbert import (
    annotation_loss,
    annotation_losses,
    balanced_class_weights,
    class_numbers,
    freeze,
    hidden_bin_accuracy,
    hidden_bin_loss,
    hide_bins,
)
from scfm.train.objectives.scbert_schedule import learning_rate

SHAPE = {
    "num_genes": 300,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 2,
    "head_dim": 8,
    "num_features": 12,
}


@pytest.fixture(scope="module")
def model() -> Scbert:
    return Scbert.from_config(ScbertConfig(**SHAPE))


def tokens(num_cells: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dense = np.zeros((num_cells, 301), dtype=np.int64)
    for number, cell in enumerate(dense):
        expressed = rng.choice(300, size=1 + 7 * number % 290, replace=False)
        cell[expressed] = rng.integers(1, 6, expressed.size)
    return dense


def dense_of(packed) -> np.ndarray:
    out = np.zeros((packed.num_cells, 301), dtype=np.int64)
    cell = np.repeat(np.arange(packed.num_cells), packed.lengths.numpy())
    out[cell, packed.token_ids.numpy()] = packed.values.numpy().astype(np.int64)
    return out


class TestHiding:
    def test_the_authors_rule(self, model) -> None:
        cells = tokens()
        hidden = hide_bins(pack(cells), model, seed=0)
        expressed = (cells > 0).sum(axis=1)
        wanted = [min(math.ceil(0.15 * n), math.ceil(0.15 * 301)) for n in expressed.tolist()]
        assert np.bincount(hidden.rows.numpy() // 301, minlength=40).tolist() == wanted
        assert np.array_equal(hidden.targets.numpy(), cells.flatten()[hidden.rows.numpy()])
        assert (hidden.targets > 0).all()
        seen = dense_of(hidden.packed).flatten()
        changed = np.flatnonzero(seen != cells.flatten())
        assert (seen[changed] == 6).all()
        assert set(changed) <= set(hidden.rows.tolist())

    def test_shares_over_many_draws(self, model) -> None:
        cells = pack(tokens(60))
        drawn = [hide_bins(cells, model, seed=seed) for seed in range(40)]
        asked = sum(len(draw.rows) for draw in drawn)
        hidden = sum(int((draw.packed.values == 6).sum()) for draw in drawn)
        assert abs(hidden / asked - 0.9) < 4 * math.sqrt(0.09 / asked)
        times = np.zeros(301 * 60)
        for draw in drawn:
            times[draw.rows.numpy()] += 1
        many = np.repeat((tokens(60) > 0).sum(axis=1) >= 20, 301)
        assert times[many].max() < 25  # of 40 draws of 15 %

    def test_draws_belong_to_the_cell(self, model) -> None:
        cells = pack(tokens())
        whole = hide_bins(cells, model, seed=7, epoch=2)
        chosen = [31, 4, 12]
        part = hide_bins(cells.select(chosen), model, seed=7, epoch=2)
        for place, cell in enumerate(chosen):
            mine, its = part.packed.select([place]), whole.packed.select([cell])
            assert torch.equal(mine.values, its.values)
            rows = whole.rows[whole.rows // 301 == cell] % 301
            assert torch.equal(part.rows[part.rows // 301 == place] % 301, rows)
        for other in ({"seed": 8, "epoch": 2}, {"seed": 7, "epoch": 3}):
            assert not torch.equal(hide_bins(cells, model, **other).packed.values, whole.packed.values)

    def test_zeros_hidden_values_and_empty_cells(self, model) -> None:
        cells = tokens(4)
        cells[0] = 0
        cells[1, cells[1] > 0] = 6
        found = hide_bins(pack(cells), model, seed=0)
        assert set((found.rows // 301).tolist()) == {2, 3}

    def test_wrong_arguments(self, model) -> None:
        with pytest.raises(InvalidArgumentError, match="mask_ratio"):
            hide_bins(pack(tokens(2)), model, seed=0, mask_ratio=1.5)

    def test_loss_and_accuracy(self, model) -> None:
        cells = hide_bins(pack(tokens(3)), model, seed=0)
        logits = model.forward(cells.packed).logits.detach()[cells.rows]
        loss = hidden_bin_loss(model, cells)
        assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(logits, cells.targets)), rel=1e-5)
        right = (logits[:, 1:6].argmax(dim=1) + 1 == cells.targets).double().mean()
        assert hidden_bin_accuracy(model, cells) == pytest.approx(float(right))


class TestAnnotation:
    @pytest.fixture
    def annotator(self) -> Scbert:
        model = Scbert.from_config(ScbertConfig(**SHAPE))
        model.add_annotation_head(["B", "NK", "T"])
        return model

    def test_losses(self) -> None:
        scores = torch.randn(5, 3, dtype=torch.float64)
        classes = torch.tensor([0, 2, 1, 1, 0])
        plain = F.cross_entropy(scores, classes, reduction="none")
        assert largest(annotation_losses(scores, classes), plain) < 1e-12
        chance = scores.softmax(1)[torch.arange(5), classes]
        assert largest(annotation_losses(scores, classes, focal_gamma=2.0), (1 - chance) ** 2 * plain) < 1e-12

    def test_weighted_mean(self, annotator) -> None:
        cells, classes = pack(tokens(4)), torch.tensor([0, 0, 1, 2])
        weights = balanced_class_weights(classes, 3)
        assert weights.tolist() == pytest.approx([2 / 3, 4 / 3, 4 / 3])
        assert balanced_class_weights(torch.tensor([0, 0]), 2).tolist() == [0.5, 0.0]
        scores = annotator.forward(cells).cls.detach()
        wanted = float(F.cross_entropy(scores, classes, weight=weights))
        found = annotation_loss(annotator, cells, classes, class_weights=weights)
        assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)

    def test_labels_that_the_head_does_not_know(self, annotator) -> None:
        assert class_numbers(annotator, ["T", "B", "T"]).tolist() == [2, 0, 2]
        with pytest.raises(InvalidArgumentError, match=r"1 cell types.*'Monocyte'"):
            class_numbers(annotator, ["T", "Monocyte"])
        with pytest.raises(InvalidArgumentError, match="another number of classes"):
            annotation_losses(torch.zeros(2, 3), torch.tensor([0, 3]))

    def test_freezing(self, annotator) -> None:
        always = {"norm.weight", "norm.bias"} | {
            name for name, _ in annotator.named_parameters() if name.startswith("annotation_head.")
        }
        assert set(freeze(annotator, "head")) == always
        for trained, layers in (("authors", {"1"}), ("last", {"2"})):
            found = set(freeze(annotator, trained)) - always
            assert {name.split(".")[2] for name in found} == layers
        assert set(freeze(annotator, "last", num_blocks=3)) < set(freeze(annotator, "all"))
        assert not annotator.pos_emb.requires_grad
        for arguments in ({"trained": "some"}, {"trained": "last", "num_blocks": 4}):
            with pytest.raises(InvalidArgumentError):
                freeze(annotator, **arguments)

    def test_a_frozen_model_is_trained_where_it_should_be(self, annotator) -> None:
        freeze(annotator, "authors")
        annotation_loss(annotator, pack(tokens(3)), torch.tensor([0, 1, 2])).backward()
        for name, parameter in annotator.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.golden
def test_learning_rate(goldens) -> None:
    wanted = np.load(goldens("scbert") / "lr_per_epoch_100.npy")
    found = [learning_rate(epoch) for epoch in range(1, len(wanted) + 1)]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-15)
