"""scGPT's objectives equal the authors' on their own batches, losses and gradients; and hold up without padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.scgpt_goldens import PAD, PaddedBatch, close, forward, load
from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from scfm.models.scgpt.names import our_name
from scfm.train.objectives import (
    ExpressionTargets,
    FineTuningObjective,
    GenerativeObjective,
    GenerativeTargets,
    hide_expression,
    split_expression,
)
from scfm.train.objectives.losses import (
    cell_similarity_loss,
    contrastive_cell_loss,
    expressed_loss,
    masked_mse,
    masked_relative_error,
)

VARIANTS = [
    "B_dab_dsbn_batch_zero",
    "C_avgpool_batch_bn",
    "D_wpool_zero",
    "E_category",
    "F_scaling",
    "G_mvc_detach",
]
# Our parts by the names in the goldens.
PARTS = {
    "loss_masked_mse": "expression",
    "loss_zero_nll": "expressed",
    "loss_mvc_mse": "mvc",
    "loss_mvc_zero_nll": "mvc_expressed",
    "slow.loss_ecs": "ecs",
    "slow.loss_cce": "cce",
    "loss_dab": "dab",
    "loss_cls": "cls",
    "loss_total": "total",
}


def close_loss(ours: torch.Tensor, want: torch.Tensor) -> None:
    close(ours, want, rtol=1e-4, atol=1e-6)


def targets_of(batch: PaddedBatch, num_classes: int, num_labels: int) -> ExpressionTargets:
    """The authors' batch: classes and, where the file has none, batch labels counted through."""
    cells = torch.arange(len(batch.tokens))
    labels = batch["batch_labels"] if "batch_labels" in batch else cells % max(num_labels, 1)
    return ExpressionTargets(
        batch["target"][batch.tokens],
        batch["masked_positions"][batch.tokens],
        batch_labels=labels,
        classes=cells % num_classes,
    )


def as_padded(batch: PaddedBatch) -> dict:
    """The reading that the goldens' losses were taken in."""
    return {"padding": "plain", "padded_length": batch.length}


@pytest.mark.golden
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_the_authors(goldens, variant: str) -> None:
    batch = PaddedBatch.read(goldens("scgpt") / f"{variant}.npz")
    model = load(goldens("scgpt") / variant)
    targets = targets_of(batch, model.config.num_classes, model.config.num_batch_labels)
    objective = FineTuningObjective(mvc=1.0, ecs=10.0, dab=float("loss_dab" in batch), cls=1.0)
    found = objective(model, batch.packed, targets, **as_padded(batch))
    for theirs, ours in PARTS.items():
        if theirs in batch and ours != "cce":
            close_loss(found.total if ours == "total" else found.parts[ours], batch[theirs])
    assert set(found.parts) == {PARTS[name] for name in PARTS if name in batch} - {"total", "cce"}
    found.total.backward()
    own = dict(model.named_parameters())
    # Values up to 50 that multiply embeddings: a rounding of the weights alone moves these gradients by 1e-4.
    share = 2e-4 if variant == "F_scaling" else 1e-5
    checked = 0
    for name, want in batch.stored.items():
        if name == "grad.encoder.embedding.weight.sum":
            # What goes through a norm sums to nothing but rounding: exact on the scale of what is summed.
            rows = own["encoder.embedding.weight"].grad
            close(rows.sum(1), want, rtol=1e-4, atol=1e-6 * float(rows.abs().sum(1).max()))
        elif name.startswith("grad."):
            close_gradient(own[our_name(name.removeprefix("grad."))].grad, want, share=share)
            checked += 1
    assert checked >= 5


def close_gradient(ours: torch.Tensor, want: torch.Tensor, *, share: float) -> None:
    """Entries that cancel out are as exact as the largest ones allow."""
    close(ours, want, rtol=1e-4, atol=share * float(want.abs().max()))


@pytest.mark.golden
@pytest.mark.parametrize("variant", VARIANTS)
def test_relative_error_is_the_authors(goldens, variant: str) -> None:
    batch = PaddedBatch.read(goldens("scgpt") / f"{variant}.npz")
    prediction = batch["slow.mlm_output"]
    close_loss(
        masked_relative_error(prediction, batch["target"], batch["masked_positions"]), batch["loss_mre"]
    )


