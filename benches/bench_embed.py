"""Cell embeddings with the V2-104M shape on CPU, beside what the original runs, in one process.

The peer is Hugging Face's BertForMaskedLM as the original's extractor drives it: sdpa attention, float32,
length-sorted batches padded to their longest cell, every layer and all logits computed, hidden states kept.
The same random weights on both sides. Results print cells/s, GFLOP/s, the share of the machine's measured
peak, the ratio and the peak memory.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scfm
from machine import peak_gflop_per_second, peak_mib, restart_peak
from peers import hugging_face_embed, hugging_face_model
from scfm.models.geneformer.model import Geneformer
from shapes import V2_104M, cell_lengths, forward_gflop

NUM_CELLS, PEER_BATCH = 12, 4
LENGTHS = cell_lengths(NUM_CELLS)


@pytest.fixture(scope="module")
def cells() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [
        [2, *(generator.permutation(V2_104M.vocab_size - 4)[: length - 2] + 4).tolist(), 3]
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def model() -> Geneformer:
    model = Geneformer.from_config(V2_104M, seed=0)
    model.version = "V2"
    return model


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    return {
        name: peak_gflop_per_second(getattr(torch, name), torch.get_num_threads())
        for name in ("float32", "bfloat16")
    }


RESULTS: dict[str, tuple[np.ndarray, float]] = {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_ours(benchmark, model, cells, peaks, dtype: str) -> None:
    packed = scfm.PackedCells.from_lists(cells)
    model.set_compute_dtype(dtype)
    model.embed(packed.select([0]))  # the bfloat16 copies are made once, not per run
    before = restart_peak()
    out = benchmark.pedantic(lambda: model.embed(packed), rounds=2, iterations=1)
    seconds = benchmark.stats.stats.min
    RESULTS[dtype] = (out, seconds)
    # What the default (cls, second-to-last layer) needs: 10 whole layers and keys and values of the 11th.
    gflop = forward_gflop(V2_104M, LENGTHS, V2_104M.num_layers - 2)
    gflop += 2 * 2 * V2_104M.hidden_size**2 * LENGTHS.sum() / 1e9
    _report(benchmark, f"scfm {dtype}", seconds, gflop, peaks[dtype], peak_mib() - before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_original_path(benchmark, model, cells, peaks, dtype: str) -> None:
    """float32 is what the original runs; bfloat16 is the same model converted, which it does not offer."""
    transformers = pytest.importorskip("transformers", reason="the peer is Hugging Face transformers")
    peer = hugging_face_model(transformers, V2_104M, model).to(getattr(torch, dtype))
    before = restart_peak()
    out = benchmark.pedantic(
        lambda: hugging_face_embed(peer, cells, batch_size=PEER_BATCH), rounds=2, iterations=1
    )
    seconds = benchmark.stats.stats.min
    gflop = forward_gflop(V2_104M, LENGTHS)
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
        "mean_tokens": float(LENGTHS.mean()),
        "torch_threads": torch.get_num_threads(),
    }
    print(
        f"\n  {name}: {speed:.3f} cells/s at {LENGTHS.mean():.0f} tokens, {rate:.0f} GFLOP/s "
        f"({rate / peak:.0%} of the measured {peak:.0f}), peak memory +{mib:.0f} MiB"
    )
