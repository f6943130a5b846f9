"""scGPT's cell embeddings at 1,200 tokens on CPU, beside what the original runs, in one process.

The peer is the original's encoder rebuilt from torch.nn, in float32 on torch's nested-tensor fast path with batches of
4, and the same converted to bfloat16, which the original offers on GPUs only. The same random weights and the same
tokens on both sides. Results print cells/s, GFLOP/s, the share of the machine's measured peak, the ratio, the smallest
cosine and the peak memory.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scfm
from machine import peak_gflop_per_second, peak_mib, restart_peak
from peers import ScgptEncoder, scgpt_embed
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from shapes import SCGPT, forward_gflop

NUM_CELLS, PEER_BATCH = 12, 4
LENGTHS = np.full(NUM_CELLS, SCGPT.num_tokens)
PAD_ID, CLS_ID = SCGPT.vocab_size - 3, SCGPT.vocab_size - 2


@pytest.fixture(scope="module")
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Gene ids and values (cells, tokens): <cls> and 1,199 genes with bins 1 to 50."""
    generator = np.random.default_rng(0)
    genes = np.stack([generator.permutation(PAD_ID)[: SCGPT.num_tokens] for _ in range(NUM_CELLS)])
    values = generator.integers(1, 51, size=genes.shape).astype(np.float32)
    genes[:, 0], values[:, 0] = CLS_ID, -2
    return torch.from_numpy(genes), torch.from_numpy(values)


@pytest.fixture(scope="module")
def model() -> Scgpt:
    config = ScgptConfig(
        vocab_size=SCGPT.vocab_size,
        hidden_size=SCGPT.hidden_size,
        num_heads=SCGPT.num_heads,
        ffn_size=SCGPT.ffn_size,
        num_layers=SCGPT.num_layers,
    )
    return Scgpt.from_config(config, seed=0)


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    return {
        name: peak_gflop_per_second(getattr(torch, name), torch.get_num_threads())
        for name in ("float32", "bfloat16")
    }


RESULTS: dict[str, tuple[np.ndarray, float]] = {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_ours(benchmark, model, tokens, peaks, dtype: str) -> None:
    packed = scfm.PackedCells.from_lists(*(rows.numpy() for rows in tokens))
    model.set_compute_dtype(dtype)
    model.embed(packed.select([0]))  # tables and bfloat16 copies are made once, not per run
    before = restart_peak()
    out = benchmark.pedantic(lambda: model.embed(packed), rounds=3, iterations=1)
    seconds = benchmark.stats.stats.min
    RESULTS[dtype] = (out, seconds)
    # What is computed: 11 whole layers, and keys and values of the 12th.
    gflop = forward_gflop(SCGPT, LENGTHS, SCGPT.num_layers - 1)
    gflop += 2 * 2 * SCGPT.hidden_size**2 * LENGTHS.sum() / 1e9
    _report(benchmark, f"scfm {dtype}", seconds, gflop, peaks[dtype], peak_mib() - before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_original_path(benchmark, model, tokens, peaks, dtype: str) -> None:
    peer = ScgptEncoder.of(model, PAD_ID).to(getattr(torch, dtype))
    before = restart_peak()
    out = benchmark.pedantic(
        lambda: scgpt_embed(peer, *tokens, batch_size=PEER_BATCH), rounds=2, iterations=1
    )
    seconds = benchmark.stats.stats.min
    gflop = forward_gflop(SCGPT, LENGTHS)
    _report(benchmark, f"original's path, {dtype}", seconds, gflop, peaks[dtype], peak_mib() - before)
    for our_dtype, (ours, our_seconds) in RESULTS.items():
        cosine = (ours * out).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(out, axis=1)
        ratio = seconds / our_seconds
        benchmark.extra_info[f"ratio_{our_dtype}"] = round(ratio, 2)
        benchmark.extra_info[f"min_cosine_{our_dtype}"] = float(cosine.min())
        benchmark.extra_info[f"max_abs_difference_{our_dtype}"] = float(np.abs(ours - out).max())
        print(
            f"  scfm {our_dtype}: {ratio:.2f}x the original's path in {dtype}, smallest cosine {cosine.min():.7f}"
        )


def _report(benchmark, name: str, seconds: float, gflop: float, peak: float, mib: float) -> None:
    speed, rate = NUM_CELLS / seconds, gflop / seconds
    benchmark.extra_info |= {
        "cells_per_s": round(speed, 3),
        "gflop_per_s": round(rate, 1),
        "share_of_peak": round(rate / peak, 3),
        "peak_gflop_per_s": round(peak, 1),
        "extra_peak_memory_mib": round(mib),
        "tokens": SCGPT.num_tokens,
        "torch_threads": torch.get_num_threads(),
    }
    print(
        f"\n  {name}: {speed:.3f} cells/s at {SCGPT.num_tokens} tokens, {rate:.0f} GFLOP/s "
        f"({rate / peak:.0%} of the measured {peak:.0f}), peak memory +{mib:.0f} MiB"
    )
