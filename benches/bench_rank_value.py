"""Rank-value tokenizing: ours beside Geneformer's own steps, and beside the time it takes merely to copy the bytes.

    pytest benches/bench_rank_value.py --benchmark-only --benchmark-json=benches/results/rank_value.json

20,000 cells x 20,000 genes, about 2,000 stored counts a cell (2,500 different gamma-Poisson cells, repeated), float32
counts and int32 columns in memory, V2 limits. The peers run on fewer cells; rates are in cells/s throughout.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from peers import (
    GENEFORMER_CLS,
    GENEFORMER_EOS,
    GENEFORMER_MAX_TOKENS,
    geneformer_rank,
    geneformer_tokenize_to_disk,
)

native = pytest.importorskip("scfm._native", reason="the native module is not built")

NUM_GENES, NUM_CELLS, NUM_DISTINCT, GENES_PER_CELL = 20_000, 20_000, 2_500, 2_000
PEER_CELLS = 2_048
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Cells:
    indptr: Array
    indices: Array
    data: Array
    n_counts: Array
    medians: Array
    tokens: Array

    def head(self, num_cells: int) -> sp.csr_matrix:
        stop = self.indptr[num_cells]
        return sp.csr_matrix(
            (self.data[:stop], self.indices[:stop], self.indptr[: num_cells + 1]),
            shape=(num_cells, NUM_GENES),
        )


def _scale_for(mean: Array, wanted: int) -> float:
    """The depth at which about `wanted` genes of a cell have a count."""
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(1 - np.exp(-mean * middle)) < wanted else (low, middle)
    return low


@cache
def make_cells() -> Cells:
    rng = np.random.default_rng(2024)
    mean = np.exp(rng.normal(0.0, 1.7, NUM_GENES))
    mean *= _scale_for(mean, GENES_PER_CELL)
    depth = rng.gamma(8.0, 1 / 8.0, NUM_DISTINCT)
    rows = []
    for d in depth:
        counts = rng.poisson(
            mean * d * rng.standard_gamma(4.0, NUM_GENES, dtype=np.float32) * np.float32(0.25)
        )
        rows.append(sp.csr_matrix(counts.astype(np.float32)))
    distinct = sp.vstack(rows, format="csr")
    repeats = NUM_CELLS // NUM_DISTINCT
    lengths = np.tile(np.diff(distinct.indptr), repeats)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    data = np.tile(distinct.data, repeats)
    return Cells(
        indptr=indptr,
        indices=np.tile(distinct.indices.astype(np.int32), repeats),
        data=data,
        n_counts=native.row_sums(indptr, data),
        medians=mean * np.exp(rng.normal(0.0, 0.5, NUM_GENES)) + 0.05,
        tokens=np.arange(NUM_GENES, dtype=np.int32) + 4,
    )


def rank(cells: Cells) -> Any:
    return native.rank_value(
        cells.indptr, cells.indices, cells.data, cells.n_counts, np.arange(NUM_GENES, dtype=np.int32), cells.tokens,
        cells.medians, NUM_GENES, "multiply64", True, GENEFORMER_MAX_TOKENS, GENEFORMER_CLS, GENEFORMER_EOS, False,
    )  # fmt: skip


def _copy_seconds(arrays: list[Array]) -> float:
    """Best of five copies into memory that is already there, one thread."""
    targets = [np.ones_like(a) for a in arrays]
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for source, target in zip(arrays, targets, strict=True):
            np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return best


def _report(benchmark: Any, name: str, num_cells: int, **extra: float) -> None:
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["cells_per_second"] = num_cells / seconds
    benchmark.extra_info["cells_per_second_best"] = num_cells / benchmark.stats.stats.min
    benchmark.extra_info.update(extra)
    _RATES[name] = num_cells / seconds
    text = ", ".join(f"{key} {value:.3g}" for key, value in extra.items())
    print(
        f"\n{name}: {num_cells / seconds:,.0f} cells/s (best {num_cells / benchmark.stats.stats.min:,.0f}) {text}"
    )


_RATES: dict[str, float] = {}


@pytest.mark.parametrize("threads", [1, 2])
def bench_scfm(benchmark: Any, threads: int) -> None:
    cells = make_cells()
    native.set_num_threads(threads)
    result = benchmark.pedantic(rank, args=(cells,), rounds=7, warmup_rounds=1)
    start = time.process_time()
    rank(cells)
    cpu = time.process_time() - start
    copy = _copy_seconds([cells.indptr, cells.indices, cells.data, result.token_ids])
    seconds = benchmark.stats.stats.median
    _report(
        benchmark,
        f"scfm, {threads} thread(s), {native.active_isa()}",
        NUM_CELLS,
        cpu_microseconds_per_cell=cpu / NUM_CELLS * 1e6,
        tokens_per_cell=result.token_ids.size / NUM_CELLS,
        share_of_copy_limit=copy / seconds,
        copy_limit_cells_per_second=NUM_CELLS / copy,
    )
    benchmark.extra_info["isa"] = native.active_isa()


def bench_scfm_tokenizer(benchmark: Any) -> None:
    """The whole of scfm.GeneformerTokenizer: AnnData in memory, gene mapping, every check, PackedCells."""
    import anndata as ad
    import pandas as pd

    import scfm
    from scfm.tokenize.dictionaries import GeneformerDictionaries

    cells = make_cells()
    genes = [f"ENSG{i:011d}" for i in range(NUM_GENES)]
    medians = dict(zip(genes, cells.medians.tolist(), strict=True))
    tokenizer = scfm.GeneformerTokenizer(GeneformerDictionaries.from_vocabulary(genes, medians, "V2"))
    adata = ad.AnnData(cells.head(NUM_CELLS), var=pd.DataFrame(index=genes))
    native.set_num_threads(2)
    packed = benchmark.pedantic(tokenizer, args=(adata,), rounds=5, warmup_rounds=1)
    assert packed.num_cells == NUM_CELLS
    _report(benchmark, "GeneformerTokenizer on AnnData, whole call, 2 threads", NUM_CELLS)


def _ratios() -> dict[str, float]:
    return {
        f"scfm_faster_{name.split(',')[1].strip()}": rate
        for name, rate in _RATES.items()
        if name.startswith("scfm")
    }


def bench_geneformer_ranking(benchmark: Any) -> None:
    cells = make_cells()
    block = cells.head(PEER_CELLS)
    arguments = (block, cells.n_counts[:PEER_CELLS], cells.tokens, cells.medians)
    ranked = benchmark.pedantic(geneformer_rank, args=arguments, rounds=3)
    _assert_same_tokens(cells, ranked)
    rate = PEER_CELLS / benchmark.stats.stats.median
    _report(benchmark, "Geneformer's ranking", PEER_CELLS, **{k: v / rate for k, v in _ratios().items()})


def bench_geneformer_to_disk(benchmark: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip(
        "datasets", reason="the peer's data set needs `datasets` (pip install datasets)"
    )
    datasets.disable_progress_bars()
    datasets.disable_caching()
    cells = make_cells()
    block = cells.head(PEER_CELLS)
    arguments = (block, cells.n_counts[:PEER_CELLS], cells.tokens, cells.medians, tmp_path / "peer.dataset")
    benchmark.pedantic(geneformer_tokenize_to_disk, args=arguments, rounds=2)
    rate = PEER_CELLS / benchmark.stats.stats.median
    _report(
        benchmark, "Geneformer, counts to data set", PEER_CELLS, **{k: v / rate for k, v in _ratios().items()}
    )


def _assert_same_tokens(cells: Cells, ranked: list[Array]) -> None:
    """A bench of something else would be worthless. Ties, which numpy orders as it likes, may swap."""
    result = rank(cells)
    for row, theirs in enumerate(ranked[:200]):
        ours = result.token_ids[result.cu_seqlens[row] + 1 : result.cu_seqlens[row + 1] - 1]
        theirs = theirs[: GENEFORMER_MAX_TOKENS - 2]
        assert ours.size == theirs.size
        assert np.mean(ours == theirs) > 0.999
