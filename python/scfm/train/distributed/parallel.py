"""One model on several ranks: replicated (DDP), sharded (FSDP2), or sharded within groups that are replicas (HSDP).

A microbatch's loss is a sum that is already divided by the counts of the whole step, so gradients are added up over
microbatches and ranks and never averaged. Weights and their gradients are float32 everywhere, so are all reductions;
products run in the model's compute dtype, because its linear layers convert their weights themselves. (A bfloat16
``param_dtype`` of FSDP2 would make tables and norms bfloat16 too, and with them the residual stream, which these models
keep in float32.) So all modes compute the same, and differ in what lies where.

The blocks that are sharded one by one are those that every microbatch runs through the same number of times; all else
(tables, heads, scFoundation's decoder, which runs once a cell) is gathered once a microbatch with the root.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from scfm.errors import ConfigError
from scfm.models.base import FoundationModel
from scfm.models.nn.encoder import EncoderLayer
from scfm.models.nn.performer import PerformerBlock
from scfm.ops.products import fast_float32
from scfm.train.config import PretrainConfig
from scfm.train.distributed.launch import World
from scfm.train.objectives.prepared import Prepared
from scfm.train.objectives.protocol import PretrainingObjective

__all__ = ["ParallelModel", "TrainingModule"]

_WAYS_THROUGH_A_BLOCK = ("forward", "forward_generative")


class TrainingModule(nn.Module):
    """The model with its objective, so that a wrapper sees one forward from a microbatch to its loss."""

    def __init__(self, objective: PretrainingObjective) -> None:
        super().__init__()
        self.model: FoundationModel = objective.model
        self._objective = objective

    def forward(
        self, prepared: Prepared, weights: Mapping[str, float], counts: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This microbatch's part of the step's loss, 0-dim, and each term's sum without gradient.

        weights: of the terms at this step; counts: each term's units in the whole step, of all ranks.
        """
        sums = self._objective.losses(prepared)
        loss = sum(
            (sums[term] * (weight / max(counts[term], 1)) for term, weight in weights.items()),
            start=torch.zeros((), device=self.model.device),
        )
        return loss, {term: total.detach() for term, total in sums.items()}


