"""Steps of the families' objectives, shared out between ranks. Arguments and results are JSON."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from scfm.data.packed import PackedCells
from scfm.tokenize.scbert import ScbertTokenizer
from scfm.tokenize.scfoundation import ScfoundationTokenizer
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.tokenize.scgpt import ScgptTokenizer
from scfm.tokenize.scgpt_vocab import ScgptVocab
from scfm.train.config import PretrainConfig
from scfm.train.distributed.launch import joined
from scfm.train.distributed.parallel import ParallelModel
from scfm.train.objectives.protocol import make_objective, new_model

NUM_GENES, MICROBATCHES, CELLS = 40, 4, 5
GENES = [f"GENE{i}" for i in range(NUM_GENES)]
SHAPE = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seed": 1, "precision": "float32"}
FEED_FORWARD = {"ffn_size": 16, "dropout": 0.0}
DECODER = {"decoder_size": 8, "decoder_layers": 1, "decoder_heads": 1, "decoder_features": 8, "num_bins": 10}
CONTRAST = {"kind": "masked", "views": "disjoint", "cce": 1.0, "ecs": 1.0, "dab": 1.0, "batch": "donor"}
RUNS: dict[str, dict[str, Any]] = {
    "generative": {**FEED_FORWARD, "family": "scgpt", "objective": {"second_pass_after": 0}},
    "masked": {**FEED_FORWARD, "family": "scgpt", "objective": CONTRAST, "model": {"explicit_zeros": True}},
    "scbert": {"family": "scbert", "model": {"head_dim": 8, "num_features": 12}},
    "scfoundation": {**FEED_FORWARD, "family": "scfoundation", "model": DECODER},
}


def objective_steps(parallel: str, num_steps: int) -> dict[str, list[float]]:
    """Each objective's losses by step, weighted and added up, and the last norm of the gradient."""
    warnings.simplefilter("ignore")
    with joined("cpu", 60.0) as world:
        return {name: _steps(name, parallel, num_steps, world) for name in RUNS}


def _steps(name: str, parallel_name: str, num_steps: int, world: Any) -> list[float]:
    config = PretrainConfig(**SHAPE, **RUNS[name], parallel=parallel_name)
    labels = np.arange(num_steps * MICROBATCHES * CELLS) % 2 if name == "masked" else None
    corpus = SimpleNamespace(tokenizer=_tokenizer(config.family))
    model = new_model(config, corpus, num_batch_labels=2 if name == "masked" else 0).train()
    objective = make_objective(config, model, batch_labels=labels)
    parallel = ParallelModel(objective, config, world)
    optimizer = torch.optim.AdamW(parallel.parameter_groups(0.01), lr=1e-3, fused=True)
    share, found, norm = MICROBATCHES // world.size, [], torch.zeros(())
    for step in range(num_steps):
        weights = objective.at_step(step + 1)
        every = [objective.prepare(cells, epoch=0) for cells in _microbatches(config.family, step)]
        counts = {term: sum(one.counts[term] for one in every) for term in weights}
        mine = every[world.rank * share : (world.rank + 1) * share]
        loss = torch.zeros(1, dtype=torch.float64)
        for number, prepared in enumerate(mine):
            sums = parallel.microbatch(prepared, weights, counts, is_last=number == share - 1)
            loss += sum(weights[term] * sums[term].double() / counts[term] for term in weights)
        norm = parallel.gradient_norm()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(float(world.sum(loss)))
    parallel.release()
    return [*found, float(norm)]


def _tokenizer(family: str) -> Any:
    if family == "scgpt":
        return ScgptTokenizer(ScgptVocab.from_dict({gene: i for i, gene in enumerate(GENES)}))
    return (
        ScbertTokenizer(GENES) if family == "scbert" else ScfoundationTokenizer(ScfoundationGenes.of(GENES))
    )


def _microbatches(family: str, step: int) -> Iterator[PackedCells]:
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    for number in range(step * MICROBATCHES, (step + 1) * MICROBATCHES):
        counts = np.random.default_rng(number).poisson(1.5, size=(CELLS, NUM_GENES)).astype(np.float32)
        counts[:, 0] += 1
        cells = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=GENES))
        packed = _tokenizer(family)(cells)
        ids = packed.cell_ids + number * CELLS
        yield PackedCells(packed.token_ids, packed.values, packed.cu_seqlens, ids)
