"""Masked-gene pretraining on CPU, scfm.pretrain beside Hugging Face's Trainer, in one process on the same real cells.

    pytest benches/bench_pretrain.py --benchmark-only -s        (needs SCFM_DATA)

Geneformer's V1-10M shape with its vocabulary of 25,426 tokens, 12 cells a step as its authors trained it (ours: a token
budget of 12 mean cells and 2 %), dropout, clipping and fused AdamW on both sides. Counted are tokens, never padding.
The peer reads tokens that lie ready in memory; ours reads counts from the .h5ad file and tokenizes as it goes, so its
wait for data is part of its step. Goals: twice the peer's rate, a wait below 5 % of the step. The share of the measured
peak is that of the operations which the model needs (flops.py), on both sides. Threads: torch's, by OMP_NUM_THREADS.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

import scfm
from machine import peak_gflop_per_second, peak_mib, restart_peak
from pretrain_peers import hugging_face_trainer
from scfm import _native
from scfm.data.gene_tables import human_symbols
from scfm.models.geneformer.config import GeneformerConfig
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.train.cost.flops import geneformer_flops
from shapes import V1_10M

SETS = ("pbmc3k_labeled.h5ad", "pbmc_multichem.h5ad")
CELLS_OF_EACH, BATCH = 12, 12
MASKED = 0.15
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-3
RATES: dict[tuple[str, str], float] = {}

pytestmark = pytest.mark.filterwarnings("ignore::scfm.ScfmWarning")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """The same few cells of two real sets for both sides, and a vocabulary as large as the released one."""
    root = os.environ.get("SCFM_DATA")
    if root is None:
        pytest.skip("SCFM_DATA does not name a folder with the sets")
    folder = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(0)
    paths = []
    for name in SETS:
        cells = ad.read_h5ad(Path(root) / name)
        path = folder / name
        cells[np.sort(rng.permutation(cells.n_obs)[:CELLS_OF_EACH])].copy().write_h5ad(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def vocab(files) -> GeneformerDictionaries:
    columns = [scfm.read(path).genes for path in files]
    ours = {gene for genes in columns for gene in genes.index if gene.startswith("ENSG")}
    ours |= {
        gene for genes in columns for gene in genes.get("ensembl_id", ()) if str(gene).startswith("ENSG")
    }
    others = sorted({gene for several in human_symbols().values() for gene in several} - ours)
    genes = sorted(ours)[: V1_10M.vocab_size - 2]
    genes += others[: V1_10M.vocab_size - 2 - len(genes)]
    return GeneformerDictionaries.from_vocabulary(genes, dict.fromkeys(genes, 1.0), version="V1")


@pytest.fixture(scope="module")
def lengths(files, vocab) -> np.ndarray:
    tokenizer = scfm.GeneformerTokenizer(vocab, max_tokens=V1_10M.max_tokens)
    return np.concatenate([tokenizer(path).lengths.numpy() for path in files])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_ours(benchmark, files, vocab, lengths, tmp_path, dtype: str) -> None:
    _native.set_num_threads(torch.get_num_threads())
    (tmp_path / "vocab.json").write_text(vocab.to_json())
    settings = {
        "data": [str(path) for path in files], "out": tmp_path / "run", "dictionaries": tmp_path / "vocab.json",
        "special_tokens": False, "preset": "V1-10M", "precision": dtype, "num_epochs": 3,
        "token_budget": int(1.02 * BATCH * lengths.mean()),
        "microbatches_per_step": 1, "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY,
        "checkpoint_every": None,
    }  # fmt: skip
    before = restart_peak()
    benchmark.pedantic(lambda: scfm.pretrain(settings), rounds=1, iterations=1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line and line["step"] > 2]  # the first two warm up
    seconds, tokens = (sum(line[name] for line in steps) for name in ("step_s", "tokens"))
    wait = sum(line["data_wait_s"] for line in steps) / seconds
    _report(benchmark, "scfm", dtype, lengths, tokens / seconds, peak_mib() - before)
    benchmark.extra_info |= {"steps": len(steps), "data_wait_share": round(wait, 5)}
    print(f"  {len(steps)} steps of {tokens / len(steps):,.0f} tokens, {wait:.2%} of them waiting for data")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_trainer(benchmark, files, vocab, lengths, tmp_path, dtype: str) -> None:
    """float32 is what its authors' script runs on a CPU; bfloat16 is the Trainer's autocast."""
    transformers = pytest.importorskip("transformers", reason="the peer is Hugging Face's Trainer")
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs it")
    tokenizer = scfm.GeneformerTokenizer(vocab, max_tokens=V1_10M.max_tokens)
    cells = [cell for path in files for cell in tokenizer(path).to_lists()]
    train, clock = hugging_face_trainer(
        transformers, V1_10M, vocab, cells, batch_size=BATCH, learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY, dtype=getattr(torch, dtype), folder=tmp_path,
    )  # fmt: skip
    before = restart_peak()
    benchmark.pedantic(train, rounds=1, iterations=1)
    _report(benchmark, "Trainer", dtype, lengths, lengths.sum() / clock.seconds[-1], peak_mib() - before)
    for (ours, our_dtype), rate in RATES.items():
        if ours == "scfm":
            ratio = rate / RATES["Trainer", dtype]
            benchmark.extra_info[f"ratio_{our_dtype}"] = round(ratio, 2)
            print(f"  scfm {our_dtype}: {ratio:.2f}x the Trainer in {dtype}")


def _report(benchmark, who: str, dtype: str, lengths: np.ndarray, rate: float, mib: float) -> None:
    RATES[who, dtype] = rate
    config: GeneformerConfig = V1_10M
    needed = geneformer_flops(config, lengths, num_masked=MASKED * lengths.sum()).model / lengths.sum()
    speed = rate * needed / 1e9
    peak = peak_gflop_per_second(getattr(torch, dtype), torch.get_num_threads())
    benchmark.extra_info |= {
        "tokens_per_s": round(rate, 1),
        "gflop_per_s": round(speed, 1),
        "share_of_peak": round(speed / peak, 3),
        "peak_gflop_per_s": round(peak, 1),
        "extra_peak_memory_mib": round(mib),
        "mean_tokens": round(float(lengths.mean()), 1),
        "cells_a_step": BATCH,
        "torch_threads": torch.get_num_threads(),
    }
    print(
        f"\n  {who}, {dtype}: {rate:,.0f} tokens/s at {lengths.mean():,.0f} tokens a cell, {speed:,.0f} GFLOP/s "
        f"({speed / peak:.0%} of the measured {peak:,.0f}), peak memory +{mib:,.0f} MiB"
    )
