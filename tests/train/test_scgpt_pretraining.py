"""scGPT's pretraining objectives: the authors' losses, and sums that do not know of microbatches."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch

import scfm
from models.scgpt_goldens import load
from scfm.data.packed import PackedCells, concatenate
from scfm.errors import ConfigError
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from scfm.tokenize.scgpt_vocab import ScgptVocab
from scfm.train.config import PretrainConfig
from scfm.train.objectives import (
    ExpressionTargets,
    FineTuningObjective,
    GenerativeObjective,
    GenerativeTargets,
)
from scfm.train.objectives.cell_views import cut, thinned, two_views, view_lengths
from scfm.train.objectives.losses import contrastive_cell_loss
from scfm.train.objectives.protocol import make_objective, new_model
from scfm.train.objectives.scgpt_pretraining import HiddenExpression, UnknownExpression
from tiny_cells import counts_of
from train.test_scgpt_objectives import close_loss, generative_batch, generative_pack, tiny_model

SYMBOLS = [f"GENE{i}" for i in range(120)]
ALL = {"kind": "masked", "ecs": 10.0, "cce": 10.0, "dab": 1.0, "batch": "donor"}


def objective_of(model, labels=None, **objective):
    config = PretrainConfig(family="scgpt", seed=5, objective=objective)
    return make_objective(config, model, batch_labels=labels)


def cells_of(num_cells: int = 12, *, seed: int = 0) -> PackedCells:
    """<cls> is token 39; lengths from 1 (no gene at all) on."""
    draw = np.random.default_rng(seed)
    lengths = [1, 2, *draw.integers(3, 30, num_cells - 2)]
    tokens = [[39, *draw.permutation(38)[: n - 1]] for n in lengths]
    values = [[-2.0, *draw.integers(1, 51, n - 1)] for n in lengths]
    return PackedCells.from_lists(tokens, values)


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["pad", "nopad"])
def test_generative_pretraining_is_the_authors(goldens, tag: str) -> None:
    stored = generative_batch(goldens("scgpt") / "M_generative.npz", tag)
    packed, targets = generative_pack(stored)
    model = load(goldens("scgpt") / "ckpt_released_flash_keys")
    objective = objective_of(model)
    first_unknown = packed.cu_seqlens[:-1] + targets.num_known
    rows = torch.cat(
        [
            torch.arange(a, b)
            for a, b in zip(first_unknown.tolist(), packed.cu_seqlens[1:].tolist(), strict=True)
        ]
    )
    counts = dict.fromkeys(("expression", "mvc", "second_pass"), len(rows))
    prepared = UnknownExpression(
        packed, counts, packed.num_tokens, targets.num_known, rows, targets.values[rows]
    )
    assert set(objective.at_step(1000)) == set(objective.losses(prepared)) == {"expression", "mvc"}
    assert set(objective.at_step(1001)) == {"expression", "mvc", "second_pass"}
    found = {name: total / counts[name] for name, total in objective.losses(prepared).items()}
    close_loss(found["expression"], stored["loss_mse"])
    close_loss(found["mvc"], stored["loss_mvc"])
    close_loss(found["second_pass"], stored["loss_gen"])


def test_generation_has_the_means_and_gradients_of_the_objective() -> None:
    one, other = (tiny_model(explicit_zeros=False) for _ in range(2))
    objective = objective_of(one)
    prepared = objective.prepare(cells_of(), epoch=3)
    objective.at_step(2000)
    total = sum(loss / prepared.counts[name] for name, loss in objective.losses(prepared).items())
    values = prepared.packed.values.clone()
    values[prepared.rows] = prepared.targets
    want = GenerativeObjective()(other, prepared.packed, GenerativeTargets(values, prepared.num_known)).total
    same_gradients(one, other, total, want)


@pytest.mark.parametrize("views", ["dropout", "random", "disjoint"])
def test_masked_has_the_means_and_gradients_of_the_fine_tuning_objective(views: str) -> None:
    one, other = (tiny_model(num_classes=0) for _ in range(2))
    packed = cells_of()
    labels = np.arange(20) % 2
    objective = objective_of(one, labels, **ALL, views=views)
    prepared = objective.prepare(packed, epoch=3)
    found = {name: loss / prepared.counts[name] for name, loss in objective.losses(prepared).items()}
    values = prepared.packed.values.clone()
    values[prepared.rows] = prepared.targets
    scored = torch.zeros(len(values), dtype=torch.bool)
    scored[prepared.rows] = True
    again = torch.from_numpy(labels[prepared.packed.cell_ids])
    targets = ExpressionTargets(values, scored, batch_labels=again)
    same = FineTuningObjective(mvc=1.0, ecs=10.0, cce=10.0, dab=1.0)
    if views == "dropout":  # which is 0 here: both views are equal
        want = same(other, prepared.packed, targets).total
    else:
        few = FineTuningObjective(mvc=1.0, dab=1.0)(other, prepared.packed, targets)
        cells = other.forward(prepared.packed, batch_labels=again).cell_embeddings
        first, second = cells.chunk(2)
        first_only = FineTuningObjective(expression=0.0, ecs=10.0)
        pack = prepared.packed.select(range(packed.num_cells))
        ecs = first_only(
            other,
            pack,
            ExpressionTargets(pack.values, pack.values < -5, batch_labels=again[: packed.num_cells]),
        )
        want = few.total + ecs.total + 10.0 * contrastive_cell_loss(first, second)
    total = sum(objective.weights[name] * loss for name, loss in found.items())
    same_gradients(one, other, total, want)


def same_gradients(one: Scgpt, other: Scgpt, total: torch.Tensor, want: torch.Tensor) -> None:
    close_loss(total, want.detach())
    total.backward()
    want.backward()
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert (mine.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6, name


@pytest.mark.parametrize("kind", ["generative", "masked"])
def test_sums_of_microbatches_add_up(kind: str) -> None:
    """Terms of tokens in any company; which tokens are asked for belongs to (seed, epoch, cell)."""
    model = tiny_model(explicit_zeros=kind == "masked")
    packed = cells_of()
    views = {"views": "random", "cce": 1.0, "kind": kind} if kind == "masked" else {}
    objective = objective_of(model, **views)
    objective.at_step(5000)
    whole = objective.prepare(packed, epoch=2)
    order = np.random.default_rng(0).permutation(packed.num_cells)
    parts = [objective.prepare(packed.select(some), epoch=2) for some in np.array_split(order, 3)]
    sums = [objective.losses(part) for part in parts]
    for name, want in objective.losses(whole).items():
        assert sum(part.counts[name] for part in parts) == whole.counts[name], name
        if name != "cce":
            assert sum(one[name].item() for one in sums) == pytest.approx(want.item(), rel=1e-4), name
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    assert sum(part.num_cells for part in parts) == packed.num_cells
    assert sorted(i for part in parts for i in part.cell_ids.tolist()) == packed.cell_ids.tolist()
    later = objective.prepare(packed, epoch=3)
    assert not torch.equal(later.packed.token_ids, whole.packed.token_ids) or not torch.equal(
        later.rows, whole.rows
    )
    assert int(objective.lengths_of(packed).sum()) == whole.num_tokens


@pytest.mark.parametrize("kind", ["generative", "masked"])
def test_every_weight_of_a_new_model_is_trained(kind: str) -> None:
    """Ranks wait for every gradient."""
    config = PretrainConfig(
        **small(), objective={"kind": kind, **({} if kind == "generative" else {"cce": 1.0})}
    )
    model = new_model(config, corpus())
    objective = make_objective(config, model)
    objective.at_step(0)
    prepared = objective.prepare(model.tokenize(adata()), epoch=0)
    sum(objective.losses(prepared).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_a_contrast_of_genes_tells_cells_apart() -> None:
    """Without dropout, and the two views hold other genes."""
    model = tiny_model(explicit_zeros=False, mvc_style=None, num_batch_labels=0, adversary=False)
    objective = objective_of(model, kind="masked", views="disjoint", cce=1.0, expression=0.0, mvc=0.0)
    prepared = objective.prepare(cells_of(), epoch=0)
    assert isinstance(prepared, HiddenExpression) and set(objective.weights) == {"cce"}
    first, second = model.forward(prepared.packed).cell_embeddings.chunk(2)
    assert not torch.allclose(first, second)


def test_views_share_out_a_cells_genes() -> None:
    packed = cells_of(40)
    first, second = two_views(packed, "disjoint", share=0.5, seed=1, epoch=2)
    for cell, one, other in zip(packed.to_lists(), first.to_lists(), second.to_lists(), strict=True):
        assert one[0] == other[0] == 39
        assert sorted(one[1:] + other[1:]) == sorted(cell[1:]) and 0 <= len(one) - len(other) <= 1
    lengths = (first.lengths + second.lengths).to(torch.int64)
    assert torch.equal(view_lengths(packed.lengths, "disjoint", 0.5, None), lengths)
    first, second = two_views(packed, "random", share=0.7, seed=1, epoch=2)
    lengths = (first.lengths + second.lengths).to(torch.int64)
    assert torch.equal(view_lengths(packed.lengths, "random", 0.7, None), lengths)
    assert first.to_lists() != second.to_lists()
    alone, _ = two_views(packed.select([7]), "random", share=0.7, seed=1, epoch=2)
    assert alone.to_lists() == [first.to_lists()[7]]
    both = dict(zip(packed.to_lists()[7], packed.select([7]).values.tolist(), strict=True))
    assert [both[token] for token in alone.to_lists()[0]] == alone.values.tolist()
    assert concatenate([first, second]).num_cells == 80


def test_the_contrast_both_ways_and_within_batches() -> None:
    """By hand, from the embeddings of the two views."""
    model = tiny_model(num_classes=0)
    labels = np.arange(20) % 3
    terms = {"kind": "masked", "views": "random", "cce": 1.0, "expression": 0.0, "mvc": 0.0, "batch": "donor"}
    both = objective_of(model, labels, **terms, symmetric=True, within_batch=True, temperature=0.1)
    prepared = both.prepare(cells_of(), epoch=0)
    cells = model.forward(prepared.packed).cell_embeddings.double()
    unit = cells / cells.norm(dim=1, keepdim=True)
    want = 0.0
    for a, b in (unit.split(12), unit.split(12)[::-1]):
        for i in range(12):
            alike = [j for j in range(12) if labels[j] == labels[i]]
            scores = torch.stack([a[i] @ b[j] / 0.1 for j in alike])
            want += (scores.logsumexp(0) - scores[alike.index(i)]) / 2
    assert both.losses(prepared)["cce"].item() == pytest.approx(want.item(), rel=1e-4)


def test_one_view_is_found_from_the_other() -> None:
    model = tiny_model(explicit_zeros=False, num_batch_labels=0, adversary=False)
    terms = {"kind": "masked", "views": "disjoint", "cce": 1.0, "cross_mvc": True, "mask_ratio": 0.2}
    objective = objective_of(model, **terms)
    prepared = objective.prepare(cells_of(), epoch=0)
    genes = int(cells_of().lengths.sum()) - 12
    assert prepared.counts["mvc"] == genes > prepared.counts["expression"]
    out = model.forward(prepared.packed)
    other = torch.cat([*reversed(out.cell_embeddings.split(12))])
    predicted = out.mvc_at(torch.arange(prepared.packed.num_tokens), other).prediction[prepared.mvc_rows]
    want = (predicted - prepared.mvc_targets).square().sum()
    close_loss(objective.losses(prepared)["mvc"], want.detach())
    assert (prepared.mvc_targets > 0).all()  # what is hidden from the encoder is asked for as it was


@pytest.mark.parametrize("logged", [True, False])
def test_thinned_views_hold_a_binomial_share_of_the_counts(logged: bool) -> None:
    draw = np.random.default_rng(0)
    counts = draw.poisson(6.0, size=(50, 38)) + 1
    counts[:, 0] = 1
    rate = 1e4 / counts.sum(axis=1, keepdims=True)
    values = np.log1p(counts * rate) if logged else counts * rate
    packed = PackedCells.from_lists([[39, *range(38)]] * 50, [[-2.0, *cell] for cell in values])
    depths = {"depths": (80, 160), "most_kept": (0.5, 0.6)}
    found = [thinned(packed, **depths, logged=logged, view=view, seed=7, epoch=1) for view in (0, 0, 1)]
    assert torch.equal(found[0].values, found[1].values) and not torch.equal(
        found[0].lengths, found[2].lengths
    )
    shares = []
    for cell in range(50):
        one = found[0].select([cell])
        assert one.token_ids[0] == 39 and one.values[0] == -2.0
        seen = one.values[1:].double().numpy()
        amounts = np.expm1(seen) if logged else seen
        kept = amounts / amounts.min()  # at the thinned depth: multiples of what one count is worth there
        share = rate[cell, 0] / amounts.min()
        shares.append(share)
        np.testing.assert_allclose(kept, np.rint(kept), atol=1e-3)
        assert (np.rint(kept) <= counts[cell][one.token_ids[1:].numpy()]).all()
        assert kept.sum() == pytest.approx(share * counts[cell].sum(), abs=5 * np.sqrt(counts[cell].sum()))
    left = np.array(shares) * counts.sum(axis=1)
    assert left.min() > 79 and left.max() < 161 and max(shares) < 0.61
    assert min(shares) < 0.35 and 0.4 < (np.log(left) < np.log(80 * 160) / 2).mean() < 0.9
    alone = thinned(packed.select([9]), **depths, logged=logged, view=0, seed=7, epoch=1)
    assert torch.equal(alone.values, found[0].select([9]).values)


def test_long_views_are_cut_anywhere() -> None:
    packed = cells_of(40)
    found = cut(packed, 8, view=0, seed=3, epoch=0)
    for cell, kept in zip(packed.to_lists(), found.to_lists(), strict=True):
        assert kept[0] == 39 and len(kept) == min(len(cell), 8)
        assert [token for token in cell if token in kept] == kept
    assert cut(packed, 8, view=1, seed=3, epoch=0).to_lists() != found.to_lists()
    assert cut(packed.select([30]), 8, view=0, seed=3, epoch=0).to_lists() == [found.to_lists()[30]]


def test_a_thinned_contrast_trains() -> None:
    config = PretrainConfig(
        **small(),
        model={"input_style": "log1p"},
        objective={"kind": "masked", "cce": 1.0, "views": "disjoint", "depths": [20, 60], "view_tokens": 12},
    )
    model = new_model(config, corpus())
    objective = make_objective(config, model)
    packed = model.tokenize(adata())
    prepared = objective.prepare(packed, epoch=0)
    assert int(prepared.packed.lengths.max()) == 12
    assert prepared.planned_tokens == int(objective.lengths_of(packed).sum())
    assert prepared.num_tokens < int(objective.lengths_of(packed).sum()) <= 40 * 24
    sum(objective.losses(prepared).values()).backward()
    assert model.encoder.embedding.weight.grad.any()


@pytest.mark.parametrize(
    ("objective", "what"),
    [
        ({"kind": "masked", "within_batch": True}, "objective.batch"),
        ({"kind": "masked", "cross_mvc": True}, "contrast"),
        ({"kind": "masked", "depths": [400, 4000], "cce": 1.0}, "contrast"),
        ({"kind": "masked", "depths": [400, 40], "cce": 1.0, "views": "random"}, "lesser first"),
        ({"kind": "masked", "depths": 400, "cce": 1.0, "views": "random"}, "two numbers"),
        ({"kind": "masked", "most_kept": [0.5, 1.5]}, "most_kept"),
        ({"kind": "masked", "view_tokens": 1, "cce": 1.0, "views": "random"}, "from 2"),
        ({"kind": "masked", "symmetric": 1}, "true or false"),
        ({"king": "masked"}, "did you mean 'kind'"),
        ({"kind": "both"}, "generative"),
        ({"kind": "masked", "second_pass": 0.5}, "second_pass"),
        ({"cce": 1.0}, "objective.cce"),
        ({"kind": "masked", "dab": 1.0}, "objective.batch"),
        ({"kind": "masked", "mask_ratio": [0.2, 0.3]}, "one number"),
        ({"mask_ratio": [0.5, 1.0]}, "mask_ratio"),
        ({"kind": "masked", "expression": 0, "mvc": 0}, "weight 0"),
        ({"kind": "masked", "cce": 1.0, "temperature": 0}, "temperature"),
    ],
)
def test_settings_that_cannot_be_are_named(objective, what) -> None:
    with pytest.raises(ConfigError, match=what):
        PretrainConfig(family="scgpt", objective=objective)


def test_models_that_lack_a_head_are_named() -> None:
    with pytest.raises(ConfigError, match="mvc_style"):
        objective_of(tiny_model(mvc_style=None), kind="masked")
    with pytest.raises(ConfigError, match="tell no counts"):
        objective_of(tiny_model(), kind="masked", cce=1.0, views="random", depths=[400, 4000])
    with pytest.raises(ConfigError, match="has_flags"):
        objective_of(tiny_model(has_flags=False))
    with pytest.raises(ConfigError, match="explicit_zeros"):
        objective_of(tiny_model())


def corpus() -> SimpleNamespace:
    vocab = ScgptVocab.from_dict({symbol: i for i, symbol in enumerate(SYMBOLS)})
    return SimpleNamespace(tokenizer=scfm.ScgptTokenizer(vocab, max_tokens=64))


def small() -> dict:
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 16, "max_tokens": 64}
    return {"family": "scgpt", "seed": 3, "dropout": 0.0, **shape}


def adata() -> ad.AnnData:
    found = ad.AnnData(counts_of())
    found.var_names = SYMBOLS
    return found


def test_a_new_model_is_saved_with_what_it_needs(tmp_path) -> None:
    config = PretrainConfig(**small(), model={"num_bins": 21})
    model = new_model(config, corpus())
    assert isinstance(model.config, ScgptConfig) and model.config.num_bins == 21 and model.config.has_flags
    again = scfm.load(model.save(tmp_path / "model"), dtype="float32")
    np.testing.assert_array_equal(again.embed(adata()), model.embed(adata()))
    assert make_objective(config, again).prepare(again.tokenize(adata()), epoch=0).num_cells == 40
