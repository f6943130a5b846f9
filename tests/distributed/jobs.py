"""What ranks are told to do in tests. Arguments and results are JSON."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scfm.data.packed import PackedCells
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.train.config import PretrainConfig
from scfm.train.distributed.launch import joined
from scfm.train.distributed.parallel import ParallelModel
from scfm.train.distributed.step_agreement import StepTotals
from scfm.train.objectives.geneformer_pretraining import GeneformerPretraining
from scfm.train.objectives.settings import GeneformerSettings
from scfm.train.pretrain import pretrain

GENES = [f"ENSG{i:011d}" for i in range(1, 61)]


def few_steps(num_steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Losses and norms of some steps of four microbatches each, shared out between the ranks; weights afterwards."""
    config = PretrainConfig(data=["unused"], device="cpu", **settings)
    with joined("cpu", 30.0) as world:
        vocab = GeneformerDictionaries.from_vocabulary(GENES, dict.fromkeys(GENES, 1.0), version="V2")
        shape = GeneformerConfig(
            num_layers=3, hidden_size=32, num_heads=2, ffn_size=64, max_tokens=64, vocab_size=64,
            hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.3,
        )  # fmt: skip
        model = Geneformer.from_config(shape, vocab, seed=1)
        model.set_compute_dtype(config.precision).train()
        objective = GeneformerPretraining(model, GeneformerSettings(), seed=0)
        parallel = ParallelModel(objective, config, world)
        groups = parallel.parameter_groups(0.01)
        optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=True)
        losses, norms = [], []
        for step in range(num_steps):
            every = [objective.prepare(_cells(4 * step + i), epoch=0) for i in range(4)]
            share = 4 // world.size
            mine = every[world.rank * share : (world.rank + 1) * share]
            counts = {"masked_genes": sum(p.counts["masked_genes"] for p in every)}
            total = torch.zeros(1, dtype=torch.float64)
            for i, prepared in enumerate(mine):
                sums = parallel.microbatch(prepared, objective.weights, counts, is_last=i == share - 1)
                total += sums["masked_genes"]
            norm = parallel.gradient_norm()
            parallel.clip_gradients(norm, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(world.sum(total)) / counts["masked_genes"])
            norms.append(float(norm))
        whole = parallel.whole_state()
        parallel.release()
        result = {
            "losses": losses,
            "norms": norms,
            "names": sorted(whole),
            "weights": float(sum(tensor.double().abs().sum() for tensor in whole.values())),
        }
    return result


def _cells(number: int) -> PackedCells:
    generator = np.random.default_rng(number)
    lists = [[2, *generator.permutation(60)[: generator.integers(3, 40)] + 4, 3] for _ in range(5)]
    packed = PackedCells.from_lists([[int(token) for token in cell] for cell in lists])
    return PackedCells(packed.token_ids, None, packed.cu_seqlens, packed.cell_ids + 5 * number)


def meet_and_part(fault: str, rank: int, timeout_seconds: float) -> str:
    """Ranks meet, one of them meets with a fault, and all part; what the process group makes of that."""
    mine = int(os.environ["RANK"]) == rank
    with joined("cpu", timeout_seconds) as world:
        if mine and fault == "raises":
            raise ValueError("the data of this rank are broken")
        world.meet()
        world.watch()
        if mine and fault == "hangs":
            time.sleep(600)
        world.meet()
        with world.first_alone() as first:
            if first and fault == "is slow alone":
                time.sleep(timeout_seconds + 2)
        world.meet()
        module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        module(torch.zeros(2, 4)).sum().backward()
    return "parted"


def within_a_group_of_the_callers() -> str:
    """The caller's process group is used and left to the caller."""
    torch.distributed.init_process_group("gloo")
    with joined("cpu", 30.0) as world:
        assert world.sum(torch.ones(1)).item() == world.size == 2
    assert torch.distributed.is_initialized()
    try:
        with joined("cpu", 30.0):
            raise ValueError("for the caller")
    except ValueError:
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return "the caller's"


def train(settings: dict[str, Any], fault: dict[str, Any] | None = None, slow: float = 0.0) -> dict[str, Any]:
    """A whole run, or what is left of it. fault: {"rank", "step", "what"}: before it takes part in that step this rank
    is killed ("kill"), gets a signal twice ("SIGTERM", "SIGUSR1"), or meets a loss that is no number ("nan", from that
    step on "nans"). slow: seconds a step. Returns how it ended and, of this rank, the cells of each step.
    """
    warnings.filterwarnings("ignore", message="token_budget")
    cells: dict[int, list[int]] = {}
    told: list[dict[str, Any]] = []
    rank = int(os.environ.get("RANK", "0"))
    first_step = _first_step(Path(settings["out"]))
    agreed = StepTotals.agreed

    def watched(world: Any, microbatches: Any, terms: Any, **facts: Any) -> StepTotals:
        step = first_step + len(cells) + 1
        cells[step] = [cell for prepared in microbatches for cell in prepared.cell_ids.tolist()]
        time.sleep(slow)
        if fault is not None and fault["rank"] == rank:
            _do(fault["what"], fault["step"], step)
        return agreed(world, microbatches, terms, **facts)

    StepTotals.agreed = watched  # type: ignore[method-assign, assignment]
    result = pretrain(settings, progress=told.append)
    return {
        "step": result.step,
        "stopped": result.stopped,
        "cells": cells,
        "events": [line for line in told if "event" in line],
        "weights": _checksum(result.model),
    }


def _first_step(out: Path) -> int:
    """The newest checkpoint's; no test leaves a damaged one."""
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def _do(what: str, when: int, step: int) -> None:
    losses = GeneformerPretraining.losses
    if what in ("nan", "nans") and (step == when or (step > when and what == "nans")):
        GeneformerPretraining.losses = _not_finite  # type: ignore[method-assign]
    elif what in ("nan", "nans"):
        GeneformerPretraining.losses = _SOUND_LOSSES  # type: ignore[method-assign]
    elif step == when and what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif step == when:
        assert losses is _SOUND_LOSSES
        for _ in range(2):
            os.kill(os.getpid(), getattr(signal, what))


_SOUND_LOSSES = GeneformerPretraining.losses


def _not_finite(objective: GeneformerPretraining, prepared: Any) -> dict[str, torch.Tensor]:
    return {name: loss * float("nan") for name, loss in _SOUND_LOSSES(objective, prepared).items()}


def _checksum(model: torch.nn.Module) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def losses_of(out: Path) -> list[float]:
    """Of every step, from the file that users read."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return [line["loss"] for line in steps]
