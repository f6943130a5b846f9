"""What a bench measures of the machine: its best matrix product, and the memory that a call takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_SIZE = 2048


@cache
def peak_gflop_per_second(dtype: torch.dtype, num_threads: int) -> float:
    """The best large product of torch in this dtype: what "share of peak" refers to."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(_SIZE, _SIZE).to(dtype), torch.randn(_SIZE, _SIZE).to(dtype)
    seconds = best_seconds(lambda: a @ b, rounds=12)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    return 2 * _SIZE**3 / seconds / 1e9


def best_seconds(call: Callable[[], object], *, rounds: int) -> float:
    """The shortest of some runs, after one that is not counted."""
    call()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def extra_peak_mib(call: Callable[[], object]) -> float:
    """How far one call raises the process's resident memory."""
    before = restart_peak()
    call()
    return peak_mib() - before


def peak_mib() -> float:
    """The process's largest resident memory since the last call of restart_peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def restart_peak() -> float:
    """Resident memory now, from which the peak is counted again."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_mib()
