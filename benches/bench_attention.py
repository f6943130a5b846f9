"""Attention of packed cells beside torch's, one process, one core and all of them.

The peer is scaled_dot_product_attention on the same tokens: cells of one length as a dense batch, which spares it all
padding, cells of mixed lengths padded to the longest in batches of 8 with a mask, as the originals do. Sparse masks
(the graph's, scGPT's) are given to it as dense boolean masks, its only way. Rates count what the mask lets through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from attention_peers import sdpa_padded
from machine import best_seconds, peak_gflop_per_second
from scfm import ops
from shapes import cell_lengths

HEADS, HEAD_DIM = 12, 64
TOKENS = 8192  # of a run: enough for every length
THREADS = torch.get_num_threads()
ROUNDS = 7


@pytest.fixture(autouse=True)
def _restore_threads():
    yield
    torch.set_num_threads(THREADS)


def packed(
    lengths: Sequence[int], dtype: torch.dtype, heads: int = HEADS
) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(int(sum(lengths)), 3, heads, HEAD_DIM, generator=generator).to(dtype)
    return list(qkv.unbind(1)), torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def report(
    benchmark,
    name: str,
    ours: Callable,
    theirs: Callable,
    gflop: float,
    dtype: torch.dtype,
    rounds: int = ROUNDS,
) -> None:
    benchmark.pedantic(ours, rounds=rounds, iterations=1, warmup_rounds=1)
    seconds, peer = benchmark.stats.stats.min, best_seconds(theirs, rounds=max(rounds // 2, 2))
    peak = peak_gflop_per_second(dtype, torch.get_num_threads())
    benchmark.extra_info |= {
        "milliseconds": round(seconds * 1e3, 3),
        "gflop_per_s": round(gflop / seconds, 1),
        "share_of_peak": round(gflop / seconds / peak, 3),
        "peak_gflop_per_s": round(peak, 1),
        "torch_milliseconds": round(peer * 1e3, 3),
        "torch_gflop_per_s": round(gflop / peer, 1),
        "ratio": round(peer / seconds, 2),
        "threads": torch.get_num_threads(),
    }
    print(
        f"\n  {name}: {seconds * 1e3:.2f} ms, {gflop / seconds:.0f} GFLOP/s ({gflop / seconds / peak:.0%} of the "
        f"measured {peak:.0f}); torch {peer * 1e3:.2f} ms; {peer / seconds:.2f}x"
    )


def attention_gflop(pairs: float, heads: int = HEADS) -> float:
    """Two products of 2 x head_dim operations for every (query, key) pair of every head."""
    return 4 * pairs * HEAD_DIM * heads / 1e9


def with_gradients(function: Callable, inputs: Sequence[torch.Tensor]) -> Callable:
    """A call of forward and backward, with the output itself as upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def call() -> None:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, out.detach())

    return call


@pytest.mark.parametrize("length", [100, 512, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_varlen_one_core(benchmark, dtype: torch.dtype, length: int) -> None:
    torch.set_num_threads(1)
    count = TOKENS // length
    (q, k, v), cu_seqlens = packed([length] * count, dtype)
    dense = [x.reshape(count, length, HEADS, HEAD_DIM) for x in (q, k, v)]
    report(
        benchmark,
        f"varlen {dtype}, {length} tokens, 1 core",
        lambda: ops.varlen_attention(q, k, v, cu_seqlens),
        lambda: sdpa_padded(*dense),
        attention_gflop(count * length**2),
        dtype,
    )


@pytest.mark.parametrize("length", [100, 512, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_varlen_with_gradients_one_core(benchmark, dtype: torch.dtype, length: int) -> None:
    torch.set_num_threads(1)
    count = TOKENS // length
    (q, k, v), cu_seqlens = packed([length] * count, dtype)
    dense = [x.reshape(count, length, HEADS, HEAD_DIM) for x in (q, k, v)]
    report(
        benchmark,
        f"varlen {dtype} forward and backward, {length} tokens, 1 core",
        with_gradients(lambda *x: ops.varlen_attention(*x, cu_seqlens), (q, k, v)),
        with_gradients(sdpa_padded, dense),
        3.5 * attention_gflop(count * length**2),
        dtype,
        rounds=4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_varlen_mixed_lengths(benchmark, dtype: torch.dtype) -> None:
    lengths = np.sort(cell_lengths(16))
    (q, k, v), cu_seqlens = packed(lengths, dtype)
    batches = []
    for group in (slice(0, 8), slice(8, 16)):
        own, longest = lengths[group], int(lengths[group].max())
        padded = torch.randn(8, longest, HEADS, HEAD_DIM).to(dtype)
        real = torch.arange(longest)[None] < torch.from_numpy(own)[:, None]
        batches.append((padded, real[:, None, None, :]))
    report(
        benchmark,
        f"varlen {dtype}, {lengths.min()} to {lengths.max()} tokens, {THREADS} cores",
        lambda: ops.varlen_attention(q, k, v, cu_seqlens),
        lambda: [sdpa_padded(x, x, x, mask) for x, mask in batches],
        attention_gflop(float((lengths.astype(float) ** 2).sum())),
        dtype,
        rounds=3,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_generative(benchmark, dtype: torch.dtype) -> None:
    """scGPT's shape: 8 heads of 64, 1,200 tokens, half of them known."""
    lengths, heads = [1200] * 4, 8
    (q, k, v), cu_seqlens = packed(lengths, dtype, heads)
    known = torch.full((4,), 600, dtype=torch.int32)
    dense = [x.reshape(4, 1200, heads, HEAD_DIM) for x in (q, k, v)]
    seen = torch.eye(1200, dtype=torch.bool)
    seen[:, :600] = True
    report(
        benchmark,
        f"generative {dtype}, {THREADS} cores",
        lambda: ops.generative_attention(q, k, v, cu_seqlens, known),
        lambda: sdpa_padded(*dense, seen),
        attention_gflop(4 * (1200 * 600 + 600), heads),
        dtype,
    )


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_graph(benchmark, dtype: torch.dtype, gradients: bool) -> None:
    """2,000 expressed genes, 32 neighbours each among them, <cls> and self."""
    num_genes = 2000
    generator = torch.Generator().manual_seed(0)
    source = torch.arange(1, num_genes).repeat_interleave(32)
    target = torch.randint(1, num_genes, source.shape, generator=generator)
    graph = ops.GeneGraph.from_edges(num_genes, source, target, global_ids=[0])
    (q, k, v), cu_seqlens = packed([num_genes], dtype)
    plan = graph.plan(torch.arange(num_genes, dtype=torch.int32), cu_seqlens)
    seen, dense = plan.dense_mask(), [x[None] for x in (q, k, v)]

    def ours(*x):
        return ops.graph_attention(*x, plan)

    def theirs(*x):
        return sdpa_padded(*x, seen)

    pairs = float(plan.num_edges) * (3.5 if gradients else 1)
    plan_seconds = best_seconds(
        lambda: graph.plan(torch.arange(num_genes, dtype=torch.int32), cu_seqlens), rounds=5
    )
    benchmark.extra_info["plan_milliseconds"] = round(plan_seconds * 1e3, 3)
    report(
        benchmark,
        f"graph {dtype}, {plan.num_edges:,} edges{', with gradients' if gradients else ''}, {THREADS} cores, "
        f"plan {plan_seconds * 1e3:.2f} ms",
        with_gradients(ours, (q, k, v)) if gradients else lambda: ours(q, k, v),
        with_gradients(theirs, dense) if gradients else lambda: theirs(*dense),
        attention_gflop(pairs),
        dtype,
    )