CELL_LOSSES = [*VARIANTS, "A_released", "K_multiomic_mod", "K_multiomic_mod_batch"]


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["slow", "fast"])
@pytest.mark.parametrize("variant", CELL_LOSSES)
def test_losses_of_cells_are_the_authors(goldens, variant: str, tag: str) -> None:
    """ECS and CCE of the authors' embeddings, and of ours from the same tokens."""
    batch = PaddedBatch.read(goldens("scgpt") / f"{variant}.npz")
    folder = "ckpt_plain_keys" if variant == "A_released" else variant
    model = load(goldens("scgpt") / folder)
    ours = forward(model, batch, tag).cell_embeddings
    for cells in (batch[f"{tag}.cell_emb"], ours):
        close_loss(cell_similarity_loss(cells, model.config.ecs_threshold), batch[f"{tag}.loss_ecs"])
        if f"{tag}.loss_cce" in batch:
            close_loss(contrastive_cell_loss(cells, cells), batch[f"{tag}.loss_cce"])


@pytest.mark.golden
@pytest.mark.parametrize("variant", ["K_multiomic_mod", "K_multiomic_mod_batch"])
def test_the_multi_omic_model_takes_the_same_objective(goldens, variant: str) -> None:
    batch = PaddedBatch.read(goldens("scgpt") / f"{variant}.npz")
    model = load(goldens("scgpt") / variant)
    values, want = batch["values"][batch.tokens], batch["slow.mlm_output"][batch.tokens]
    scored = torch.arange(len(values)) % 3 == 1
    targets = ExpressionTargets(values, scored, batch_labels=batch.inputs().get("batch_labels"))
    objective = FineTuningObjective(mvc=1.0, ecs=10.0)
    found = objective(model, batch.packed, targets, modalities=batch.inputs()["modalities"])
    close_loss(found.parts["ecs"], batch["slow.loss_ecs"])
    close_loss(found.parts["expression"], masked_mse(want, values, scored))
    close_loss(found.parts["mvc"], masked_mse(batch["slow.mvc_output"][batch.tokens], values, scored))
    found.total.backward()
    assert model.mod_encoder.embedding.weight.grad.any()


@pytest.mark.golden
def test_contrast_as_part_of_an_objective(goldens) -> None:
    batch = PaddedBatch.read(goldens("scgpt") / "B_dab_dsbn_batch_zero.npz")
    model = load(goldens("scgpt") / "B_dab_dsbn_batch_zero")
    found = FineTuningObjective(cce=10.0)(model, batch.packed, targets_of(batch, 7, 3), **as_padded(batch))
    close_loss(found.parts["cce"], batch["slow.loss_cce"])
    want = batch["loss_masked_mse"] + batch["loss_zero_nll"] + 10 * batch["slow.loss_cce"]
    close_loss(found.total, want)


def generative_batch(path: Path, tag: str) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as found:
        return {
            name.removeprefix(f"{tag}."): torch.from_numpy(found[name])
            for name in found.files
            if name.startswith(f"{tag}.")
        }


def generative_pack(stored: dict[str, torch.Tensor]) -> tuple[PackedCells, GenerativeTargets]:
    """Each cell's perceived genes, then the genes to generate, whose values no model may see."""
    tokens, values, targets, num_known = [], [], [], []
    for known, known_values, unknown, wanted in zip(
        *(stored[name] for name in ("pcpt_gene", "pcpt_expr", "gen_gene", "gen_target")), strict=True
    ):
        known_values, known = known_values[known != PAD], known[known != PAD]
        wanted, unknown = wanted[unknown != PAD], unknown[unknown != PAD]
        tokens.append([*known.tolist(), *unknown.tolist()])
        values.append([*known_values.tolist(), *[1e30] * len(unknown)])
        targets += [known_values, wanted]
        num_known.append(len(known))
    packed = PackedCells.from_lists(tokens, values)
    return packed, GenerativeTargets(torch.cat(targets), torch.tensor(num_known))


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["pad", "nopad"])
def test_generative_pretraining_is_the_authors(goldens, tag: str) -> None:
    stored = generative_batch(goldens("scgpt") / "M_generative.npz", tag)
    packed, targets = generative_pack(stored)
    model = load(goldens("scgpt") / "ckpt_released_flash_keys")
    found = GenerativeObjective()(model, packed, targets)
    close_loss(found.parts["expression"], stored["loss_mse"])
    close_loss(found.parts["mvc"], stored["loss_mvc"])
    close_loss(found.parts["second_pass"], stored["loss_gen"])
    close_loss(found.total, stored["loss_mse"] + stored["loss_mvc"] + stored["loss_gen"])
    first = GenerativeObjective(mvc=False, second_pass=False)(model, packed, targets)
    close_loss(first.total, stored["loss_mse"])


