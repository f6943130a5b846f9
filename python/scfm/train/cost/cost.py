"""What a pretraining run will take on named hardware, worked out before anything is trained.

    steps       microbatches of all epochs / microbatches_per_step, at most max_steps
    FLOPs       flops.py on microbatches of cells that stand for all (planned_epoch.py), forward and backward
    time        FLOPs / (GPUs * peak * MFU); reading, evaluation and checkpoints run beside the training or are short
    cost        hours * GPUs * price
    memory      training_memory.py, for each way of sharing the weights
    checkpoint  12 bytes a weight: the weight and AdamW's two moments in float32

The MFU is an assumption; everything else follows from the settings and the cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from scfm.errors import InvalidArgumentError
from scfm.models.nn.encoder import EncoderLayer
from scfm.models.nn.performer import PerformerBlock
from scfm.train.config import PretrainConfig
from scfm.train.corpus.feed import share_of
from scfm.train.cost.device_peaks import DeviceSheet
from scfm.train.cost.flops import Flops, microbatch_flops
from scfm.train.cost.planned_epoch import PlannedEpoch
from scfm.train.cost.training_memory import TrainingMemory, training_memory
from scfm.train.objectives.settings import ScgptSettings, objective_settings

__all__ = ["RunCost", "run_cost"]

BYTES_A_WEIGHT = 12
MODES = ("ddp", "fsdp", "hsdp")
GPUS_A_MACHINE = 8
_FILLED = 0.95  # of a GPU's memory; fragments take the rest


@dataclass(frozen=True)
class RunCost:
    """The whole run: bytes, seconds, FLOPs. memory: on one GPU, by way of sharing and by activation checkpointing (the
    settings' and every block); problems: in words, what will not work; notes: what could be better.
    """

    facts: dict[str, Any]
    memory: dict[str, TrainingMemory]
    problems: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        memory = {name: found.to_dict() for name, found in self.memory.items()}
        return {**self.facts, "memory_per_gpu": memory, "problems": self.problems, "notes": self.notes}


def run_cost(
    config: PretrainConfig,
    epoch: PlannedEpoch,
    *,
    sheet: DeviceSheet,
    dtype: torch.dtype = torch.bfloat16,
    num_gpus: int = 1,
    mfu: float = 0.4,
    price: float | None = None,
) -> RunCost:
    """sheet: of each GPU; dtype: of products; mfu: assumed, 0 to 1; price: of a GPU for an hour, in any currency.

    Raises ConfigError where the GPUs cannot share a step, InvalidArgumentError for other arguments.
    """
    if not 0 < mfu <= 1:
        raise InvalidArgumentError(f"{mfu}; expected a share above 0, at most 1", where="--mfu")
    if num_gpus < 1:
        raise InvalidArgumentError(f"{num_gpus}; expected at least 1", where="--num-gpus")
    microbatches_per_rank = len(share_of(0, num_gpus, config.microbatches_per_step))
    all_microbatches = config.num_epochs * epoch.num_microbatches
    num_steps = math.ceil(all_microbatches / config.microbatches_per_step)
    if config.max_steps is not None:
        num_steps = min(num_steps, config.max_steps)
    share = min(num_steps * config.microbatches_per_step / all_microbatches, 1.0)
    flops = _flops(config, epoch, num_steps) * share
    peak = sheet.float32 if dtype == torch.float32 else sheet.bfloat16
    seconds = flops.model / (num_gpus * peak * mfu)
    num_tokens = round(epoch.num_tokens * config.num_epochs * share)
    weights = sum(p.numel() for p in epoch.model.parameters())
    facts: dict[str, Any] = {
        "cells": epoch.num_cells,
        "tokens_per_epoch": epoch.num_tokens,
        "tokens_per_cell": round(epoch.num_tokens / max(epoch.num_cells, 1), 1),
        "microbatches_per_epoch": epoch.num_microbatches,
        "unused_budget": round(epoch.unused_share, 4),
        "epochs": config.num_epochs,
        "steps": num_steps,
        "tokens": num_tokens,
        "tokens_per_step": round(num_tokens / max(num_steps, 1)),
        "microbatches_per_rank": microbatches_per_rank,
        "parameters": weights,
        "flops": flops.model,
        "flops_computed_again": flops.hardware(checkpoint_every=config.activation_checkpointing)
        - flops.model,
        "gpu": sheet.name,
        "gpus": num_gpus,
        "peak_flops_per_gpu": peak,
        "assumed_mfu": mfu,
        "seconds": seconds,
        "seconds_per_step": seconds / max(num_steps, 1),
        "tokens_per_second": num_tokens / seconds if seconds else None,
        "gpu_hours": num_gpus * seconds / 3600,
        "cost": None if price is None else num_gpus * seconds / 3600 * price,
        "checkpoint_bytes": BYTES_A_WEIGHT * weights,
        "checkpoints_bytes": BYTES_A_WEIGHT * weights * _num_checkpoints(config, num_steps),
        "guessed": epoch.guessed,
    }
    memory = _memory(config, epoch, num_gpus, dtype.itemsize, microbatches_per_rank)
    problems, notes = _advice(config, epoch, memory, sheet)
    return RunCost(facts, memory, problems, notes)


def _flops(config: PretrainConfig, epoch: PlannedEpoch, num_steps: int) -> Flops:
    """Of all epochs. scGPT's second pass joins late, so its steps are of two kinds."""
    scale = config.num_epochs * epoch.num_cells / epoch.sample_cells
    settings = objective_settings(config.family, config.objective)
    early = num_steps
    if isinstance(settings, ScgptSettings) and settings.kind == "generative":
        early = min(settings.second_pass_after + 1, num_steps)
    total = Flops()
    for step, count in ((0, early), (num_steps, num_steps - early)):
        if count:
            epoch.objective.at_step(step)
            of_kind = sum((microbatch_flops(epoch.objective, one) for one in epoch.sample), start=Flops())
            total += of_kind * (scale * count / num_steps)
    return total


def _memory(
    config: PretrainConfig, epoch: PlannedEpoch, num_gpus: int, element_size: int, microbatches_per_rank: int
) -> dict[str, TrainingMemory]:
    epoch.objective.at_step(10**12)
    rows = _block_tokens(epoch, config.token_budget)
    group = min(config.shard_size or GPUS_A_MACHINE, num_gpus)
    found = {}
    for mode in dict.fromkeys((config.parallel, *(MODES if num_gpus > 1 else ()))):
        for every in dict.fromkeys((config.activation_checkpointing, 0, 1)):
            found[_named(mode, every)] = training_memory(
                epoch.model,
                block_tokens=rows,
                element_size=element_size,
                shards={"ddp": 1, "fsdp": num_gpus, "hsdp": group}[mode],
                microbatches_per_rank=microbatches_per_rank,
                checkpoint_every=every,
            )
    return found


def _named(mode: str, every: int) -> str:
    return (
        f"{mode}, every block recomputed"
        if every == 1
        else f"{mode}, 1 of {every} recomputed"
        if every
        else mode
    )


def _block_tokens(epoch: PlannedEpoch, token_budget: int) -> dict[type[nn.Module], float]:
    """Rows that a full microbatch runs through blocks of each kind, with the passes of the last step."""
    encoder = performer = positions = 0.0
    config: Any = epoch.model.config
    for one in epoch.sample:
        positions += one.num_tokens
        if epoch.objective.family == "scbert":
            performer += one.num_tokens
            continue
        encoder += one.packed.num_tokens
        if epoch.objective.family == "scfoundation":
            performer += one.num_cells * config.vocab_size
            continue
        # Further passes of the same tokens: those that the budget counts, and scGPT's second pass.
        encoder += one.num_tokens - one.packed.num_tokens
        encoder += one.packed.num_tokens * ("second_pass" in epoch.objective.weights)
    scale = token_budget / max(positions, 1.0)
    return {EncoderLayer: encoder * scale, PerformerBlock: performer * scale}


def _num_checkpoints(config: PretrainConfig, num_steps: int) -> int:
    """At most on the disk at once: the newest, those kept for good, and the one that is being written."""
    written = max(num_steps // config.checkpoint_every, 1) if config.checkpoint_every else 1
    for_good = num_steps // config.keep_every if config.keep_every else 0
    return min(config.keep_last + 1, written) + for_good


def _advice(
    config: PretrainConfig, epoch: PlannedEpoch, memory: dict[str, TrainingMemory], sheet: DeviceSheet
) -> tuple[list[str], list[str]]:
    room = _FILLED * sheet.memory
    chosen = memory[_named(config.parallel, config.activation_checkpointing)]
    problems, notes = [], []
    if chosen.total > room:
        fitting = [name for name, found in memory.items() if found.total <= room]
        standing = replace(chosen, activations=0).total
        budget = int(config.token_budget * (room - standing) / max(chosen.activations, 1))
        ways = [f"a token_budget of {budget:,}"] if budget >= _longest(epoch) else []
        ways += fitting[:2]
        problems.append(
            f"{chosen.total / 1e9:.1f} GB do not fit into the {sheet.memory / 1e9:.0f} GB of a {sheet.name} "
            + (
                f"(what would: {'; '.join(ways)})"
                if ways
                else "in any way of sharing: take more or larger GPUs"
            )
        )
    if epoch.better_budget is not None:
        notes.append(
            f"{epoch.unused_share:.1%} of the token budget stay unused; token_budget = {epoch.better_budget:,} fits "
            "these cells better"
        )
    if epoch.guessed:
        notes.append("cells and lengths are guessed: no data were read")
    return problems, notes


def _longest(epoch: PlannedEpoch) -> int:
    """Positions of the longest cell of the sample, which a microbatch must hold."""
    return max(int(one.num_tokens / max(one.num_cells, 1)) for one in epoch.sample)
