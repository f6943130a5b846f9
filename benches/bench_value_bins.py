"""scGPT's value binning: ours beside the original's data set and collator, and beside merely copying the bytes.

    pytest benches/bench_value_bins.py --benchmark-only --benchmark-json=benches/results/value_bins.json

20,000 cells x 20,000 genes, about 2,000 stored counts a cell (the cells of bench_rank_value), float32 and int32 in
memory, 51 bins, cut to 1,200 tokens with <cls>. Three kinds of values: counts, the same normalised and logged (as many
ties, no whole numbers), and values without ties. The peer runs in one process with one thread on fewer cells, once with
making the matrix dense and once given dense rows; rates are in cells/s throughout.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from bench_rank_value import NUM_CELLS, NUM_GENES, make_cells
from machine import best_seconds
from peers import SCGPT_MAX_TOKENS, SCGPT_NUM_BINS, scgpt_batches, scgpt_bins

native = pytest.importorskip("scfm._native", reason="the native module is not built")

PAD_ID, CLS_ID = NUM_GENES, NUM_GENES + 1
PEER_CELLS = 1_024
Array = np.ndarray[Any, np.dtype[Any]]

_RATES: dict[str, float] = {}


@cache
def values_of(kind: str) -> Array:
    cells = make_cells()
    if kind == "counts":
        return cells.data
    if kind == "logged":
        scale = np.repeat((10_000 / cells.n_counts).astype(np.float32), np.diff(cells.indptr))
        return np.log1p(cells.data * scale)
    return cells.data * np.random.default_rng(1).uniform(0.9, 1.1, cells.data.size).astype(np.float32)


def bin_cells(kind: str, **changed: Any) -> Any:
    cells = make_cells()
    genes = np.arange(NUM_GENES, dtype=np.int32)
    arguments = {
        "quantiles": np.linspace(0, 1, SCGPT_NUM_BINS - 1),
        "rule": "seeded",
        "draws": None,
        "draw_offsets": None,
        "kept": "any",
        "max_tokens": SCGPT_MAX_TOKENS,
        "prefix_token": CLS_ID,
        "prefix_value": -2.0,
        "with_zeros": False,
        "seed": 0,
        "epoch": 0,
    }
    return native.value_bins(
        cells.indptr, cells.indices, values_of(kind), genes, genes, **(arguments | changed)
    )


def _report(benchmark: Any, name: str, num_cells: int, **extra: float) -> None:
    rate, best = num_cells / benchmark.stats.stats.median, num_cells / benchmark.stats.stats.min
    _RATES[name] = rate
    benchmark.extra_info |= {"cells_per_second": rate, "cells_per_second_best": best, **extra}
    text = ", ".join(f"{key} {value:.3g}" for key, value in extra.items())
    print(f"\n{name}: {rate:,.0f} cells/s (best {best:,.0f}) {text}")


@pytest.mark.parametrize("kind", ["counts", "logged", "distinct"])
@pytest.mark.parametrize("isa", native.available_isas()[:3])
def bench_scfm_one_core(benchmark: Any, isa: str, kind: str) -> None:
    before = native.active_isa(), native.get_num_threads()
    values_of(kind)
    native.set_isa(isa)
    native.set_num_threads(1)
    result = benchmark.pedantic(bin_cells, args=(kind,), rounds=3, warmup_rounds=1)
    native.set_isa(before[0])
    native.set_num_threads(before[1])
    cells = make_cells()
    arrays = [cells.indptr, cells.indices, cells.data, result.token_ids, result.values]
    targets = [np.ones_like(array) for array in arrays]
    copy = best_seconds(lambda: [np.copyto(t, a) for t, a in zip(targets, arrays, strict=True)], rounds=3)
    share = copy / benchmark.stats.stats.median
    _report(benchmark, f"scfm, {kind}, 1 thread, {isa}", NUM_CELLS, share_of_copy_limit=share)


@pytest.mark.parametrize("changed", [{"kept": "largest"}, {"max_tokens": -1}, {"rule": "left"}], ids=str)
def bench_scfm_options(benchmark: Any, changed: dict[str, Any]) -> None:
    native.set_num_threads(1)
    benchmark.pedantic(bin_cells, args=("counts",), kwargs=changed, rounds=3, warmup_rounds=1)
    _report(benchmark, f"scfm, counts, 1 thread, {changed}", NUM_CELLS)


@pytest.mark.parametrize("whole", [False, True], ids=["packs", "one pack"])
@pytest.mark.parametrize("threads", [1, 2])
def bench_scfm_tokenizer(benchmark: Any, threads: int, whole: bool) -> None:
    """scfm.ScgptTokenizer on an AnnData in memory: gene mapping, every check, then packs as embedding takes them, or
    all in one PackedCells."""
    import anndata as ad
    import pandas as pd

    import scfm
    from scfm.tokenize.scgpt_vocab import ScgptVocab

    genes = [f"G{i}" for i in range(NUM_GENES)]
    tokenizer = scfm.ScgptTokenizer(ScgptVocab.from_dict({gene: i for i, gene in enumerate(genes)}))
    adata = ad.AnnData(make_cells().head(NUM_CELLS), var=pd.DataFrame(index=genes))
    native.set_num_threads(threads)

    def run() -> int:
        if whole:
            return int(tokenizer(adata).num_cells)
        return sum(pack.num_cells for pack in tokenizer.packs(tokenizer.read(adata)))

    assert benchmark.pedantic(run, rounds=3, warmup_rounds=1) == NUM_CELLS
    form = "one pack" if whole else "packs"
    _report(benchmark, f"ScgptTokenizer on AnnData, {form}, {threads} thread(s)", NUM_CELLS)


@pytest.mark.parametrize("dense_before", [True, False])
def bench_original(benchmark: Any, dense_before: bool) -> None:
    """Dense rows, data set and collator; the matrix is made dense beforehand, or by the run."""
    block = make_cells().head(PEER_CELLS)
    _assert_same_bins(block)
    matrix = block.toarray() if dense_before else block
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run() -> int:
        return sum(len(genes) for genes, _ in scgpt_batches(matrix, np.arange(NUM_GENES), CLS_ID, PAD_ID))

    assert benchmark.pedantic(run, rounds=3) == PEER_CELLS
    torch.set_num_threads(threads)
    rate = PEER_CELLS / benchmark.stats.stats.median
    compared = [name for name in _RATES if name.startswith(("scfm, counts, 1", "ScgptTokenizer"))]
    ratios = {f"{name} is faster by": _RATES[name] / rate for name in compared}
    start = "dense rows" if dense_before else "from CSR"
    _report(benchmark, f"the original, {start}, one process", PEER_CELLS, **ratios)


def _assert_same_bins(block: Any) -> None:
    """A bench of something else would be worthless: values without ties, so that nothing is drawn."""
    cells, values = make_cells(), values_of("distinct")
    result = bin_cells("distinct", max_tokens=-1, prefix_token=-1)
    for row in range(20):
        span = slice(cells.indptr[row], cells.indptr[row + 1])
        mine = result.values[result.cu_seqlens[row] : result.cu_seqlens[row + 1]]
        assert (mine == scgpt_bins(values[span])).mean() > 0.99