# ---- without the authors' outputs -------------------------------------------------------------------------


def tiny_model(**changes) -> Scgpt:
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_heads": 2,
        "ffn_size": 16,
        "num_layers": 2,
        "dropout": 0.0,
    }
    heads = {"explicit_zeros": True, "mvc_style": "inner product", "num_classes": 3, "has_flags": True}
    batches = {"num_batch_labels": 2, "adversary": True}
    return Scgpt.from_config(ScgptConfig(**{**shape, **heads, **batches, **changes}), seed=3)


def tiny_cells(
    lengths: tuple[int, ...] = (9, 4, 12), *, seed: int = 0
) -> tuple[PackedCells, ExpressionTargets]:
    """Every third token is hidden (-1); <cls> is token 39."""
    draw = torch.Generator().manual_seed(seed)
    tokens = [[39, *torch.randperm(38, generator=draw)[: n - 1].tolist()] for n in lengths]
    bins = torch.randint(0, 51, (sum(lengths),), generator=draw).float()
    scored = torch.cat([torch.arange(n) % 3 == 1 for n in lengths])
    shown = torch.where(scored, -1.0, bins)
    packed = PackedCells.from_lists(tokens, [part.tolist() for part in shown.split(lengths)])
    cells = torch.arange(len(lengths))
    return packed, ExpressionTargets(bins, scored, batch_labels=cells % 2, classes=cells % 3)


ALL_PARTS = FineTuningObjective(mvc=1.0, ecs=10.0, cce=10.0, dab=1.0, cls=1.0)


def test_losses_are_their_formulas() -> None:
    draw = torch.Generator().manual_seed(1)
    prediction, target = torch.randn(50, generator=draw), torch.randint(0, 5, (50,), generator=draw).float()
    scored = torch.rand(50, generator=draw) < 0.4
    probability = torch.rand(50, generator=draw)
    probability[:2] = torch.tensor([0.0, 1.0])
    p, t = prediction[scored].double(), target[scored].double()
    close_loss(masked_mse(prediction, target, scored).double(), ((p - t) ** 2).mean())
    close_loss(
        masked_relative_error(prediction, target, scored).double(), ((p - t).abs() / (t + 1e-6)).mean()
    )
    everywhere = torch.ones(50, dtype=torch.bool)
    bernoulli = torch.distributions.Bernoulli(probs=probability).log_prob((target > 0).float())
    close_loss(expressed_loss(probability, target, everywhere), -bernoulli.mean())
    cells, others = torch.randn(7, 5, generator=draw), torch.randn(7, 5, generator=draw)
    unit = [cell / cell.norm() for cell in cells]
    pairs = [max(float(a @ b), 0.0) if a is not b else 0.0 for a in unit for b in unit]
    want = sum(1 - (cosine - 0.3) ** 2 for cosine in pairs) / 49
    close_loss(cell_similarity_loss(cells, 0.3), torch.tensor(want))
    cosine = torch.nn.functional.cosine_similarity(cells[:, None], others[None], dim=-1) / 0.5
    want = -torch.log_softmax(cosine, dim=1).diagonal().mean()
    close_loss(contrastive_cell_loss(cells, others), want)


