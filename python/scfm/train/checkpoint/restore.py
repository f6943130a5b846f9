"""Putting a checkpoint's tensors back into a model and an optimiser, however many ranks hold them now and how.

Every name, shape and dtype is compared both ways before anything is touched. The numbers are then fetched by
torch.distributed.checkpoint's reader of sharded safetensors, which finds for each chunk that lies on this rank the
pieces of the files that cover it; each rank reads for itself, without collectives. Its errors derive from
BaseException and are turned into ordinary ones here.

Learning rate, betas and weight decay are not the checkpoint's: they come from the settings, which a resumed run has
compared with those it was begun with.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from scfm.errors import CheckpointError, IntegrityError
from scfm.train.checkpoint.named_tensors import (
    MODEL,
    OPTIMIZER,
    add_missing_state,
    model_tensors,
    optimizer_tensors,
)
from scfm.train.checkpoint.verify import FoundCheckpoint, Stored

__all__ = ["restore"]

_MOST_NAMED = 5


def restore(found: FoundCheckpoint, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Fill the model, and the optimiser unless it is None, from the checkpoint.

    Raises CheckpointError naming the tensors that do not fit; no weight is then changed.
    """
    wanted = _with_numbers(model_tensors(model))
    _expect_same(found, {n: t for n, t in found.tensors.items() if n.startswith(MODEL)}, wanted)
    if optimizer is not None:
        if found.manifest.optimizer != type(optimizer).__name__:
            raise CheckpointError(
                f"holds the state of {found.manifest.optimizer}, the optimiser is {type(optimizer).__name__}",
                path=found.path,
            )
        stored = {n: t for n, t in found.tensors.items() if n.startswith(OPTIMIZER)}
        add_missing_state(model, optimizer, {name: (t.shape, t.dtype) for name, t in stored.items()})
        state = _with_numbers(optimizer_tensors(model, optimizer))
        _expect_same(found, stored, state)
        wanted |= state
    _read(found, wanted)


def _with_numbers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without those of no elements, of which no file holds anything."""
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def _expect_same(found: FoundCheckpoint, stored: Mapping[str, Stored], wanted: Mapping[str, Tensor]) -> None:
    problems = _named("missing", sorted(set(wanted) - set(stored)))
    problems += _named("not this model's", sorted(set(stored) - set(wanted)))
    shapes, dtypes = [], []
    for name in sorted(set(stored) & set(wanted)):
        if stored[name].shape != tuple(wanted[name].shape):
            shapes.append(f"{name} is {list(stored[name].shape)}, expected {list(wanted[name].shape)}")
        elif stored[name].dtype != wanted[name].dtype:
            dtypes.append(f"{name} is {stored[name].dtype}, expected {wanted[name].dtype}")
    problems += _named("of another shape", shapes) + _named("of another dtype", dtypes)
    if problems:
        raise CheckpointError(
            f"does not fit: {'; '.join(problems)}",
            path=found.path,
            hint="Resume with the model settings that the run was begun with.",
        )


def _named(what: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    more = f" and {len(entries) - _MOST_NAMED} more" if len(entries) > _MOST_NAMED else ""
    return [f"{len(entries)} {what} ({', '.join(entries[:_MOST_NAMED])}{more})"]


def _read(found: FoundCheckpoint, wanted: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it reads without collectives, which is asked for
            load(wanted, storage_reader=HuggingFaceStorageReader(str(found.path)), no_dist=True)
    except CheckpointException as error:
        told = "; ".join(str(failure[0]) for failure in error.failures.values())
        raise IntegrityError(f"cannot be read: {told[:500]}", path=found.path) from error
