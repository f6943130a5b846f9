"""What this machine could do at best: copying memory, reading files that are in the page cache, inflating chunks.

A reader of uncompressed counts cannot be faster than positioned reads of the same bytes by as many threads; a reader of
gzip cannot be faster than inflating the file's own chunks on every core.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deflate
import h5py
import numpy as np

NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_PIECE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Cells/s that reading (uncompressed) or inflating (gzip) alone would allow on all cores, and their parts."""

    memcpy_gb_per_s: float
    page_cache_gb_per_s: float
    plain_cells_per_second: float
    libdeflate_cells_per_second_per_core: float
    zlib_cells_per_second_per_core: float

    def of(self, kind: str) -> float:
        if kind == "plain":
            return self.plain_cells_per_second
        return NUM_CORES * self.libdeflate_cells_per_second_per_core


def measure_limits(plain: Path, gzip: Path) -> Limits:
    with h5py.File(plain, "r") as file:
        num_cells, num_values = file["X"].attrs["shape"][0], file["X/data"].shape[0]
    values_per_cell = num_values / num_cells
    page_cache = _page_cache_bytes_per_second(plain)
    return Limits(
        memcpy_gb_per_s=_memcpy_bytes_per_second() / 1e9,
        page_cache_gb_per_s=page_cache / 1e9,
        plain_cells_per_second=page_cache / (8 * values_per_cell),
        libdeflate_cells_per_second_per_core=_inflate_cells_per_second(
            gzip, deflate.zlib_decompress, values_per_cell
        ),
        zlib_cells_per_second_per_core=_inflate_cells_per_second(gzip, _zlib, values_per_cell),
    )


def _memcpy_bytes_per_second() -> float:
    source, target = np.ones(1 << 28, dtype=np.uint8), np.ones(1 << 28, dtype=np.uint8)
    return source.nbytes / min(_seconds(lambda: np.copyto(target, source)) for _ in range(5))


def _page_cache_bytes_per_second(path: Path) -> float:
    """Positioned reads of 1 MiB into memory that is there already, as many threads as cores."""
    size = min(path.stat().st_size, 1 << 30)
    file = os.open(path, os.O_RDONLY)
    try:
        pieces = range(0, size - _PIECE + 1, _PIECE)

        def read(thread: int) -> None:
            buffer = [bytearray(_PIECE)]
            for offset in pieces[thread::NUM_CORES]:
                os.preadv(file, buffer, offset)

        with ThreadPoolExecutor(NUM_CORES) as pool:
            return (
                len(pieces)
                * _PIECE
                / min(_seconds(lambda: list(pool.map(read, range(NUM_CORES)))) for _ in range(4))
            )
    finally:
        os.close(file)


def _zlib(stored: bytes, size: int) -> Any:
    return zlib.decompress(stored, bufsize=size)


def _inflate_cells_per_second(
    path: Path, inflate: Callable[[bytes, int], Any], values_per_cell: float
) -> float:
    """Cells/s of one core that does nothing but inflate data and indices; the file's first 100 chunks of each."""
    seconds_per_value = 0.0
    with h5py.File(path, "r") as file:
        for name in ("X/data", "X/indices"):
            dataset = file[name]
            length, size = dataset.chunks[0], dataset.chunks[0] * dataset.dtype.itemsize
            count = min(dataset.id.get_num_chunks(), 100)
            stored = [dataset.id.read_direct_chunk((i * length,))[1] for i in range(count)]

            def run(stored: list[bytes] = stored, size: int = size) -> None:
                for chunk in stored:
                    inflate(chunk, size)

            seconds_per_value += min(_seconds(run) for _ in range(3)) / (count * length)
    return 1 / (seconds_per_value * values_per_cell)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
