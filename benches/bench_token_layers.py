"""The layers before and after the encoder beside torch's: embeddings with LayerNorm, and the masked-gene loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from machine import best_seconds, extra_peak_mib
from scfm import ops
from shapes import V2_104M

TOKENS, MASKED = 16_384, 2_458


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward and backward"])
def bench_embed_norm(benchmark, dtype: torch.dtype, gradients: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    size = V2_104M.hidden_size
    rows = [V2_104M.vocab_size, V2_104M.type_vocab_size, V2_104M.max_tokens]
    tables = [torch.randn(n, size, generator=generator).to(dtype).requires_grad_(gradients) for n in rows]
    weight, bias = (x.to(dtype).requires_grad_(gradients) for x in (torch.ones(size), torch.zeros(size)))
    ids = [torch.randint(0, n, (TOKENS,), generator=generator) for n in rows]
    upstream = torch.ones(TOKENS, size, dtype=dtype)

    def finish(out: torch.Tensor) -> None:
        if gradients:
            torch.autograd.grad(out, [*tables, weight, bias], upstream)

    def theirs() -> None:
        x = sum(F.embedding(index, table) for index, table in zip(ids, tables, strict=True))
        finish(F.layer_norm(x, (size,), weight, bias, 1e-12))

    def ours() -> None:
        finish(ops.embed_norm(ids, tables, weight, bias))

    benchmark.pedantic(ours, rounds=7, iterations=1, warmup_rounds=1)
    seconds, peer = benchmark.stats.stats.min, best_seconds(theirs, rounds=4)
    moved = TOKENS * size * (len(rows) + 1) * tables[0].element_size() / 1e9
    benchmark.extra_info |= {
        "milliseconds": round(seconds * 1e3, 2),
        "torch_milliseconds": round(peer * 1e3, 2),
        "ratio": round(peer / seconds, 2),
    }
    if not gradients:
        benchmark.extra_info["gb_per_s"] = round(moved / seconds, 1)
    print(
        f"\n  embed_norm {dtype}, {'with gradients' if gradients else 'forward'}: {seconds * 1e3:.1f} ms; "
        f"torch {peer * 1e3:.1f} ms; {peer / seconds:.2f}x"
    )


def bench_masked_head_loss(benchmark) -> None:
    """Forward and backward of V2-104M's head on the masked tokens of 16,384."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(MASKED, V2_104M.hidden_size, generator=generator).requires_grad_()
    weight = (
        0.02 * torch.randn(V2_104M.vocab_size, V2_104M.hidden_size, generator=generator)
    ).requires_grad_()
    bias = torch.zeros(V2_104M.vocab_size, requires_grad=True)
    targets = torch.randint(0, V2_104M.vocab_size, (MASKED,), generator=generator)
    inputs = [hidden, weight, bias]

    def ours() -> None:
        torch.autograd.grad(ops.masked_head_loss(*inputs, targets).sum(), inputs)

    def theirs() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(*inputs), targets, reduction="sum"), inputs)

    ours()
    memory = extra_peak_mib(ours)
    benchmark.pedantic(ours, rounds=3, iterations=1)
    seconds = benchmark.stats.stats.min
    peer, peer_memory = best_seconds(theirs, rounds=2), extra_peak_mib(theirs)
    benchmark.extra_info |= {
        "milliseconds": round(seconds * 1e3),
        "torch_milliseconds": round(peer * 1e3),
        "ratio": round(peer / seconds, 2),
        "extra_memory_mib": round(memory),
        "torch_extra_memory_mib": round(peer_memory),
    }
    print(
        f"\n  masked_head_loss: {seconds * 1e3:.0f} ms, +{memory:.0f} MiB; torch {peer * 1e3:.0f} ms, "
        f"+{peer_memory:.0f} MiB; {peer / seconds:.2f}x"
    )
