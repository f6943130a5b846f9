"""FAVOR+ at scBERT's full length beside Performer's own way: 16,907 tokens, 10 heads of 64, 266 features, all cores."""

from __future__ import annotations

import pytest
import torch

from attention_peers import performer
from machine import best_seconds, extra_peak_mib, peak_gflop_per_second
from scfm import ops

TOKENS, HEADS, HEAD_DIM, FEATURES = 16_907, 10, 64, 266
CU_SEQLENS = torch.tensor([0, TOKENS], dtype=torch.int32)
# Two feature maps, one product into the context and one out of it.
GFLOP = 2 * TOKENS * HEADS * HEAD_DIM * FEATURES * 4 / 1e9


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(TOKENS, 3, HEADS, HEAD_DIM, generator=generator).unbind(1)
    return q, k, v, torch.randn(FEATURES, HEAD_DIM, generator=generator)


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_favor(benchmark, inputs, dtype: torch.dtype, gradients: bool) -> None:
    *qkv, projection = inputs
    q, k, v = (x.detach().clone().to(dtype).requires_grad_(gradients) for x in qkv)
    dense = [x.detach().transpose(0, 1)[None].contiguous().requires_grad_(gradients) for x in (q, k, v)]

    def ours() -> None:
        out = ops.favor_attention(q, k, v, projection, CU_SEQLENS)
        if gradients:
            torch.autograd.grad(out, [q, k, v], out.detach())

    def theirs() -> None:
        out = performer(*dense, projection.to(dtype))
        if gradients:
            torch.autograd.grad(out, dense, out.detach())

    ours()
    memory = extra_peak_mib(ours)
    benchmark.pedantic(ours, rounds=4, iterations=1)
    seconds = benchmark.stats.stats.min
    peer, peer_memory = best_seconds(theirs, rounds=2), extra_peak_mib(theirs)
    gflop = GFLOP * (3.0 if gradients else 1.0)
    peak = peak_gflop_per_second(torch.float32, torch.get_num_threads())
    benchmark.extra_info |= {
        "milliseconds": round(seconds * 1e3, 2),
        "gflop_per_s": round(gflop / seconds, 1),
        "share_of_float32_peak": round(gflop / seconds / peak, 3),
        "performer_milliseconds": round(peer * 1e3, 2),
        "ratio": round(peer / seconds, 2),
        "extra_memory_mib": round(memory, 1),
        "performer_extra_memory_mib": round(peer_memory),
        "output_mib": round(q.numel() * q.element_size() / 2**20, 1),
    }
    print(
        f"\n  favor {dtype}{', with gradients' if gradients else ''}: {seconds * 1e3:.0f} ms, "
        f"{gflop / seconds:.0f} GFLOP/s ({gflop / seconds / peak:.0%} of float32's {peak:.0f}), +{memory:.0f} MiB; "
        f"Performer's way {peer * 1e3:.0f} ms, +{peer_memory:.0f} MiB; {peer / seconds:.2f}x"
    )