def test_nothing_scored_is_no_loss_and_unknown_targets_are_never_read() -> None:
    prediction = torch.randn(4, requires_grad=True)
    target = torch.tensor([torch.nan, 1.0, torch.nan, 2.0])
    none = torch.zeros(4, dtype=torch.bool)
    for loss in (masked_mse, masked_relative_error):
        assert loss(prediction, target, none) == 0.0
    known = ~target.isnan()
    masked_mse(prediction, target, known).backward()
    assert prediction.grad.isfinite().all() and (prediction.grad[~known] == 0).all()


def test_total_is_the_weighted_sum_and_parts_without_weight_are_not_computed() -> None:
    model = tiny_model()
    packed, targets = tiny_cells()
    found = ALL_PARTS(model, packed, targets)
    names = ("expression", "expressed", "mvc", "mvc_expressed", "ecs", "cce", "dab", "cls")
    assert tuple(found.parts) == names
    want = sum(getattr(ALL_PARTS, name) * loss for name, loss in found.parts.items())
    close_loss(found.total, want)
    assert set(FineTuningObjective.annotation()(model, packed, targets).parts) == {"cls"}
    integration = FineTuningObjective.integration(dab_weight=3.0)
    assert (integration.mvc, integration.ecs, integration.dab, integration.cls) == (1.0, 10.0, 3.0, 0.0)
    plain = tiny_model(explicit_zeros=False)
    assert set(integration(plain, packed, targets).parts) == {"expression", "mvc", "ecs", "dab"}
    with pytest.raises(InvalidArgumentError, match="weight 0"):
        FineTuningObjective(expression=0.0)(model, packed, targets)


def test_order_of_cells_does_not_matter() -> None:
    model = tiny_model()
    packed, targets = tiny_cells()
    order = [2, 0, 1]
    lengths = packed.lengths.tolist()
    values, scored = targets.values.split(lengths), targets.scored.split(lengths)
    turned = ExpressionTargets(
        torch.cat([values[i] for i in order]),
        torch.cat([scored[i] for i in order]),
        targets.batch_labels[order],
        targets.classes[order],
    )
    one, other = ALL_PARTS(model, packed, targets), ALL_PARTS(model, packed.select(order), turned)
    for name in one.parts:
        close_loss(one.parts[name], other.parts[name].detach())


@pytest.mark.parametrize("generative", [False, True])
def test_bfloat16_learns_what_float32_learns(generative: bool) -> None:
    packed, targets = tiny_cells()
    totals, gradients = [], []
    for dtype in ("float32", "bfloat16"):
        model = tiny_model().set_compute_dtype(dtype)
        if generative:
            num_known = torch.tensor([4, 1, 6])
            found = GenerativeObjective()(model, packed, GenerativeTargets(targets.values, num_known))
        else:
            found = ALL_PARTS(model, packed, targets)
        found.total.backward()
        assert found.total.dtype == torch.float32
        totals.append(found.total.item())
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
        )
    assert totals[1] == pytest.approx(totals[0], rel=1e-2)
    assert gradients[1].isfinite().all()
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_contrast_needs_dropout_to_tell_views_apart() -> None:
    packed, targets = tiny_cells()
    model = tiny_model(dropout=0.5).train()
    torch.manual_seed(0)
    contrast = FineTuningObjective(expression=0.0, cce=1.0)
    first = contrast(model, packed, targets).total
    model.eval()
    assert not torch.equal(first, contrast(model, packed, targets).total)


def test_the_second_pass_leaves_the_first_alone() -> None:
    """The cell's embedding enters it as a number: no gradient reaches the first pass through it."""
    model = tiny_model()
    packed, targets = tiny_cells()
    wanted = GenerativeTargets(targets.values, torch.tensor([4, 1, 6]))
    found = GenerativeObjective()(model, packed, wanted)
    only_second = torch.autograd.grad(found.parts["second_pass"], model.encoder.embedding.weight)[0]
    assert (only_second[39] == 0).all()  # <cls> enters the first pass only
    assert torch.autograd.grad(
        GenerativeObjective(second_pass=False)(model, packed, wanted).total, model.encoder.embedding.weight
    )[0][39].any()


