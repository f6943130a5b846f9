"""A place in torchrun's store that belongs to this start of the ranks and to no earlier one.

torchrun keeps one store for all its restarts, and torch's rendezvous writes into it under the same keys each time. A
rank that is started again may therefore read where a rank that is dead now once listened, and be refused; both lose a
restart and may do so again. The number of restarts cannot keep starts apart, for agents of several machines count it
each for itself. So every process names itself anew, and rank 0 answers each name with the name of its own start:

    rank r    "name/r" <- mine          waits for "answer/<mine>"         "here/<start>/r" <- 1
    rank 0    answers whatever "name/r" says, until "here/<start>/r" is there for every r

A dead process's name is answered in vain; a dead rank 0 answers nobody.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

__all__ = ["store_of_this_start"]

_POLL_SECONDS = 0.02


def store_of_this_start(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """``store`` under a prefix that the ranks started together share. Raises RuntimeError after ``timeout``."""
    until = time.monotonic() + timeout.total_seconds()
    start = _answer_all(store, size, until) if rank == 0 else _ask(store, rank, until)
    return PrefixStore(start, store)


def _ask(store: Store, rank: int, until: float) -> str:
    mine = uuid.uuid4().hex
    store.set(f"name/{rank}", mine)
    while not store.check([f"answer/{mine}"]):
        _pause(until, "no answer from rank 0")
    start = store.get(f"answer/{mine}").decode()
    store.set(f"here/{start}/{rank}", "1")
    return start


def _answer_all(store: Store, size: int, until: float) -> str:
    start = uuid.uuid4().hex
    missing = set(range(1, size))
    answered: dict[int, bytes] = {}
    while missing:
        for rank in sorted(missing):
            if store.check([f"here/{start}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"name/{rank}"]) and (name := store.get(f"name/{rank}")) != answered.get(rank):
                store.set(f"answer/{name.decode()}", start)
                answered[rank] = name
        if missing:
            _pause(until, f"nothing from rank {min(missing)}")
    return start


def _pause(until: float, why: str) -> None:
    if time.monotonic() > until:
        raise RuntimeError(f"timed out: {why}")
    time.sleep(_POLL_SECONDS)
