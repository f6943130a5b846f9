"""Which rank writes which piece of which tensor, decided by each rank alone and in agreement.

Of a sharded tensor (a DTensor of FSDP2) every rank holds a chunk, and where ranks hold the same chunk (HSDP's
replicas) they take turns by the tensor's number. What all ranks hold whole (DDP's parameters, buffers, numbers) is
dealt out largest first to whoever has least so far, so that every rank writes about the same number of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from scfm.errors import CheckpointError

__all__ = ["Chunk", "local_chunks", "owned_chunks"]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it begins in the whole, and its numbers as they lie on this rank."""

    name: str
    offsets: tuple[int, ...]
    values: Tensor


def owned_chunks(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> list[Chunk]:
    """What this rank is to write, by name. Chunks without numbers are nobody's."""
    mine: list[Chunk] = []
    shared: list[tuple[str, Tensor]] = []
    for number, name in enumerate(sorted(tensors)):
        tensor = tensors[name]
        if not is_sharded(tensor):
            shared += [(name, tensor)] if tensor.numel() else []
        elif _takes_turn(name, tensor, number):
            mine += [chunk for chunk in local_chunks(name, tensor) if chunk.values.numel()]
    loads = [0] * world_size
    for name, tensor in sorted(shared, key=lambda entry: (-entry[1].nbytes, entry[0])):
        least = loads.index(min(loads))
        loads[least] += tensor.nbytes
        if least == rank:
            mine.append(Chunk(name, (0,) * tensor.dim(), tensor))
    return sorted(mine, key=lambda chunk: chunk.name)


def local_chunks(name: str, tensor: Tensor) -> list[Chunk]:
    """The chunk of the tensor that lies on this rank; of an ordinary tensor, all of it."""
    if not is_sharded(tensor):
        return [Chunk(name, (0,) * tensor.dim(), tensor)]
    sharded = cast(Any, tensor)
    local = sharded.to_local()
    boxes = sharded.__create_chunk_list__()
    if len(boxes) != 1 or tuple(boxes[0].sizes) != tuple(local.shape):
        raise CheckpointError(
            f"lies on this rank in {len(boxes)} pieces; expected one", where=f"tensor {name!r}"
        )
    return [Chunk(name, tuple(boxes[0].offsets), local)]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing torch.distributed.tensor into a run of one process."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _takes_turn(name: str, tensor: Tensor, number: int) -> bool:
    sharded = cast(Any, tensor)
    mesh, placements = sharded.device_mesh, cast(Sequence[Any], sharded.placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return False
    for dimension, placement in enumerate(placements):
        if placement.is_partial():
            raise CheckpointError("is a sum that was never taken", where=f"tensor {name!r}")
        if placement.is_replicate() and coordinate[dimension] != number % mesh.size(dimension):
            return False
    return True
