"""Masked-gene pretraining in one process: corpus, loop, metrics, checkpoint.

Batches are whole cells packed end to end. The order of cells is keyed by (seed, epoch), masks by (seed, epoch,
cell) and dropout by (seed, step), so a run is reproduced by its settings alone. A step whose loss or gradient
is not finite is never applied: the run stops and says where.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from scfm.data.packed import PackedCells
from scfm.errors import ConfigError, ScfmError
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.models.nn.precision import resolve_device
from scfm.tokenize.geneformer import GeneformerTokenizer
from scfm.train.config import PretrainConfig
from scfm.train.corpus import Corpus, read_corpus
from scfm.train.objectives import evaluate_masked, mask_genes, masked_gene_loss
from scfm.train.schedule import learning_rate_factor

ProgressCallback = Callable[[dict[str, Any]], None]
_PURPOSE_ORDER = 2


@dataclass(frozen=True)
class PretrainResult:
    """model: trained, in evaluation mode; folder: where it was saved; metrics_file: one JSON line a step."""

    model: Geneformer
    folder: Path
    metrics_file: Path
    tokenizer: GeneformerTokenizer
    corpus: Corpus


def pretrain(
    config: PretrainConfig | Mapping[str, Any] | str | Path, *, progress: ProgressCallback | None = None
) -> PretrainResult:
    """Pretrain a Geneformer on raw counts and save it under ``config.out``.

    config: settings, a mapping of them or a TOML file; progress: called with each step's metrics.
    Raises ConfigError for settings, the readers' errors for data, ScfmError when the loss stops being finite.
    """
    if isinstance(config, str | Path):
        config = PretrainConfig.from_file(config)
    elif not isinstance(config, PretrainConfig):
        if not isinstance(config, Mapping):
            raise ConfigError(
                f"is a {type(config).__name__}; expected settings or a TOML file", where="config"
            )
        config = PretrainConfig.from_mapping(config)
    out = Path(config.out)
    if (out / "model").exists():
        raise ConfigError(
            "already holds a model", path=out / "model", where="out", hint="Choose another folder."
        )
    corpus = read_corpus(config)
    model = _new_model(config, corpus.tokenizer).to(resolve_device(config.device))
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(config.to_json() + "\n", encoding="utf-8")
    metrics_file = out / "metrics.jsonl"
    # Dropout is seeded at every step; the caller's generator is not ours to change.
    with metrics_file.open("w", encoding="utf-8") as stream, torch.random.fork_rng():
        _train(model, corpus, config, stream, progress)
    model.eval()
    folder = model.save(out / "model")
    return PretrainResult(model, folder, metrics_file, corpus.tokenizer, corpus)


def _new_model(config: PretrainConfig, tokenizer: GeneformerTokenizer) -> Geneformer:
    shape = GeneformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        ffn_size=config.ffn_size,
        max_tokens=config.max_tokens,
        vocab_size=max(tokenizer.vocab.token.values()) + 1,
        hidden_dropout=config.dropout,
        attention_dropout=0.0,
    )
    return Geneformer.from_config(shape, tokenizer.vocab, seed=config.seed)


def _train(
    model: Geneformer,
    corpus: Corpus,
    config: PretrainConfig,
    stream: IO[str],
    progress: ProgressCallback | None,
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    total_steps = config.num_epochs * math.ceil(corpus.training.num_cells / config.batch_cells)
    total_steps = min(total_steps, config.max_steps or total_steps)
    seconds = math.inf if config.max_minutes is None else config.max_minutes * 60
    start = time.perf_counter()
    model.train()
    for step, (epoch, batch) in enumerate(_batches(corpus.training, config)):
        begun = time.perf_counter()
        share = max(step / total_steps, (begun - start) / seconds)
        if step >= total_steps or share >= 1.0:
            break
        factor = learning_rate_factor(share, warmup_ratio=config.warmup_ratio, schedule=config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        metrics = _step(model, optimizer, batch, config, step, epoch)
        took = time.perf_counter() - begun
        metrics |= {
            "learning_rate": config.learning_rate * factor,
            "tokens_per_s": round(metrics["tokens"] / took, 1),
            "cells_per_s": round(metrics["cells"] / took, 1),
            "seconds": round(time.perf_counter() - start, 3),
            "progress": round(max((step + 1) / total_steps, (time.perf_counter() - start) / seconds), 5),
        }
        if config.evaluate_every and (step + 1) % config.evaluate_every == 0 and corpus.held_out.num_cells:
            metrics["held_out_loss"] = evaluate_masked(
                model, corpus.held_out, seed=config.seed, mask_ratio=config.mask_ratio
            ).loss
        stream.write(json.dumps(metrics) + "\n")
        stream.flush()
        if progress is not None:
            progress(metrics)


def _step(
    model: Geneformer,
    optimizer: torch.optim.Optimizer,
    batch: PackedCells,
    config: PretrainConfig,
    step: int,
    epoch: int,
) -> dict[str, Any]:
    cells = mask_genes(batch, model, seed=config.seed, epoch=epoch, mask_ratio=config.mask_ratio)
    num_masked = len(cells.positions)
    torch.manual_seed(_step_seed(config.seed, step))
    optimizer.zero_grad(set_to_none=True)
    loss = masked_gene_loss(model, cells) / max(num_masked, 1)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise ScfmError(
            f"loss {loss.item()}, gradient norm {norm.item()}; the step was not applied",
            where=f"step {step}",
            hint="Lower the learning rate or lengthen the warm-up.",
        )
    optimizer.step()
    return {
        "step": step,
        "epoch": epoch,
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "masked": num_masked,
        "tokens": batch.num_tokens,
        "cells": batch.num_cells,
    }


def _batches(cells: PackedCells, config: PretrainConfig) -> Iterator[tuple[int, PackedCells]]:
    for epoch in range(config.num_epochs):
        key = [config.seed, _PURPOSE_ORDER]
        order = np.random.Generator(np.random.Philox(key=key, counter=[epoch, 0, 0, 0]))
        shuffled = order.permutation(cells.num_cells)
        for start in range(0, cells.num_cells, config.batch_cells):
            yield epoch, cells.select(shuffled[start : start + config.batch_cells])


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
