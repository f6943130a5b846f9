"""Checked CSR blocks from .h5ad files, beside anndata, h5py, AnnLoader and scDataset, and beside the machine's limits.

    pytest benches/bench_read.py --benchmark-only -s

100,000 generated cells x 20,000 genes at 1,946 non-zeros (``generated_cells``), the same counts as gzip-4 and
uncompressed, from the page cache. Opening is left out on both sides. Slow peers are timed on as many cells as
they manage in a few seconds. scDataset's rows are also given with two worker processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

import scfm
from generated_cells import h5ad_files, standard_recipe
from peers import ann_loader, anndata_random, anndata_slices, h5py_slices, sc_dataset
from rates import MEDIANS, measure, note
from reading_limits import Limits, measure_limits

FILES = ["gzip", "plain"]
ORDERS = ["sequential", "shuffled"]
BLOCK_CELLS, SHUFFLE_BLOCK = 4096, 64
PEER_SECONDS = 6.0
# The aims of ours in cells/s; what is below is said, not failed: machines differ.
AIMS = {
    ("gzip", "sequential"): 95_000,
    ("gzip", "shuffled"): 85_000,
    ("plain", "sequential"): 600_000,
    ("plain", "shuffled"): 600_000,
}


@cache
def path_of(file: str) -> Path:
    """Made if need be, and read through once, so that it is in the page cache."""
    found = h5ad_files(standard_recipe(), [None, "gzip"])
    path = found[None if file == "plain" else file]
    with path.open("rb") as stream:
        while stream.read(1 << 24):
            pass
    return path


@cache
def limits() -> Limits:
    return measure_limits(path_of("plain"), path_of("gzip"))


def bench_limits(benchmark: Any) -> None:
    found = benchmark.pedantic(limits, rounds=1)
    note(benchmark, **vars(found))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("file", FILES)
def bench_scfm(benchmark: Any, file: str, order: str) -> None:
    start = time.perf_counter()
    source = scfm.read(path_of(file))
    opening = time.perf_counter() - start
    _assert_same_cells(source, order)
    rate = measure(
        benchmark,
        file,
        f"scfm {order}",
        lambda: (block.num_cells for _, block in blocks(source, order)),
        reader=source.reader,
        seconds_to_open=round(opening, 3),
    )
    note(benchmark, share_of_limit=rate / limits().of(file), share_of_aim=rate / AIMS[file, order])


def blocks(source: Any, order: str, seed: int = 0) -> Iterator[tuple[np.ndarray, Any]]:
    """(rows of the file, checked block) in file order or block-shuffled."""
    if order == "sequential":
        for block in source.blocks(BLOCK_CELLS):
            yield block.rows, block
    else:
        for window in source.shuffled(seed=seed, block_size=SHUFFLE_BLOCK, window=BLOCK_CELLS):
            yield window.cells, window.pieces[0].block


def _backed(path: Path) -> Any:
    import anndata as ad

    return ad.read_h5ad(path, backed="r")


# Each peer by name: the order that ours is compared in, and how it opens a file and reads it.
PEERS: dict[str, tuple[str, Callable[[Path], Any], Callable[[Any], Iterator[sp.csr_matrix]]]] = {
    "h5py slices of 4096": ("sequential", lambda path: h5py.File(path, "r")["X"], h5py_slices),
    "anndata backed, slices of 4096": ("sequential", _backed, anndata_slices),
    "scDataset streaming": ("sequential", _backed, lambda data: sc_dataset(data, block_size=None)),
    "anndata backed, random 256": ("shuffled", _backed, anndata_random),
    "AnnLoader": ("shuffled", _backed, ann_loader),
    "scDataset block 64": ("shuffled", _backed, lambda data: sc_dataset(data, block_size=SHUFFLE_BLOCK)),
    "scDataset block 64, 2 workers": (
        "shuffled",
        _backed,
        lambda data: sc_dataset(data, block_size=SHUFFLE_BLOCK, num_workers=2),
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("file", FILES)
def bench_peer(benchmark: Any, file: str, name: str) -> None:
    if name.startswith("scDataset"):
        pytest.importorskip("scdataset", reason="the peer is scDataset (pip install scDataset)")
    order, opened, read = PEERS[name]
    data = opened(path_of(file))
    rate = measure(
        benchmark,
        file,
        name,
        lambda: (batch.shape[0] for batch in read(data)),
        most_seconds=PEER_SECONDS,
    )
    ours = MEDIANS.get((file, f"scfm {order}"))
    if ours is not None:
        note(benchmark, scfm_times_as_fast=ours / rate)


@pytest.mark.parametrize("file", FILES)
def bench_validation(benchmark: Any, file: str) -> None:
    """The share of the time that checking every value takes: the native stream with and without, taking turns."""
    source = scfm.read(path_of(file))
    matrix = getattr(source._matrix, "_native", None)
    if matrix is None:
        pytest.skip(f"validation cannot be switched off in {source.reader}")
    requests = [
        np.arange(start, min(start + BLOCK_CELLS, matrix.num_cells))
        for start in range(0, matrix.num_cells, BLOCK_CELLS)
    ]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}

    def both() -> None:
        # Each goes first every other time.
        for validate in sorted(seconds, reverse=len(seconds[True]) % 2 == 1):
            start, used = time.perf_counter(), time.process_time()
            for _ in matrix.stream(requests, validate=validate):
                pass
            seconds[validate].append(time.perf_counter() - start)
            cpu[validate].append(time.process_time() - used)

    benchmark.pedantic(both, rounds=8, warmup_rounds=1)
    note(
        benchmark,
        share_of_time=1 - float(np.median(seconds[False]) / np.median(seconds[True])),
        share_of_time_best=1 - min(seconds[False]) / min(seconds[True]),
        share_of_cpu=1 - min(cpu[False]) / min(cpu[True]),
        cells_per_second_unchecked=matrix.num_cells / min(seconds[False]),
    )


@cache
def _fingerprints() -> np.ndarray:
    """One number a cell that depends on all its columns and values, by way of h5py and scipy."""
    with h5py.File(path_of("plain"), "r") as file:
        weights = _weights(int(file["X"].attrs["shape"][1]))
        return np.concatenate([rows @ weights for rows in h5py_slices(file["X"])])


def _weights(num_genes: int) -> np.ndarray:
    return np.random.default_rng(1).random(num_genes)


def _assert_same_cells(source: Any, order: str) -> None:
    """A bench of something else would be worthless: every cell once, with exactly its counts."""
    weights, found = _weights(source.num_genes), np.full(len(source), np.nan)
    for cells, block in blocks(source, order):
        shape = (block.num_cells, block.num_genes)
        assert np.isnan(found[cells]).all()
        found[cells] = sp.csr_matrix((block.data, block.indices, block.indptr), shape=shape) @ weights
    np.testing.assert_array_equal(found, _fingerprints())
