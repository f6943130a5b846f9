"""The tensors of a run by name: ``model.<name>`` and ``optim.<name>.<slot>``, the same however the model is wrapped.

DDP, activation checkpointing and torch.compile put words of their own into names, FSDP2 turns parameters into
DTensors; none of that is the model's, so names are cleaned and a checkpoint of one mode fits any other. A tensor
that has two names (a tied head) is kept under its first. The optimiser's state goes by the name of the parameter it
belongs to, not by its number, which depends on the parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scfm.errors import CheckpointError

__all__ = ["MODEL", "OPTIMIZER", "add_missing_state", "model_tensors", "optimizer_tensors"]

MODEL = "model."
OPTIMIZER = "optim."
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, whole or DTensors, sharing memory with the model."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"is a {type(tensor).__name__}; only tensors can be checkpointed", where=f"{MODEL}{name}"
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[f"{MODEL}{_clean(name)}"] = tensor.detach()
    return found


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state. A parameter that never had a gradient has none, and that is all right."""
    found: dict[str, Tensor] = {}
    for name, parameter in _optimized(model, optimizer):
        for slot, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"is a {type(value).__name__}; only optimisers whose state is tensors can be checkpointed",
                    where=f"{OPTIMIZER}{name}.{slot}",
                )
            found[f"{OPTIMIZER}{name}.{slot}"] = value.detach()
    return found


def add_missing_state(
    model: nn.Module, optimizer: Optimizer, stored: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Make the optimiser hold exactly the state that ``stored`` (name to shape and dtype) names, to be filled.

    State is made as torch's optimisers make it: like the parameter in shape, device and sharding, or a number that
    lies on the CPU unless the group is fused or capturable. Raises CheckpointError naming what cannot be placed.
    """
    slots: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, described in stored.items():
        owner, _, slot = name.removeprefix(OPTIMIZER).rpartition(".")
        slots.setdefault(owner, {})[slot] = described
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in _optimized(model, optimizer):
        group = groups[id(parameter)]
        on_device = bool(group.get("fused") or group.get("capturable"))
        state = {}
        for slot, (shape, dtype) in slots.pop(name, {}).items():
            if shape == tuple(parameter.shape) and slot != "step":
                state[slot] = torch.zeros_like(parameter.detach(), dtype=dtype)
            elif shape == ():
                state[slot] = torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
            else:
                raise CheckpointError(
                    f"has shape {list(shape)}, its parameter {list(parameter.shape)}",
                    where=f"{OPTIMIZER}{name}.{slot}",
                )
        if state:
            optimizer.state[parameter] = state
        else:
            optimizer.state.pop(parameter, None)
    if slots:
        owners = sorted(slots)
        raise CheckpointError(
            f"holds optimiser state of {len(owners)} parameters that this optimiser does not train: "
            f"{', '.join(owners[:5])}",
            hint="Resume with the model and the frozen parts that the run was begun with.",
        )


def _optimized(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimiser's parameters by name. A tied parameter goes by its first name, as in model_tensors."""
    names = {id(parameter): _clean(name) for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise CheckpointError(
                    f"the optimiser trains a parameter of shape {list(parameter.shape)} that is not the model's",
                    hint="Make the optimiser after the model is wrapped and moved to its device.",
                )
            yield name, parameter


def _clean(name: str) -> str:
    """The name without the wrappers' words. Raises nothing; a model's own part must not be called so."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