def test_the_second_pass_joins_when_the_authors_let_it() -> None:
    assert not GenerativeObjective.at_step(1000).second_pass and GenerativeObjective.at_step(1001).second_pass


def test_generation_learns() -> None:
    model = tiny_model().train()
    packed, targets = tiny_cells((12, 10, 14, 9))
    wanted = GenerativeTargets(targets.values, torch.tensor([6, 5, 7, 5]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = GenerativeObjective()(model, packed, wanted).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_what_is_hidden_belongs_to_the_cell_and_epoch() -> None:
    model = tiny_model()
    cells = PackedCells.from_lists([[39, *range(n)] for n in (10, 20)], [[-2.0, *range(n)] for n in (10, 20)])
    shown, targets = hide_expression(
        model, cells, mask_ratio=0.4, seed=1, epoch=0, classes=torch.tensor([0, 1])
    )
    assert targets.scored.sum() == 4 + 8 and (shown.values[targets.scored] == model.config.mask_value).all()
    assert torch.equal(targets.values, cells.values) and targets.classes is not None
    alone, its_own = hide_expression(model, cells.select([1]), mask_ratio=0.4, seed=1, epoch=0)
    assert torch.equal(its_own.scored, targets.scored[11:]) and torch.equal(alone.values, shown.values[11:])
    _, later = hide_expression(model, cells, mask_ratio=0.4, seed=1, epoch=1)
    assert not torch.equal(later.scored, targets.scored)
    FineTuningObjective()(model, shown, targets).total.backward()


def test_what_is_to_be_generated_belongs_to_the_cell_and_epoch() -> None:
    model = tiny_model()
    cells = PackedCells.from_lists([[39, *range(n)] for n in (10, 20)], [[-2.0, *range(n)] for n in (10, 20)])
    split, targets = split_expression(cells, mask_ratio=0.5, seed=1, epoch=0)
    assert targets.num_known.tolist() == [6, 11]
    alone, its_own = split_expression(cells.select([1]), mask_ratio=0.5, seed=1, epoch=0)
    assert torch.equal(alone.token_ids, split.token_ids[11:]) and its_own.num_known.tolist() == [11]
    assert GenerativeObjective()(model, split, targets).total.isfinite()


def test_targets_that_do_not_fit_are_named() -> None:
    model = tiny_model()
    packed, targets = tiny_cells()
    objective = FineTuningObjective(cls=1.0, dab=1.0)
    cases = {
        "targets.values": {"values": targets.values[1:]},
        "targets.scored": {"scored": targets.scored.float()},
        "targets.classes": {"classes": torch.tensor([0, 3, 1])},
        "batch_labels": {"batch_labels": torch.tensor([0, 5, 1])},
    }
    for where, changes in cases.items():
        with pytest.raises(InvalidArgumentError, match=where):
            objective(model, packed, ExpressionTargets(**{**vars(targets), **changes}))
    for name in ("classes", "batch_labels"):
        with pytest.raises(InvalidArgumentError, match=f"targets.{name}"):
            objective(model, packed, ExpressionTargets(**{**vars(targets), name: None}))


@pytest.mark.golden
def test_the_neighbourhood_of_spatial_cells(goldens) -> None:
    batch = PaddedBatch.read(goldens("scgpt") / "S_spatial_moe.npz")
    model = load(goldens("scgpt") / "S_spatial_moe", family="scgpt", options={"nhead": 4})
    packed, values = batch.packed, batch["values"][batch.tokens]
    scored = torch.arange(len(values)) % 3 == 1
    targets = ExpressionTargets(values, scored, coordinates=batch["coordinates"])
    objective = FineTuningObjective(neighbors=2.0, num_neighbors=2)
    found = objective(model, packed, targets)
    want = masked_mse(batch["slow.impute_pred"][batch.tokens], values, scored)
    close_loss(found.parts["neighbors"], want)
    close_loss(found.total.detach(), found.parts["expression"].detach() + 2 * want)
    with pytest.raises(InvalidArgumentError, match=r"targets\.coordinates"):
        objective(model, packed, ExpressionTargets(values, scored))
