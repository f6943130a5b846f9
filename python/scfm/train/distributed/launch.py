"""The processes of one run: who this one is, how they meet, and how all of them end.

torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as it does) starts the ranks; a process
without these variables is alone and never touches torch.distributed. Small numbers that all ranks must agree on travel
between CPUs by gloo; gradients and weights between GPUs by NCCL.

Ends are where distributed programs hang. A process group that is destroyed while a wrapped model is alive may abort or
hang; so may a rank that raises while others wait for it. Therefore what held the wrapped model is collected first, then
all ranks meet, then the group goes. A rank that fails says why and leaves the process at once, without any
clean-up. And a rank that stands still longer than the time-out is ended by a watchdog of its own, which prints where
every thread stood: the others could not end it.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from scfm.errors import ConfigError, ResourceError, ScfmError
from scfm.models.nn.precision import resolve_device
from scfm.train.distributed.meeting import store_of_this_start

__all__ = ["World", "joined"]

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A rank that waits in vain for another is told so by the process group after the time-out; the one that stands still is
# ended this much later, so that the message which explains more comes first.
WATCHDOG_GRACE_SECONDS = 5.0
_PATIENCE = timedelta(days=30)
_STDERR = 2


@dataclass(frozen=True)
class World:
    """This process among ``size`` ranks; ``local_size`` of them are on this machine. device: where it computes."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    timeout_seconds: float
    _patient: Any = field(default=None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes what there is one of."""
        return self.rank == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks, in place. numbers: on CPU, of the same shape on every rank; integers stay exact."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def meet(self) -> None:
        """Wait until every rank has come here."""
        self.sum(torch.zeros(1, dtype=torch.int64))

    @contextmanager
    def first_alone(self) -> Iterator[bool]:
        """What rank 0 does while the others wait, or before they do the same; gives whether this is rank 0.

        For reading a corpus or evaluating: rank 0 may take as long as it needs, neither the time-out nor the watchdog
        counts here. That it has ended the others are told by its connection.
        """
        if self.size == 1:
            yield True
            return
        self.unwatch()
        if not self.is_first:
            self._wait_for_first()
        yield self.is_first
        if self.is_first:
            self._wait_for_first()
        self.watch()

    def watch(self) -> None:
        """From now on this process ends, with the stacks of all threads, unless this is called again in time.

        Only among several ranks: one process that stands still harms nobody, and its user can see it.
        """
        if self.size > 1:
            seconds = self.timeout_seconds + WATCHDOG_GRACE_SECONDS
            faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def unwatch(self) -> None:
        """No longer."""
        if self.size > 1:
            faulthandler.cancel_dump_traceback_later()

    def _wait_for_first(self) -> None:
        dist.all_reduce(torch.zeros(1, dtype=torch.int64), group=self._patient)


@contextmanager
def joined(device: str, timeout_seconds: float) -> Iterator[World]:
    """This process as a rank of its run; the process group, if there are several, lasts as long as the block.

    Among several ranks an error in the block is printed and ends the process with exit code 1 there and then: the
    others wait for this rank in a collective, and only its end tells them. A group that the caller made before is used
    and left to the caller, as are errors then. Raises ConfigError for environment variables that cannot be and
    ResourceError where the ranks do not find each other.
    """
    if dist.is_initialized():
        if "gloo" not in str(dist.get_backend_config()):
            raise ConfigError(
                "the process group that is there takes no tensors on CPU",
                where="init_process_group",
                hint='Make it with backend "cpu:gloo,cuda:nccl", or leave it to scfm.',
            )
        yield _with_patience(_world(dist.get_rank(), dist.get_world_size(), device, timeout_seconds))
        return
    world = _world(*_rank_and_size(), device, timeout_seconds)
    if world.size == 1:
        yield world
        return
    try:
        _find_each_other(world)
        world = _with_patience(world)
        world.watch()
        yield world
        world.watch()
        _part()
        world.unwatch()
    except BaseException as error:
        _end_at_once(world, error)


def _rank_and_size() -> tuple[int, int]:
    """From torchrun's environment; (0, 1) without it."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 0, 1
    size, rank = _number("WORLD_SIZE", least=1), _number("RANK", least=0)
    if rank >= size:
        raise ConfigError(f"{rank}; WORLD_SIZE is {size}", where="RANK")
    if size > 1:
        _number("MASTER_PORT", least=1)
        _expect_address()
    return rank, size


def _world(rank: int, size: int, device: str, timeout_seconds: float) -> World:
    local_rank = _number("LOCAL_RANK", least=0) if "LOCAL_RANK" in os.environ else rank
    local_size = _number("LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in os.environ else size
    chosen = resolve_device(device)
    if str(chosen) == "cuda" and size > 1:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {local_rank} of this machine has no GPU; there are {torch.cuda.device_count()}",
                where="LOCAL_RANK",
                hint="Start as many processes a machine as it has GPUs (torchrun --nproc-per-node=gpu).",
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    return World(rank, size, local_rank, local_size, chosen, timeout_seconds)


def _number(variable: str, *, least: int) -> int:
    found = os.environ.get(variable)
    if found is None:
        missing = [name for name in _VARIABLES if name not in os.environ]
        raise ConfigError(
            f"not set, nor {', '.join(missing[1:])}" if len(missing) > 1 else "not set",
            where=variable,
            hint="Start several processes with torchrun, or unset RANK and WORLD_SIZE to run in one.",
        )
    if not found.isdigit() or int(found) < least:
        raise ConfigError(f"{found!r:.60}; expected a whole number from {least}", where=variable)
    return int(found)


def _expect_address() -> None:
    """The name of the first rank's machine must mean something here: said at once, not after the time-out."""
    address = os.environ.get("MASTER_ADDR", "")
    try:
        socket.getaddrinfo(address or None, int(os.environ["MASTER_PORT"]), type=socket.SOCK_STREAM)
        if address:
            return
        reason = "not set"
    except OSError as error:
        reason = f"{address!r:.100} is no address that this machine can find ({error.strerror or error})"
    raise ConfigError(
        reason,
        where="MASTER_ADDR",
        hint="It is the host name or address of the machine that runs rank 0 (torchrun's --rdzv-endpoint).",
    )


def _find_each_other(world: World) -> None:
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=world.timeout_seconds)
    try:
        dist.init_process_group(
            backend,
            store=_torchrun_store(world, timeout),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=world.device if world.device.type == "cuda" else None,
        )
    except (RuntimeError, OSError) as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise ResourceError(
                f"port {port} of this machine is taken by another program",
                where="MASTER_PORT",
                hint="Choose another one (torchrun --rdzv-endpoint=host:port or --standalone).",
            ) from error
        raise ResourceError(
            f"rank {world.rank} of {world.size} found no other ranks at {address} port {port}: "
            f"{str(error).splitlines()[0]:.300}",
            where="MASTER_ADDR",
            hint="Rank 0 must run there and the port must be open to all machines.",
        ) from error


def _torchrun_store(world: World, timeout: timedelta) -> Store | None:
    """This start's place in the store that torchrun keeps; None where rank 0 is to make a store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, world.size, is_master=False, timeout=timeout)
    return store_of_this_start(store, world.rank, world.size, timeout)


def _with_patience(world: World) -> World:
    """With a second group between CPUs, whose waiting has no end but the other's."""
    if world.size == 1:
        return world
    return replace(world, _patient=dist.new_group(backend="gloo", timeout=_PATIENCE))


def _part() -> None:
    """The order that does not hang: nothing wrapped is alive, all ranks are here, then the group goes."""
    gc.collect()
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def _end_at_once(world: World, error: BaseException) -> NoReturn:
    """Say what happened and leave: a rank that unwinds while others wait for it would hang with them."""
    with suppress(BaseException):
        sys.stderr.write(f"rank {world.rank} of {world.size}: {_told(error, world)}\n")
        if not isinstance(error, ScfmError):
            traceback.print_exception(error)
            faulthandler.dump_traceback(_STDERR, all_threads=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            if isinstance(error, Exception):
                get_error_handler().record_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)


def _told(error: BaseException, world: World) -> str:
    text = f"{type(error).__name__}: {error}"
    lowered = text.lower()
    if isinstance(error, ScfmError):
        return text
    if "timed out" in lowered or "timeout" in lowered:
        return f"another rank did not answer within timeout_seconds = {world.timeout_seconds:g}. {text}"
    if "connection closed" in lowered or "connection reset" in lowered:
        return f"another rank has ended. {text}"
    return text
