"""A small model of each family, pretrained for minutes on real cells, beside what its genes alone would tell.

    python benches/pretrain_families.py DATA [--families geneformer scgpt ...] [--out benches/results/FILE.json]

DATA: a folder with the sets that are named below. One cell in ten is held out; all numbers are of these. Baselines are
fitted on the training cells (train/held_out.py). Per-gene baselines: the frequency of each gene (Geneformer), of each
gene's bins (scBERT), each gene's mean (scGPT, scFoundation); the others beside them know more: neighbours in rank, the
cell's depth, the level of what is visible of the cell. Prints a table of all of them, whichever way they fall.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scfm
from scfm.data.gene_tables import human_symbols
from scfm.train.config import PretrainConfig
from scfm.train.pretrain import PretrainResult, pretrain

PANEL = 1000
PER_GENE = {
    "geneformer": "unigram",
    "scgpt": "gene-mean",
    "scbert": "bin-frequency-of-the-gene",
    "scfoundation": "gene-mean",
}
RUN: dict[str, Any] = {
    "held_out_fraction": 0.1,
    "held_out_cells": 400,
    "learning_rate": 3e-3,
    "warmup_ratio": 0.1,
    "microbatches_per_step": 1,
    "precision": "float32",
    "checkpoint_every": None,
}
BLOOD = ["pbmc3k_labeled.h5ad", "pbmc_multichem.h5ad"]
SMALL = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_size": 128, "dropout": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "geneformer": {
        **SMALL,
        "data": ["pbmc_ifnb_stim_ctrl.h5ad"],
        "hidden_size": 128,
        "max_tokens": 256,
        "token_budget": 4096,
        "num_epochs": 14,
    },
    "scgpt": {
        **SMALL,
        "data": BLOOD,
        "max_tokens": 256,
        "token_budget": 8192,
        "learning_rate": 2e-3,
        "num_epochs": 6,
    },
    "scbert": {
        "data": BLOOD,
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "model": {"head_dim": 32, "num_features": 64},
        "token_budget": 16 * (PANEL + 1),
        "num_epochs": 2,
    },
    "scfoundation": {
        **SMALL,
        "data": BLOOD,
        "model": {
            "decoder_size": 32,
            "decoder_layers": 1,
            "decoder_heads": 2,
            "decoder_head_dim": 16,
            "decoder_features": 32,
            "num_bins": 20,
        },
        "token_budget": 24_000,
        "num_epochs": 2,
    },
}


def most_expressed(folder: Path, file: Path) -> Path:
    """The known genes with most counts in the first set, a symbol a line: a panel that minutes can train."""
    source = scfm.read(folder / BLOOD[0])
    totals = np.zeros(source.num_genes)
    for block in source.blocks():
        np.add.at(totals, block.indices, block.data)
    known = human_symbols()
    symbols = source.genes["symbol"].astype(str).to_numpy()[np.argsort(-totals, kind="stable")]
    chosen = list(dict.fromkeys(symbol for symbol in symbols if symbol in known))[:PANEL]
    file.write_text("\n".join(sorted(chosen)) + "\n", encoding="utf-8")
    return file


def run(family: str, folder: Path, work: Path) -> tuple[PretrainConfig, PretrainResult, float]:
    settings = {**RUN, **FAMILIES[family], "family": family, "data_folder": folder, "out": work / family}
    if family in ("scbert", "scfoundation"):
        settings["genes"] = most_expressed(folder, work / "panel.txt")
    config = PretrainConfig(**settings, evaluate_every=10**9)
    begun = time.perf_counter()
    result = pretrain(config, progress=_show)
    return config, result, time.perf_counter() - begun


def _show(metrics: dict[str, Any]) -> None:
    if metrics.get("step", 1) % 100 == 0 and "loss" in metrics:
        print(
            f"  step {metrics['step']}: loss {metrics['loss']:.4f}, {metrics['progress']:.0%}",
            file=sys.stderr,
        )


def facts(family: str, config: PretrainConfig, result: PretrainResult, seconds: float) -> dict[str, Any]:
    assert result.evaluation is not None
    found = result.evaluation.metrics
    own = found["held_out/loss"]
    per_gene = found[f"held_out/baseline/{PER_GENE[family]}/loss"]
    return {
        "family": family,
        "parameters": result.model.num_parameters(),
        "steps": result.step,
        "seconds": round(seconds, 1),
        "settings": {**RUN, **FAMILIES[family]},
        "objective": config.objective,
        "per_gene_baseline": PER_GENE[family],
        "beats_per_gene_baseline": own < per_gene,
        "held_out": found,
        "report": result.evaluation.reports[0].to_dict(),
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| family | parameters | minutes | held-out loss | per-gene baseline | other baselines |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        losses = {
            name.split("/")[2]: value
            for name, value in one["held_out"].items()
            if name.startswith("held_out/baseline/") and name.endswith("/loss")
        }
        per_gene = losses.pop(one["per_gene_baseline"])
        others = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        lines.append(
            f"| {one['family']} | {one['parameters']:,} | {one['seconds'] / 60:.1f} | "
            f"{one['held_out']['held_out/loss']:.4f} | {one['per_gene_baseline']} {per_gene:.4f} | {others} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", scfm.errors.ScfmWarning)
    results = []
    with tempfile.TemporaryDirectory() as work:
        for family in arguments.families:
            print(family, file=sys.stderr)
            results.append(facts(family, *run(family, arguments.data, Path(work))))
    machine = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "scfm": scfm.__version__,
    }
    print(table(results))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({**machine, "runs": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
