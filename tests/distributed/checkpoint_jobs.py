"""Ranks that train a small model and keep checkpoints of it, in any mode. Arguments and results are JSON."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.hf_storage
import torch.distributed.checkpoint.state_dict_loader
from failing_fs import FailingOs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from scfm.data import atomic_file
from scfm.train.checkpoint import CheckpointStore, TrainState
from scfm.train.distributed.launch import World, joined

SETTINGS = {"learning_rate": 1e-2, "model": {"hidden_size": 12}}


class Net(nn.Module):
    """Odd sizes (7 rows on 2 ranks), a tied head, a vector, a buffer, a scalar, a frozen part and one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 12)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 31, bias=False)
        self.head.weight = self.table.weight
        self.one = nn.Linear(12, 1, bias=False)
        self.unused = nn.Linear(3, 5)
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        hidden = self.norm(hidden)
        return nn.functional.cross_entropy(self.head(hidden), tokens) + self.one(hidden).square().mean()


def wrapped(net: Net, mode: str, world: World) -> nn.Module:
    if world.size == 1 and mode == "ddp":
        return net
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    shape = (1, world.size) if mode != "hsdp" else (world.size, 1)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    mesh = mesh if mode == "hsdp" else mesh["dp_shard"]
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for part in net.modules():
        if isinstance(part, FSDPModule) and world.size > 1:
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return net


def train(
    out: str,
    mode: str,
    num_steps: int,
    *,
    every: int = 1,
    fused: bool = False,
    crash: tuple[int, str] | None = None,
    fails_on: int | None = None,
    on_storage_error: str = "warn",
) -> dict[str, Any]:
    """Go on from the newest checkpoint in ``out`` for some steps, one checkpoint every ``every``; losses by step.

    crash: a rank and the point at which it kills itself; fails_on: a rank whose disk is full from the second save on.
    """
    with joined("cpu", 30.0) as world, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if crash is not None and world.rank == crash[0]:
            os.environ["SCFM_CRASH_AT"] = crash[1]
        result = _train(out, mode, num_steps, every, fused, fails_on, on_storage_error, world)
        result["told"] = [str(w.message) for w in told if "ScfmWarning" in type(w.message).__name__]
    return result


def _train(
    out: str,
    mode: str,
    num_steps: int,
    every: int,
    fused: bool,
    fails_on: int | None,
    policy: Any,
    world: World,
) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Net()
    module = wrapped(net, mode, world)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:3], "weight_decay": 0.1}, {"params": trained[3:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS["learning_rate"], fused=fused)
    store = CheckpointStore(Path(out), on_storage_error=policy)
    found = store.newest()
    state = TrainState(0, 0, 0, 0, settings=SETTINGS, world_size=world.size)
    if found is not None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(7.0)  # nothing of the old numbers may survive
        state = store.load(found, module if mode != "ddp" else net, optimizer)
    losses, committed = {}, []
    for step in range(state.step + 1, state.step + num_steps + 1):
        tokens = torch.randint(31, (8,), generator=torch.Generator().manual_seed(step))
        mine = tokens.reshape(world.size, -1)[world.rank]
        loss = module(mine) / (1 if mode == "ddp" else world.size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        net.seen += 1
        net.mean += step
        total = loss.detach().clone()
        if world.size > 1:
            dist.all_reduce(total)
        losses[step] = float(total) / (world.size if mode == "ddp" else 1)
        if fails_on is not None and step == 2:
            store.finish()
            _fill_disk(fails_on == world.rank)
        if step % every == 0:
            store.save(
                TrainState(step, 0, step, 0, settings=SETTINGS, world_size=world.size),
                module if step % 2 else net,
                optimizer,
            )
        store.poll()
        committed.append(str(store.last))
    store.finish()
    weights = {name: float(_whole(tensor).double().sum()) for name, tensor in net.state_dict().items()}
    steps = [float(_whole(s["step"])) for s in optimizer.state.values()]
    last = None if store.last is None else store.last.name
    del module, net, optimizer
    return {
        "losses": losses,
        "weights": weights,
        "steps": steps,
        "from": None if found is None else found.step,
        "skipped": [] if found is None else list(found.skipped),
        "last": last,
    }


def _fill_disk(full: bool) -> None:
    class FullDisk(FailingOs):
        def __getattr__(self, name: str) -> Any:
            self.num_calls = self.nth - 1 if name == "posix_fallocate" else 0
            return super().__getattr__(name)

    if full:
        atomic_file.os = FullDisk(1, 28)  # type: ignore[attr-defined]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