class ParallelModel:
    """The objective's model as this rank trains it. The model inside keeps its parameters' names in every mode.

    Raises ConfigError where the ranks cannot be arranged as the settings say.
    """

    def __init__(self, objective: PretrainingObjective, config: PretrainConfig, world: World) -> None:
        self.model: FoundationModel = objective.model
        self._blocks = [
            block for block in self.model.modules() if isinstance(block, EncoderLayer | PerformerBlock)
        ]
        self._changed: list[tuple[nn.Module, str]] = []
        if config.compile:
            self._compile()
        self._recompute(config.activation_checkpointing)
        module = TrainingModule(objective)
        self.module: nn.Module = module
        self.is_sharded = world.size > 1 and config.parallel != "ddp"
        if self.is_sharded:
            self._shard(module, _mesh(config, world))
        elif world.size > 1:
            self.module = _replicated(module)

    def microbatch(
        self, prepared: Prepared, weights: Mapping[str, float], counts: Mapping[str, int], *, is_last: bool
    ) -> dict[str, Tensor]:
        """Forward and backward of one of the step's microbatches; the last one's adds up gradients over the ranks."""
        with self._reducing(is_last):
            loss, sums = self.module(prepared, weights, counts)
            with fast_float32(self.model.device):  # the backward's products too
                loss.backward()
        return cast(dict[str, Tensor], sums)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the whole gradient, 0-dim, the same on every rank."""
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def clip_gradients(self, norm: Tensor, longest: float) -> None:
        """Shorten the gradient, whose norm is given, to at most ``longest``."""
        # Scaled here and not by torch's function, which wants the norm in the gradients' own placement.
        factor = torch.clamp(longest / (norm + 1e-6), max=1.0)
        for gradient in self._gradients():
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For the optimiser: matrices and tables decay; norms, biases and other vectors do not, as the authors' do."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def whole_state(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """The model's state with every tensor whole, on CPU; all ranks must ask together where it is sharded.

        wanted: a rank that does not want it takes part and gets nothing.
        """
        whole = {}
        for name, tensor in self.model.state_dict().items():
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if wanted:
                whole[name] = gathered.detach().cpu()
        return whole

    def release(self) -> None:
        """Give the model back as it was, without recomputation; the wrapper must not be used afterwards."""
        for block, name in self._changed:
            if name in vars(block):
                delattr(block, name)
        self._changed.clear()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _recompute(self, every: int) -> None:
        """Activation checkpointing of every k-th block: its forward, compiled or not, runs again in the backward."""
        for block in self._blocks[::every] if every else ():
            for name in _WAYS_THROUGH_A_BLOCK:
                if hasattr(block, name):
                    self._change(block, name, partial(checkpoint, getattr(block, name), use_reentrant=False))

    def _compile(self) -> None:
        for block in self._blocks:
            for name in _WAYS_THROUGH_A_BLOCK:
                if hasattr(block, name):
                    self._change(block, name, torch.compile(getattr(block, name), dynamic=True))

    def _change(self, block: nn.Module, name: str, replaced: Any) -> None:
        setattr(block, name, replaced)
        self._changed.append((block, name))

    def _shard(self, module: TrainingModule, mesh: DeviceMesh) -> None:
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for block in _stack(self.model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
            if hasattr(block, "forward_generative"):
                register_fsdp_forward_method(block, "forward_generative")
        fully_shard(module, mesh=mesh, mp_policy=policy)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # Sums, never averages; the factor alone would be a reduction that gloo does not have.
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def _reducing(self, is_last: bool) -> Iterator[None]:
        waiting: AbstractContextManager[Any] = nullcontext()
        if self.is_sharded:
            cast(Any, self.module).set_requires_gradient_sync(is_last)
        elif isinstance(self.module, nn.parallel.DistributedDataParallel) and not is_last:
            waiting = self.module.no_sync()
        with waiting:
            yield


def _stack(model: FoundationModel) -> list[nn.Module]:
    """The blocks that a microbatch goes through once each way: the encoder's, or scBERT's Performer's."""
    stack: Any = model.layers if hasattr(model, "layers") else cast(Any, model).performer.layers
    return list(stack)


def _mesh(config: PretrainConfig, world: World) -> DeviceMesh:
    kind = world.device.type
    if config.parallel == "fsdp":
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("dp_shard",))
    group = config.shard_size or world.local_size
    if world.size % group:
        allowed = [n for n in range(1, world.size + 1) if world.size % n == 0]
        raise ConfigError(
            f"{group} does not divide the {world.size} ranks",
            where="shard_size",
            hint=f"Possible are {', '.join(map(str, allowed))}.",
        )
    return init_device_mesh(kind, (world.size // group, group), mesh_dim_names=("dp_replicate", "dp_shard"))


def _replicated(module: TrainingModule) -> nn.parallel.DistributedDataParallel:
    """DDP that adds up and is the same in a resumed process.

    DDP sorts its buckets anew after the first step unless it looks for unused parameters, and the order of additions
    among three and more ranks depends on the buckets: looking keeps a resumed run bitwise equal to one that went on.
    Buffers (random projections) change by keyed draws, alike on all ranks, so none are sent.
    """
    # Where every parameter is used DDP would advise on stderr not to look: here is one that is not.
    module.register_parameter("never_used", nn.Parameter(torch.zeros((), device=module.model.device)))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch renames broadcast_buffers and cannot yet do without
        wrapped = nn.parallel.DistributedDataParallel(
            module, find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    # A lambda, since torch reads annotations and understands no postponed ones.
    wrapped.register_comm_hook(None, lambda state, bucket: _sum(bucket))
    return wrapped


def _sum(bucket: Any) -> torch.futures.Future[Tensor]:
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return cast(torch.futures.Future[Tensor], work.get_future().then(lambda future: future.value()[0]))
