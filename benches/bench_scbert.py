"""scBERT on CPU beside the original's modules: cells/s at 16,907 tokens, and tokens from counts, in one process.

    pytest benches/bench_scbert.py --benchmark-only -s

The peer is the original's model rebuilt from torch.nn, a cell at a time as its predict.py runs it: in float32, and
under torch's bfloat16 autocast, which it does not use. The same random weights and the same cells on both sides, of
1,000 expressed genes; the goal is 4 times its float32 rate in float32 and 8 times in bfloat16. Results print cells/s,
GFLOP/s, the share of the machine's measured peak, ratios, the largest difference, the smallest cosine and the memory
beyond the weights.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import scfm
from machine import best_seconds, extra_peak_mib, peak_gflop_per_second
from rates import MEDIANS, measure, note
from scbert_peers import ScbertOriginal, scbert_bins
from scfm import _native
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from shapes import SCBERT

NUM_CELLS, EXPRESSED = 2, 1000
TOKENIZED_CELLS, PEER_CELLS = 20_000, 256
RESULTS: dict[str, tuple[torch.Tensor, float]] = {}


def gflop_per_cell() -> float:
    """Multiply-adds counted as two, all layers in full."""
    size, inner, ffn = SCBERT.hidden_size, SCBERT.num_heads * SCBERT.head_dim, SCBERT.ffn_size
    token = 4 * size * inner + 2 * size * ffn + 4 * inner * SCBERT.num_features
    return 2 * token * SCBERT.num_tokens * SCBERT.num_layers / 1e9


@pytest.fixture(scope="module")
def model() -> Scbert:
    return Scbert.from_config(ScbertConfig(num_genes=SCBERT.num_tokens - 1), seed=0)


@pytest.fixture(scope="module")
def bins() -> np.ndarray:
    rng = np.random.default_rng(0)
    dense = np.zeros((NUM_CELLS, SCBERT.num_tokens), dtype=np.int64)
    for cell in dense:
        cell[rng.choice(SCBERT.num_tokens - 1, EXPRESSED, replace=False)] = rng.integers(1, 6, EXPRESSED)
    return dense


def packed(bins: np.ndarray) -> scfm.PackedCells:
    places = [np.flatnonzero(cell).astype(np.int32) for cell in bins]
    return scfm.PackedCells.from_lists(
        places, [cell[where].astype(np.float32) for cell, where in zip(bins, places, strict=True)]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def bench_ours(benchmark, model, bins, dtype: str) -> None:
    model.set_compute_dtype(dtype)
    cells = packed(bins)
    encodings = model.forward(cells).hidden
    one = cells.select([0])
    memory = extra_peak_mib(lambda: model.embed_batch(one, layer=0, pooling="gene_mean"))
    benchmark.pedantic(lambda: model.embed_batch(cells, layer=0, pooling="gene_mean"), rounds=4, iterations=1)
    RESULTS[dtype] = (encodings, benchmark.stats.stats.min / NUM_CELLS)
    _report(benchmark, f"scfm {dtype}", dtype, memory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def bench_original(benchmark, model, bins, dtype: str) -> None:
    peer, dense = ScbertOriginal(model), torch.from_numpy(bins)

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return [peer(cell[None])[0] for cell in dense]

    benchmark.pedantic(run, rounds=2, iterations=1, warmup_rounds=1)
    seconds = benchmark.stats.stats.min / NUM_CELLS
    memory = extra_peak_mib(lambda: peer(dense[:1]))
    RESULTS[f"original {dtype}"] = (torch.cat(run()).float(), seconds)
    _report(benchmark, f"original's modules, {dtype}", dtype, memory)
    theirs, _ = RESULTS["original float32"]
    for ours in ("float32", "bfloat16"):
        if ours not in RESULTS:
            continue
        encodings, our_seconds = RESULTS[ours]
        cosine = torch.nn.functional.cosine_similarity(encodings, theirs, dim=1).min()
        note(
            benchmark,
            **{
                f"ratio_of_scfm_{ours}": seconds / our_seconds,
                f"max_abs_difference_{ours}_to_float32": float((encodings - theirs).abs().max()),
                f"min_cosine_{ours}_to_float32": float(cosine),
            },
        )


@torch.inference_mode()
def bench_attention_of_performer_pytorch(benchmark, model) -> None:
    """FastAttention of the package that scBERT's code descends from, beside the operator; its own maximum of keys."""
    package = pytest.importorskip("performer_pytorch", reason="performer-pytorch is not installed")
    shape = (SCBERT.num_tokens, SCBERT.num_heads, SCBERT.head_dim)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    theirs = package.FastAttention(dim_heads=SCBERT.head_dim, nb_features=SCBERT.num_features)
    offsets = torch.tensor([0, SCBERT.num_tokens], dtype=torch.int32)
    dense = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    ours = lambda: scfm.ops.favor_attention(q, k, v, theirs.projection_matrix, offsets)  # noqa: E731
    benchmark.pedantic(ours, rounds=4, iterations=1, warmup_rounds=1)
    note(benchmark, ratio=best_seconds(lambda: theirs(*dense), rounds=2) / benchmark.stats.stats.min)


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    """Cells of about 1,000 stored counts among 16,906 genes, in the panel's order."""
    rng = np.random.default_rng(1)
    share = rng.gamma(0.15, 1.0, SCBERT.num_tokens - 1)
    share /= share.sum()
    distinct = [sp.csr_matrix(rng.multinomial(3000, share).astype(np.float32)) for _ in range(500)]
    return sp.vstack(distinct * (TOKENIZED_CELLS // 500), format="csr")


def bench_tokens(benchmark, counts) -> None:
    order = np.random.default_rng(2).permutation(counts.shape[1]).astype(np.int32)
    arrays = (counts.indptr.astype(np.int64), counts.indices, counts.data, order, counts.shape[1], False)
    _native.set_num_threads(2)
    rate = measure(
        benchmark,
        "tokens",
        "scfm, 2 threads",
        lambda: iter([len(_native.log_bins(*arrays).num_panel_genes)]),
        rounds=5,
        stored_counts_per_cell=counts.nnz / counts.shape[0],
    )
    assert rate > 0


def bench_tokens_of_the_original(benchmark, counts) -> None:
    few = counts[:PEER_CELLS]
    theirs = measure(benchmark, "tokens", "original's steps", lambda: iter([len(scbert_bins(few))]))
    note(benchmark, ratio_of_scfm=MEDIANS["tokens", "scfm, 2 threads"] / theirs)


def _report(benchmark, name: str, dtype: str, mib: float) -> None:
    seconds = benchmark.stats.stats.min / NUM_CELLS
    peak = peak_gflop_per_second(getattr(torch, dtype), torch.get_num_threads())
    rate = gflop_per_cell() / seconds
    benchmark.extra_info |= {
        "seconds_per_cell": round(seconds, 3),
        "gflop_per_s": round(rate, 1),
        "share_of_peak": round(rate / peak, 3),
        "peak_gflop_per_s": round(peak, 1),
        "extra_peak_memory_mib": round(mib),
        "tokens": SCBERT.num_tokens,
        "torch_threads": torch.get_num_threads(),
    }
    print(
        f"\n  {name}: {seconds:.3f} s a cell of {SCBERT.num_tokens:,} tokens, {rate:.0f} GFLOP/s "
        f"({rate / peak:.0%} of the measured {peak:.0f}), +{mib:.0f} MiB"
    )
