"""Cells a second of something that yields cells batch by batch: runs, their median and best, ratios between rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

# Rows of this session by (file, name), for ratios.
MEDIANS: dict[tuple[str, str], float] = {}


def measure(
    benchmark: Any,
    file: str,
    name: str,
    batches: Callable[[], Iterator[int]],
    *,
    rounds: int = 3,
    most_seconds: float | None = None,
    **extra: Any,
) -> float:
    """Time ``batches()``, an iterator over the number of cells in each batch, and report the median rate.

    most_seconds: a run ends with the batch that passes this time; slow peers are timed on a part of the cells.
    """
    runs: list[tuple[int, float, float]] = []

    def run() -> None:
        cells, start, cpu = 0, time.perf_counter(), time.process_time()
        for count in batches():
            cells += count
            if most_seconds is not None and time.perf_counter() - start > most_seconds:
                break
        runs.append((cells, time.perf_counter() - start, time.process_time() - cpu))

    benchmark.pedantic(run, rounds=rounds, iterations=1)
    rates = [cells / seconds for cells, seconds, _ in runs]
    median, best = statistics.median(rates), max(rates)
    MEDIANS[file, name] = median
    benchmark.extra_info |= {
        "cells_per_second": round(median),
        "cells_per_second_best": round(best),
        "cells_timed": min(cells for cells, _, _ in runs),
        # Of this process, all its threads: what a busy machine distorts least.
        "cpu_microseconds_per_cell": round(min(cpu / cells for cells, _, cpu in runs) * 1e6, 2),
        **extra,
    }
    print(f"\n{file}, {name}: {median:,.0f} cells/s (best {best:,.0f}; {runs[0][0]:,} cells a run)")
    extra = {"cpu_microseconds_per_cell": benchmark.extra_info["cpu_microseconds_per_cell"], **extra}
    for key, value in extra.items():
        print(f"  {key}: {value:,.3g}" if isinstance(value, float) else f"  {key}: {value}")
    return median


def note(benchmark: Any, **facts: float) -> None:
    """More facts of the row, printed and kept in the JSON."""
    for key, value in facts.items():
        benchmark.extra_info[key] = round(value, 4)
        print(f"  {key}: {value:,.4g}")
