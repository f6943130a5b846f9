"""Checkpoints whose every number is their step, so that a mixture of two would show."""

from __future__ import annotations

import os
import resource
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scfm.train.checkpoint import CheckpointStore, FoundCheckpoint, TrainState


def made(step: int = 0, width: int = 16) -> tuple[nn.Linear, torch.optim.AdamW]:
    """A model and an optimiser whose every number is the step."""
    net = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(net.parameters())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(step)
            moments = {name: torch.full_like(parameter, step) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return net, optimizer


def write(out: str | Path, last: int, *, width: int = 16, **options: Any) -> list[str]:
    """Checkpoints from the newest that is there up to step ``last``; what was warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        store = CheckpointStore(out, **options)
        found = store.newest()
        for step in range(1 if found is None else found.step + 1, last + 1):
            store.save(TrainState(step, 0, step, 0), *made(step, width))
            store.poll()
        store.finish()
    return [str(warning.message) for warning in told]


def expect_whole(found: FoundCheckpoint | None, width: int = 16) -> int:
    """The checkpoint's step, if every number that it holds is of that step."""
    assert found is not None
    net, optimizer = made(-1, width)
    assert CheckpointStore(found.path.parent).load(found, net, optimizer).step == found.step
    tensors = [*net.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    assert len(tensors) == 8 and all(bool((tensor == found.step).all()) for tensor in tensors)
    return found.step


def write_until_killed(out: str, delay: float) -> None:
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    write(out, 10**6, width=500)


def write_with_little_room(out: str, num_bytes: int) -> list[str]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return write(out, 3, width=300)
