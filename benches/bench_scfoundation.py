"""scFoundation: tokens a second from CSR, and its encoder on packed cells beside padded torch versions of itself.

    pytest benches/bench_scfoundation.py --benchmark-only -s

Tokens: 20,000 cells x 20,000 genes of which 19,264 are the model's, in another order; the peer's dense rows are timed
on fewer cells. Encoder: four of its twelve layers, which all cost the same, at their real size, random weights; cells
of mixed lengths in one batch, the same states on both sides. Printed: cells/s, GFLOP/s of what the cells need, the
share of the machine's measured peak, the ratio, and the largest difference between the two.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import scfm
from generated_cells import Recipe, make_counts
from machine import peak_gflop_per_second
from rates import MEDIANS, measure, note
from scfm import _native
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scfoundation.inputs import checked_inputs
from scfm.models.scfoundation.model import Scfoundation
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfoundation_peers import PaddedEncoder, dense_rows
from shapes import SCFOUNDATION, cell_lengths, forward_gflop

NUM_GENES, NUM_COLUMNS = 19_264, 20_000
BLOCK, PEER_CELLS = 4096, 512
NUM_LAYERS, NUM_CELLS = 4, 8
LENGTHS = cell_lengths(NUM_CELLS, mean=SCFOUNDATION.num_tokens * 0.75, longest=2700)  # 376 to 1,745 tokens


# ---- tokens -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells() -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts, and the position of each column."""
    found = make_counts(Recipe(num_cells=20_000, num_genes=NUM_COLUMNS))
    matrix = sp.csr_matrix((found.data, found.indices, found.indptr), shape=(20_000, NUM_COLUMNS))
    positions = np.full(NUM_COLUMNS, -1, dtype=np.int32)
    order = np.random.default_rng(0).permutation(NUM_COLUMNS)[:NUM_GENES]
    positions[order] = np.random.default_rng(1).permutation(NUM_GENES)
    return matrix, positions


def _tokenize(matrix: sp.csr_matrix, positions: np.ndarray):
    return _native.read_depth(
        matrix.indptr.astype(np.int64),
        matrix.indices,
        matrix.data,
        positions,
        NUM_GENES,
        values="per_total",
        total="inputs",
        totals=None,
        target_sum=1.0,
        total_is_logged=True,
        target="fixed",
        target_number=4.0,
        single=False,
    )


def bench_tokens(benchmark, cells) -> None:
    matrix, positions = cells
    blocks = [matrix[start : start + BLOCK] for start in range(0, matrix.shape[0], BLOCK)]

    def batches():
        for block in blocks:
            _tokenize(block, positions)
            yield block.shape[0]

    measure(
        benchmark,
        "memory",
        "scfm read_depth",
        batches,
        nonzeros_per_cell=matrix.nnz / matrix.shape[0],
        threads=_native.get_num_threads(),
    )


def bench_dense_rows(benchmark, cells) -> None:
    """The original's way, given an aligned matrix for nothing."""
    matrix, positions = cells
    known = positions >= 0
    columns = np.empty(NUM_GENES, dtype=np.int64)
    columns[positions[known]] = np.flatnonzero(known)
    aligned = matrix[:PEER_CELLS, columns].tocsr()

    def batches():
        for _ in dense_rows(aligned):
            yield 1

    measure(benchmark, "memory", "dense rows", batches, rounds=2)
    result = _tokenize(matrix[:PEER_CELLS], positions)
    bounds = result.cu_seqlens
    for cell, (where, values) in enumerate(dense_rows(aligned)):
        tokens = slice(bounds[cell], bounds[cell + 1])
        assert result.token_ids[tokens].tolist() == where.tolist()
        np.testing.assert_allclose(result.values[tokens], values, rtol=2e-6)
    ratio = MEDIANS["memory", "scfm read_depth"] / MEDIANS["memory", "dense rows"]
    note(benchmark, times_faster_than_dense_rows=ratio)


