"""Plans of runs: what they foresee is what a run then does, and their sums are right; nothing is trained for them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from scfm.data.gene_tables import human_symbols
from scfm.errors import ConfigError, InvalidArgumentError
from scfm.train.config import PretrainConfig
from scfm.train.corpus.corpus import read_corpus
from scfm.train.corpus.feed import MicrobatchFeed
from scfm.train.cost.cost import RunCost, run_cost
from scfm.train.cost.device_peaks import device_sheet
from scfm.train.cost.flops import microbatch_flops
from scfm.train.cost.planned_epoch import PlannedEpoch, guessed_epoch, planned_epoch
from scfm.train.training_model import new_objective

H100 = device_sheet("H100")
SMALL = {
    "num_layers": 2, "hidden_size": 64, "num_heads": 2, "ffn_size": 64, "max_tokens": 128, "token_budget": 512,
    "microbatches_per_step": 2, "num_epochs": 1,
}  # fmt: skip
SHAPES: dict[str, dict] = {
    "geneformer": {"preset": "V1-10M"},
    "scgpt": {},
    "scbert": {"token_budget": 16_907},
    "scfoundation": {"token_budget": 40_000},
}


@pytest.fixture
def cells(tiny_adata, tmp_path):
    genes = sorted({gene for several in human_symbols().values() for gene in several})
    tiny_adata.var_names = genes[: tiny_adata.n_vars]
    tiny_adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def guessed(family: str = "geneformer", **settings) -> tuple[PretrainConfig, PlannedEpoch]:
    config = PretrainConfig(family=family, **(SHAPES[family] | settings))
    return config, guessed_epoch(config, 100_000, 1500)


def cost(config: PretrainConfig, epoch: PlannedEpoch, **arguments) -> RunCost:
    return run_cost(config, epoch, **({"sheet": H100} | arguments))


def test_a_plan_foresees_what_the_run_computes(cells, tmp_path) -> None:
    config = PretrainConfig(data=[cells], out=tmp_path / "run", **SMALL)
    epoch = planned_epoch(config)
    found = cost(config, epoch).facts
    corpus = read_corpus(config)  # finds the lengths where the plan left them
    objective = new_objective(config, corpus, torch.device("cpu"))
    corpus.measure(objective.lengths_of)
    plan = corpus.plan(0)
    steps = math.ceil(plan.num_microbatches / 2)
    with MicrobatchFeed(corpus, objective, config) as feed:
        batches = list(itertools.islice(feed, steps))
    microbatches = [one for batch in batches for one in batch.microbatches][: plan.num_microbatches]
    assert found["cells"] == sum(one.num_cells for one in microbatches) == 40
    assert found["tokens_per_epoch"] == sum(one.num_tokens for one in microbatches)
    assert found["microbatches_per_epoch"] == plan.num_microbatches and found["steps"] == steps
    assert found["unused_budget"] == pytest.approx(plan.unused_share, abs=1e-4)
    computed = sum(microbatch_flops(objective, one).model for one in microbatches)
    assert found["flops"] == pytest.approx(computed, rel=0.01)
    assert found["parameters"] == sum(p.numel() for p in objective.model.parameters())
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "checkpoints").exists()
    assert all(p.device.type == "meta" for p in epoch.model.parameters())


@pytest.mark.parametrize("family", SHAPES)
def test_every_family_without_data(family: str) -> None:
    config, epoch = guessed(family)
    found = cost(config, epoch)
    facts = found.facts
    assert facts["guessed"] and facts["cells"] == 100_000 and facts["parameters"] > 5e6
    assert facts["tokens_per_epoch"] == pytest.approx(facts["tokens_per_cell"] * 100_000, rel=1e-3)
    assert facts["microbatches_per_epoch"] * config.token_budget >= facts["tokens_per_epoch"]
    assert facts["flops"] > 0 and facts["flops_computed_again"] > 0
    assert facts["checkpoint_bytes"] == 12 * facts["parameters"]
    assert not found.problems and found.notes


def test_time_and_cost_are_those_of_the_operations() -> None:
    config, epoch = guessed(microbatches_per_step=16, max_steps=100)
    one = cost(config, epoch, mfu=0.5, price=2.5).facts
    assert one["steps"] == 100 and one["tokens"] == pytest.approx(100 * one["tokens_per_step"], rel=1e-3)
    assert one["seconds"] * 0.5 * H100.bfloat16 == pytest.approx(one["flops"])
    assert one["cost"] == pytest.approx(2.5 * one["seconds"] / 3600)
    eight = cost(config, epoch, mfu=0.5, price=2.5, num_gpus=8).facts
    assert eight["seconds"] == pytest.approx(one["seconds"] / 8) and eight["cost"] == pytest.approx(
        one["cost"]
    )
    assert eight["microbatches_per_rank"] == 2
    exact = cost(config, epoch, mfu=0.5, dtype=torch.float32).facts
    assert exact["seconds"] == pytest.approx(one["seconds"] * H100.bfloat16 / H100.float32)
    assert cost(config, epoch).facts["cost"] is None


def test_operations_grow_with_the_square_of_the_length() -> None:
    config = PretrainConfig(preset="V2-104M", token_budget=16_384)
    a_token, squares = [], []
    for mean in (500, 2000):
        epoch = guessed_epoch(config, 1000, mean)
        facts = cost(config, epoch).facts
        a_token.append(facts["flops"] / facts["tokens"])
        lengths = torch.cat([one.packed.lengths for one in epoch.sample]).double()
        squares.append(float(lengths.square().sum() / lengths.sum()))
    attention = 12 * 12 * 768 * (squares[1] - squares[0])
    assert a_token[1] - a_token[0] == pytest.approx(attention, rel=0.01)


def test_scgpts_second_pass_is_counted_from_its_step_on() -> None:
    config, epoch = guessed("scgpt", max_steps=1001)
    early = cost(config, epoch).facts
    config.max_steps = 2002
    both = cost(config, epoch).facts
    assert 2.5 < both["flops"] / early["flops"] < 3.0
    assert cost(config, epoch).memory["ddp"].activations > 0


def test_what_does_not_fit_is_said_with_what_would() -> None:
    config, epoch = guessed(preset="V2-316M", token_budget=131_072)
    found = cost(config, epoch, sheet=device_sheet("A100-40GB"))
    (problem,) = found.problems
    assert "do not fit into the 40 GB" in problem and "ddp, every block recomputed" in problem
    budget = int(problem.split("token_budget of ")[1].split(";")[0].replace(",", ""))
    config.token_budget = budget
    assert not cost(config, guessed_epoch(config, 100_000, 1500), sheet=device_sheet("A100-40GB")).problems
    config.token_budget, config.activation_checkpointing = 131_072, 1
    assert not cost(config, epoch, sheet=device_sheet("A100-40GB")).problems


def test_a_budget_that_cells_do_not_fill_gets_a_word(cells, tmp_path) -> None:
    config = PretrainConfig(data=[cells], out=tmp_path, **(SMALL | {"token_budget": 200}))
    epoch = planned_epoch(config)
    assert epoch.better_budget is not None
    assert any(f"token_budget = {epoch.better_budget:,}" in note for note in cost(config, epoch).notes)


def test_arguments_that_cannot_be() -> None:
    config, epoch = guessed(microbatches_per_step=4)
    with pytest.raises(ConfigError, match=r"microbatches_per_step.*1, 2, 4"):
        cost(config, epoch, num_gpus=3)
    for arguments in ({"mfu": 0.0}, {"mfu": 1.5}, {"num_gpus": 0}):
        with pytest.raises(InvalidArgumentError):
            cost(config, epoch, **arguments)
    with pytest.raises(ConfigError, match="token_budget"):
        guessed_epoch(PretrainConfig(family="scbert", token_budget=1000), 10, 100)
    with pytest.raises(ConfigError, match="mask_ratioo"):
        guessed_epoch(PretrainConfig(objective={"mask_ratioo": 0.1}), 10, 100)
