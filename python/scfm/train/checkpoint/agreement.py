"""What all ranks tell each other about a checkpoint: one small collective, called by all of them alike.

It runs in the thread that trains, at a step boundary, and nowhere else: the threads that write files never talk to
other ranks, so a save in the background cannot tangle with the collectives of a step, and needs no process group of
its own. Without a process group there is one rank, which agrees with itself.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from scfm import errors

__all__ = ["all_tell", "first_error", "rank_and_size"]

_BYTES = 1024  # of every message, so that one collective of a fixed size is enough


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_tell(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's ``facts``, by rank. Long text in them is cut short."""
    _, world_size = rank_and_size()
    if world_size == 1:
        return [facts]
    message = torch.frombuffer(bytearray(_fitting(facts).ljust(_BYTES)), dtype=torch.uint8)
    # A group of NCCL alone takes no tensors in host memory.
    by_gloo = "gloo" in str(dist.get_backend_config())
    message = message if by_gloo else message.cuda()
    heard = [torch.empty_like(message) for _ in range(world_size)]
    dist.all_gather(heard, message)
    return [json.loads(bytes(part.tolist())) for part in heard]


def first_error(error: Exception | None) -> Exception | None:
    """The first rank's error, on every rank, if any rank has one: itself where it happened, its like elsewhere."""
    facts = {"kind": "", "text": "", "errno": None}
    if error is not None:
        kind = type(error).__name__
        text = str(error) if isinstance(error, errors.ScfmError) else f"{kind}: {error}"
        facts = {"kind": kind, "text": text, "errno": getattr(error, "errno", None)}
    for rank, told in enumerate(all_tell(facts)):
        if told["kind"]:
            if rank == rank_and_size()[0]:
                return error
            like: Exception = getattr(errors, told["kind"], errors.ScfmError)(told["text"])
            if isinstance(like, errors.StorageError):
                like.errno = told["errno"]
            return like
    return None


def _fitting(facts: dict[str, Any]) -> bytes:
    while True:
        encoded = json.dumps(facts).encode()
        if len(encoded) <= _BYTES:
            return encoded
        longest = max(facts, key=lambda name: len(facts[name]) if isinstance(facts[name], str) else -1)
        facts = {**facts, longest: facts[longest][: len(facts[longest]) * 3 // 4]}