# ---- the encoder ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Scfoundation:
    config = ScfoundationConfig(num_genes=NUM_GENES, num_layers=NUM_LAYERS, decoder_layers=1)
    return Scfoundation.from_config(config, ScfoundationGenes.of(f"G{i}" for i in range(NUM_GENES)))


@pytest.fixture(scope="module")
def packed() -> scfm.PackedCells:
    rng = np.random.default_rng(0)
    tokens = [np.sort(rng.permutation(NUM_GENES)[: length - 2]) for length in LENGTHS]
    return scfm.PackedCells.from_lists(
        [[*genes.tolist(), NUM_GENES, NUM_GENES + 1] for genes in tokens],
        [[*rng.gamma(2.0, 0.8, len(genes)).tolist(), 4.0, 3.5] for genes in tokens],
    )


RESULTS: dict[str, tuple[torch.Tensor, float]] = {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_packed_encoder(benchmark, model, packed, dtype: str) -> None:
    model.set_compute_dtype(dtype)
    with torch.inference_mode():
        model.hidden_at(packed.select([0]), 0)  # bfloat16 copies are made once, not per run
        out = benchmark.pedantic(lambda: model.hidden_at(packed, 0), rounds=3, iterations=1)
    seconds = benchmark.stats.stats.min
    RESULTS[dtype] = (out, seconds)
    _report(benchmark, f"packed, {dtype}", seconds, dtype)


# torch has no nested path under autocast.
@pytest.mark.parametrize(
    ("way", "dtype"), [("layer_by_layer", "float32"), ("nested", "float32"), ("layer_by_layer", "bfloat16")]
)
def bench_padded_torch(benchmark, model, packed, way: str, dtype: str) -> None:
    peer = PaddedEncoder(model)
    number = getattr(torch, dtype)
    with torch.inference_mode():
        rows = model._embed_tokens(checked_inputs(model.config, packed, model.device))
        cells = rows.split(packed.lengths.tolist())
        padded = torch.nn.utils.rnn.pad_sequence(list(cells), batch_first=True)
        padding = torch.arange(padded.shape[1]) >= packed.lengths.unsqueeze(1)
        run = getattr(peer, way)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=number == torch.bfloat16):
            out = benchmark.pedantic(lambda: run(padded, padding), rounds=1, warmup_rounds=0, iterations=1)
    seconds = benchmark.stats.stats.min
    _report(benchmark, f"torch {way}, {dtype}", seconds, dtype)
    real = out.float()[:, : padded.shape[1]][~padding[:, : out.shape[1]]]
    for ours, (states, our_seconds) in RESULTS.items():
        worst = float((real - states).abs().max())
        benchmark.extra_info[f"ratio_{ours}"] = round(seconds / our_seconds, 2)
        benchmark.extra_info[f"max_abs_difference_{ours}"] = worst
        print(f"  packed {ours} is {seconds / our_seconds:.2f}x as fast; largest difference {worst:.1e}")


def _report(benchmark, name: str, seconds: float, dtype: str) -> None:
    # EncoderShape has what forward_gflop reads of a configuration.
    gflop = forward_gflop(SCFOUNDATION, LENGTHS, NUM_LAYERS)
    peak = peak_gflop_per_second(getattr(torch, dtype), torch.get_num_threads())
    share = len(LENGTHS) * LENGTHS.max() / LENGTHS.sum()
    benchmark.extra_info |= {
        "cells_per_s": round(NUM_CELLS / seconds, 3),
        "gflop_per_s": round(gflop / seconds, 1),
        "share_of_peak": round(gflop / seconds / peak, 3),
        "peak_gflop_per_s": round(peak, 1),
        "padded_over_real_tokens": round(share, 2),
    }
    print(
        f"\n  {name}: {NUM_CELLS / seconds:.2f} cells/s through {NUM_LAYERS} layers at {LENGTHS.sum():,} tokens "
        f"({share:.2f}x padded), {gflop / seconds:.0f} GFLOP/s ({gflop / seconds / peak:.0%} of {peak:.0f})"
    )
