"""Resident memory while a file of more than 20 GB of counts streams through the tokenizer: it must not grow with it.

    pytest benches/bench_memory_of_streaming.py -s

1.36 million cells (85,000 generated ones, 16 times over; more than 2^31 non-zeros, gzip-4), made for this and deleted
afterwards: it takes 7 GB of disk meanwhile, and 8-byte row pointers. A process of its own opens the file, notes its
resident memory, streams all cells and reports the highest point since; also that of the first tenth, which shows
growth.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from generated_cells import h5ad_files, standard_recipe
from rates import note

HUGE = replace(standard_recipe(), num_cells=min(standard_recipe().num_cells, 85_000), repeats=16)
LIMIT_MB = 1000
ORDERS = ["sequential", "shuffled"]


@pytest.fixture(scope="module")
def huge_file() -> Iterator[Path]:
    path = h5ad_files(HUGE, ["gzip"])["gzip"]
    yield path
    path.unlink()


@pytest.mark.parametrize("order", ORDERS)
def bench_memory(benchmark: Any, huge_file: Path, order: str) -> None:
    command = [sys.executable, __file__, str(huge_file), order]

    def run() -> dict[str, float]:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        return json.loads(done.stdout.splitlines()[-1])

    found = benchmark.pedantic(run, rounds=1)
    print(f"\nmemory of streaming, {order}:")
    note(benchmark, **found)
    # Two or three cells of each repeat are empty, so that repeats fill whole chunks: they have no tokens.
    assert found["num_cells"] >= (HUGE.num_cells - 3) * HUGE.repeats
    assert found["peak_mb_beyond_baseline"] < LIMIT_MB


def stream(path: Path, order: str) -> dict[str, float]:
    """What the child does: everything is imported, opened and planned before the baseline is taken."""
    import scfm
    from bench_tokens_from_disk import tokenizer_for

    tokenizer, source = tokenizer_for(HUGE), scfm.read(path)
    tokenizer(source.select(range(8)))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    baseline = _peak_mb()
    if order == "sequential":
        packs = tokenizer.packs(source)
    else:
        packs = (packed for _, packed in tokenizer.shuffled_packs(source, seed=0))
    cells, tokens, first_tenth = 0, 0, 0.0
    for packed in packs:
        cells += packed.num_cells
        tokens += packed.num_tokens
        if first_tenth == 0 and cells * 10 >= len(source):
            first_tenth = _peak_mb() - baseline
    return {
        "logical_gb": 8 * (tokens - 2 * cells) / 1e9,
        "file_gb": path.stat().st_size / 1e9,
        "num_cells": cells,
        "baseline_mb": baseline,
        "peak_mb_beyond_baseline": _peak_mb() - baseline,
        "peak_mb_beyond_baseline_first_tenth": first_tenth,
    }


def _peak_mb() -> float:
    """The largest resident memory since the last write to clear_refs."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    print(json.dumps(stream(Path(sys.argv[1]), sys.argv[2])))
