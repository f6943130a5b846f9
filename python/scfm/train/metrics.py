"""What a run measures of itself: one JSON line an optimiser step, flushed as it is written, and TensorBoard if asked.

A line's ``step`` counts the optimiser steps done, its own included, so the checkpoint of step 100 was written after the
line of step 100. A run that goes on from a checkpoint cuts the lines of steps that it will take again and says so in a
line of its own: {"event": "resumed", "step": 100, "cut": 7, ...}. The steps of a file are therefore each there once,
in order, however often the run was killed.

No log is worth a training: where the disk is full or the folder gone, the first refusal is a warning, lines wait in
memory (the oldest of more than a megabyte are given up) and are written when there is room again.

    tokens_per_s = tokens / step_s,   cells_per_s = cells / step_s,   mfu = model FLOPs / (step_s * peak of all devices)

step_s is the whole step, the wait for data in it. Formulas of the FLOPs: cost/flops.py.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from scfm.data.atomic_file import whole_file
from scfm.errors import MissingDependencyError, ScfmWarning

__all__ = ["FILE_NAME", "MetricsLog", "StepMetrics", "peak_memory_bytes", "require_tensorboard"]

FILE_NAME = "metrics.jsonl"
_MOST_WAITING = 1 << 20  # bytes of lines kept while they cannot be written


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step, summed over all ranks.

    step: optimiser steps done, this one included; epoch: of its last microbatch. loss: the step's weighted mean;
    terms: the parts it is made of, unweighted. learning_rate: of the step. tokens, cells: real ones, padding there is
    none. data_wait_s: of step_s, how long the loop waited for prepared microbatches. memory_bytes: see
    ``peak_memory_bytes``. mfu: None where the device's peak is unknown. progress: share of the run that is done, up to
    1. seconds: since this process began to train. applied: False for a step whose loss or gradient was not finite.
    extra: whatever else belongs into the line, such as held-out scores.
    """

    step: int
    epoch: int
    loss: float
    terms: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int
    cells: int
    step_s: float
    data_wait_s: float
    memory_bytes: int
    mfu: float | None
    progress: float
    seconds: float
    applied: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The line: terms under their own names behind "loss", rates worked out."""
        took = max(self.step_s, 1e-9)
        return {
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            **{f"loss_{name}": value for name, value in self.terms.items()},
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "cells": self.cells,
            "tokens_per_s": round(self.tokens / took, 1),
            "cells_per_s": round(self.cells / took, 2),
            "data_wait_s": round(self.data_wait_s, 6),
            "step_s": round(self.step_s, 6),
            "memory_bytes": self.memory_bytes,
            "mfu": None if self.mfu is None else round(self.mfu, 5),
            "progress": round(self.progress, 6),
            "seconds": round(self.seconds, 3),
            **({} if self.applied else {"applied": False}),
            **self.extra,
        }


class MetricsLog:
    """The lines of a run, in ``out``/metrics.jsonl; of rank 0, which alone makes one.

    resumed_at: the step of the checkpoint that the run goes on from, None for a new run, which begins the file anew.
    tensorboard: event files beside it, in ``out``/tensorboard. resumed: facts for the line that tells of the resume.
    Raises MissingDependencyError when TensorBoard is asked for and not installed; later nothing is raised.
    """

    def __init__(
        self, out: str | Path, *, tensorboard: bool = False, resumed_at: int | None = None, **resumed: Any
    ) -> None:
        self.path = Path(out) / FILE_NAME
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._warned: set[str] = set()
        self._handle: int | None = None
        cut = self._begin(resumed_at)
        self._board = _board(Path(out) / "tensorboard", resumed_at) if tensorboard else None
        if resumed_at is not None:
            self.event("resumed", resumed_at, cut=cut, **resumed)

    def step(self, metrics: StepMetrics | Mapping[str, Any]) -> dict[str, Any]:
        """Write one step; returns its line as a dict. A plain mapping needs "step"."""
        line = metrics.to_dict() if isinstance(metrics, StepMetrics) else dict(metrics)
        self._put(line)
        self._draw(line)
        return line

    def event(self, name: str, step: int, **facts: Any) -> None:
        """A line that is no step: a resume, a checkpoint that was skipped, the end of the run."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._put({"event": name, "step": step, "time": now, **facts})

    def close(self) -> None:
        """Write what still waits, if it can be. Further lines are written too; the file is opened again for them."""
        self._flush()
        if self._handle is not None:
            handle, self._handle = self._handle, None
            with suppress(OSError):
                os.close(handle)
        if self._board is not None:
            try:
                self._board.close()
            except Exception as error:
                self._give_up_board(error)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- the file -----------------------------------------------------------------------------------------------

    def _begin(self, resumed_at: int | None) -> int:
        """The file without the steps after ``resumed_at``; how many lines were cut."""
        try:
            lines = list(_lines(self.path)) if resumed_at is not None else []
            kept = [line for line, step in lines if step is not None and step <= (resumed_at or 0)]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resumed_at is None or len(kept) < len(lines):
                with whole_file(self.path) as temporary:
                    temporary.write_bytes(b"".join(kept))
        except OSError as error:  # ScfmError's storage error among them
            self._warn("file", f"{self.path} cannot be begun: {error}")
            return 0
        return len(lines) - len(kept)

    def _put(self, line: Mapping[str, Any]) -> None:
        encoded = json.dumps(_finite(line), default=str).encode() + b"\n"
        self._waiting.append(encoded)
        self._waiting_bytes += len(encoded)
        self._flush()
        while self._waiting_bytes > _MOST_WAITING and len(self._waiting) > 1:
            self._waiting_bytes -= len(self._waiting[1])  # the first may be half written
            del self._waiting[1]

    def _flush(self) -> None:
        try:
            if self._waiting and self._handle is None:
                self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            while self._waiting:
                assert self._handle is not None
                written = os.write(self._handle, self._waiting[0])
                self._waiting_bytes -= written
                if written == len(self._waiting[0]):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = self._waiting[0][written:]
        except OSError as error:
            self._warn("file", f"{self.path} cannot be written: {error.strerror or error}")

    def _warn(self, what: str, message: str) -> None:
        """Once for the file and once for TensorBoard, whatever happens how often."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{message}; training goes on", ScfmWarning, stacklevel=4)

    # ---- TensorBoard --------------------------------------------------------------------------------------------

    def _draw(self, line: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        try:
            for name, value in _scalars(line):
                self._board.add_scalar(name, value, line["step"])
        except Exception as error:  # its writer is a thread, which raises whatever it met at a later call
            self._give_up_board(error)

    def _give_up_board(self, error: Exception) -> None:
        self._board = None
        self._warn("tensorboard", f"TensorBoard's files cannot be written: {error}")


def require_tensorboard() -> None:
    """Raise MissingDependencyError unless ``torch.utils.tensorboard`` can write: asked before a run, not during it."""
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingDependencyError(
            "the package tensorboard is not installed",
            where="tensorboard",
            hint="Install it (pip install tensorboard) or leave tensorboard = true out; metrics.jsonl has the same "
            "numbers.",
        )


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: of the GPU's memory in tensors, on a CPU of the machine's (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _board(folder: Path, resumed_at: int | None) -> Any:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter
    return writer(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)


def _lines(path: Path) -> Iterator[tuple[bytes, int | None]]:
    """Each line of the file with its step; None for one that is no whole line of ours, as a kill may leave the last."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            try:
                found = json.loads(line)
                step = found["step"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                step = None
            yield line, step if type(step) is int else None


def _scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}{name}", float(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: "NaN", "Infinity" and "-Infinity" as text, which float() reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
