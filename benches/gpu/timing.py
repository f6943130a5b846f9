"""Milliseconds of a call on the GPU, and the peaks that they are held against.

Each call is timed by itself with CUDA events, after warm-up, over a cold L2 cache (a buffer of twice its size is
written in between). The GPU is kept waiting before each call until the CPU has queued it, so that what is timed are
kernels and not the Python that launches them; what that costs is a row of its own. Median and minimum are kept. On
the CPU, for the dry run, by the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_WARM_UPS = 3
_FEWEST, _MOST = 10, 100
_BUDGET_MS = 400.0  # of the timed calls of a row
_HEAD_START = 4_000_000  # cycles, about 2 ms: to queue a forward and a backward
Call = Callable[[], object]


@dataclass(frozen=True)
class Time:
    """Milliseconds a call."""

    median: float
    minimum: float

    def __sub__(self, other: Time) -> Time:
        return Time(self.median - other.median, self.minimum - other.minimum)


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            self._other = torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)

    def time(self, call: Call) -> Time:
        return self._on_gpu(call) if self.device == "cuda" else _on_cpu(call)

    def sustained(self, call: Call) -> float:
        """Milliseconds a call when called again and again, launches and all, by the clock: for whole models."""
        if self.device == "cpu":
            return _on_cpu(call).median
        for _ in range(_WARM_UPS):
            call()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        rounds = min(max(int(2 / (time.perf_counter() - start)), _FEWEST), _MOST)
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        self.wait()
        return (time.perf_counter() - start) / rounds * 1e3

    def microseconds_to_queue(self, call: Call) -> float:
        """What a call costs the CPU, the GPU's work not waited for: the least of some runs of ten calls."""
        rounds, calls = (30, 10) if self.device == "cuda" else (1, 1)
        call()
        best = float("inf")
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            best = min(best, time.perf_counter() - start)
        self.wait()
        return best / calls * 1e6

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _on_gpu(self, call: Call) -> Time:
        for _ in range(_WARM_UPS):
            call()
        torch.cuda.synchronize()
        estimate = max(self._each(call, 3))
        rounds = min(max(int(_BUDGET_MS / max(estimate, 1e-3)), _FEWEST), _MOST)
        found = self._each(call, rounds)
        return Time(statistics.median(found), min(found))

    def _each(self, call: Call, rounds: int) -> list[float]:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
        for before, after in pairs:
            self._other.zero_()
            torch.cuda._sleep(_HEAD_START)
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


def _on_cpu(call: Call) -> Time:
    """One call: the dry run's figures mean nothing."""
    start = time.perf_counter()
    call()
    found = (time.perf_counter() - start) * 1e3
    return Time(found, found)


@dataclass(frozen=True)
class Peaks:
    """Measured in this very run: the best large bfloat16 product, and the best copy (bytes read plus written)."""

    tflop_per_s: float
    gb_per_s: float


def measure_peaks(clock: Clock) -> Peaks:
    sizes = (4096, 8192) if clock.device == "cuda" else (256,)
    rates = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
        rates.append(2 * size**3 / clock.time(lambda a=a, b=b: a @ b).minimum / 1e9)
    source = torch.empty(1 << (30 if clock.device == "cuda" else 22), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / clock.time(lambda: target.copy_(source)).minimum / 1e6
    return Peaks(max(rates), copied)
