"""The read-depth objective: counts found again exactly, keyed draws, the shares asked for, a loss by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scfm
from models import scfoundation_cells
from models.scfoundation_cells import NUM_GENES, counts
from scfm.errors import InvalidArgumentError
from scfm.train.objectives import hide_genes, read_depth_loss
from scfm.train.objectives.scfoundation import down_sample

pytestmark = pytest.mark.filterwarnings("ignore::scfm.ScfmWarning")
T, S = NUM_GENES, NUM_GENES + 1


@pytest.fixture(scope="module")
def model():
    return scfoundation_cells.model(variant="gene")


@pytest.fixture(scope="module")
def cells():
    """200 cells of about 1,000 counts, so that some are deep."""
    adata = counts(200, seed=2)
    adata.X = (adata.X * 12).tocsr()
    return adata


@pytest.fixture(scope="module")
def packed(model, cells):
    return model.tokenize(cells)


def cell_of(pack: scfm.PackedCells, cell: int) -> tuple[np.ndarray, np.ndarray]:
    span = slice(*pack.cu_seqlens[cell : cell + 2].tolist())
    return pack.token_ids[span].numpy(), pack.values[span].numpy()


def test_down_sampling_is_of_the_counts(model, cells, packed) -> None:
    seen, whole = down_sample(packed, model.config, seed=0, epoch=0)
    assert whole is packed
    dense = cells.X.toarray()
    totals = dense.sum(1, dtype=np.float64)
    changed = 0
    for cell in range(len(dense)):
        positions, values = cell_of(seen, cell)
        assert positions[-2:].tolist() == [T, S]
        total = 10 ** np.float64(values[-1])
        found = np.zeros(NUM_GENES)
        found[positions[:-2]] = np.expm1(values[:-2].astype(np.float64)) * total / 1e4
        np.testing.assert_allclose(found, np.rint(found), atol=1e-2)
        assert (np.rint(found) <= dense[cell]).all() and np.rint(found).sum() == round(total)
        assert values[-2] == np.float32(np.log10(totals[cell]))
        same = round(total) == totals[cell]
        assert same or totals[cell] >= 1000
        changed += not same
    deep = (totals >= 1000).sum()
    assert 20 < deep < 190 and 0.3 * deep < changed < 0.7 * deep


def test_shares_of_hidden_genes(model, packed) -> None:
    hidden = hide_genes(packed, model, seed=3, epoch=1)
    config = model.config
    seen, _ = down_sample(packed, config, seed=3, epoch=1)
    kinds = np.zeros(3)
    for cell in range(packed.num_cells):
        positions, values = cell_of(seen, cell)
        of = dict(zip(positions.tolist(), values.tolist(), strict=True))
        shown, _ = cell_of(hidden.shown, cell)
        late, entering = cell_of(hidden.late, cell)
        expressed = len(positions) - 2
        assert T in shown and S in shown and not set(shown) & set(late)
        assert sum(p in of for p in late.tolist()) == round(config.value_mask_ratio * expressed)
        assert sum(p not in of for p in late.tolist()) == round(
            config.zero_mask_ratio * (NUM_GENES - expressed)
        )
        assert set(shown) | (set(late) & set(of)) == set(of)
        real = np.float32([of.get(p, 0.0) for p in late.tolist()])
        masked = entering == np.float32(config.mask_value)
        kinds += [masked.sum(), (~masked & (entering == real)).sum(), len(late)]
        assert set(entering[~masked & (entering != real)].tolist()) <= set(of.values())
    assert abs(kinds[0] / kinds[2] - config.replace_ratio) < 0.03
    assert abs(kinds[1] / kinds[2] - 0.1) < 0.05


def test_targets_are_of_the_whole_cell(model, packed) -> None:
    hidden = hide_genes(packed, model, seed=0, epoch=0)
    truth = torch.zeros(packed.num_cells, NUM_GENES + 2)
    cell = torch.repeat_interleave(torch.arange(packed.num_cells), packed.lengths.long())
    truth[cell, packed.token_ids.long()] = packed.values
    assert torch.equal(hidden.targets, truth[hidden.cells, hidden.positions])
    assert (hidden.positions < NUM_GENES).all()


def test_draws_depend_on_seed_epoch_and_cell_alone(model, packed) -> None:
    whole = hide_genes(packed, model, seed=1, epoch=4)
    order = [150, 3, 77]
    some = hide_genes(packed.select(order), model, seed=1, epoch=4)
    for place, cell in enumerate(order):
        for ours, want in ((some.shown, whole.shown), (some.late, whole.late)):
            for a, b in zip(cell_of(ours, place), cell_of(want, cell), strict=True):
                np.testing.assert_array_equal(a, b)
    for other in ({"seed": 2, "epoch": 4}, {"seed": 1, "epoch": 5}):
        again = hide_genes(packed, model, **other)
        assert again.late.to_lists() != whole.late.to_lists()


def test_loss_by_hand_and_its_gradients(packed) -> None:
    model = scfoundation_cells.model(variant="gene")
    hidden = hide_genes(packed.select([5, 120]), model, seed=0, epoch=0)
    loss = read_depth_loss(model, hidden)
    prediction = model.forward(hidden.shown, late=hidden.late).prediction
    by_hand = sum(
        (prediction[cell, place] - target) ** 2
        for cell, place, target in zip(hidden.cells, hidden.positions, hidden.targets, strict=True)
    ) / len(hidden.targets)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    weights = {"token_emb.emb_mask.weight", "layers.0.qkv.weight", "decoder.to_final.weight"}
    for name, weight in model.named_parameters():
        if name in weights:
            assert weight.grad is not None and weight.grad.abs().sum() > 0
    # against a difference quotient in the direction of the gradient
    bias = model.decoder.to_final.bias
    with torch.no_grad():
        bias.add_(1e-2)
        above = read_depth_loss(model, hidden)
        bias.sub_(2e-2)
        below = read_depth_loss(model, hidden)
    assert float(bias.grad) == pytest.approx(float((above - below) / 2e-2), rel=1e-3)


def test_training_lowers_the_loss(packed) -> None:
    model = scfoundation_cells.model(variant="gene", dropout=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    few = packed.select(list(range(100, 108)))
    losses = []
    for epoch in range(12):
        loss = read_depth_loss(model, hide_genes(few, model, seed=0, epoch=epoch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.6 * losses[0]


def test_only_counts_can_be_down_sampled(model, packed) -> None:
    assert packed.values is not None
    odd = scfm.PackedCells(packed.token_ids, packed.values * 0.99, packed.cu_seqlens, packed.cell_ids)
    with pytest.raises(InvalidArgumentError, match="cell 0 holds no"):
        hide_genes(odd, model, seed=0, epoch=0)
    with pytest.raises(InvalidArgumentError, match="read depth S"):
        hide_genes(scfm.PackedCells.from_lists([[0, 1]], [[1.0, 2.0]]), model, seed=0, epoch=0)
    with pytest.raises(InvalidArgumentError, match="no values"):
        hide_genes(scfm.PackedCells.from_lists([[0, 1]]), model, seed=0, epoch=0)


def test_counts_up_to_a_million_are_found_again(model) -> None:
    adata = counts(6, seed=9)
    x = adata.X.toarray().astype(np.float64)
    x[:, 3] = [1, 10, 1e3, 1e5, 3e5, 9e5]
    adata.X = x
    seen, _ = down_sample(model.tokenize(adata), model.config, seed=0, epoch=0)
    assert seen.num_cells == 6


def test_nothing_hidden_is_no_loss(model, packed) -> None:
    hidden = hide_genes(packed.select([0]), model, seed=0, epoch=0)
    none = scfm.PackedCells.from_lists([[]], [[]])
    empty = torch.empty(0, dtype=torch.int64)
    nothing = type(hidden)(packed.select([0]), none, empty, empty, torch.empty(0))
    assert float(read_depth_loss(model, nothing).detach()) == 0.0
