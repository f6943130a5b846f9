"""The demo with ``pretrain``: split real cells, pretrain a small Geneformer on some, score it on the others.

Everything a score depends on is fitted on training cells alone: the vocabulary and gene medians, the model,
the principal components, the counted baselines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.demo.cells import demo_baselines, demo_cells
from scfm.demo.clock import Clock
from scfm.demo.folder import FORMAT, REPORT
from scfm.demo.pictures import draw_cells
from scfm.demo.scores import embedding_report, masked_gene_report
from scfm.demo.verdict import plain_verdict
from scfm.evaluate import Report, stratified_split
from scfm.plot import learning_curve

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.models.geneformer.model import Geneformer
    from scfm.train.config import PretrainConfig

__all__ = ["PRODUCTS", "produce"]

TEST_FRACTION = 0.2
NUM_EPOCHS_A_MINUTE = 12
QUICK_STEPS = 40
PRODUCTS: tuple[str, ...] = (
    "report.md",
    "model",
    "metrics.jsonl",
    "settings.json",
    "cells.h5ad",
    "umap.png",
    "umap_pca.png",
    "learning_curve.png",
    REPORT,  # last: its presence says that the rest is there
)


def produce(
    work: Path, folder: Path, minutes: float, seed: int, quick: bool, clock: Clock
) -> tuple[Report, Report, str]:
    """Make PRODUCTS in ``work``, for ``folder``: the tables of hidden genes and of the embedding, and the verdict."""
    from scfm.models.geneformer.model import Geneformer
    from scfm.train.objectives import evaluate_masked
    from scfm.train.pretrain import pretrain

    with clock.stage("reading the cells"):
        cells = demo_cells()
        labels = cells.obs["cell_type"].astype(str).to_numpy()
        train, test = stratified_split(labels, test_fraction=TEST_FRACTION, seed=seed)
    with clock.stage("pretraining", bar=True) as progress:
        config = _pretrain_config(cells[train].copy(), work, minutes, seed, quick)
        trained = pretrain(config, progress=progress)
        model = trained.model
        assert isinstance(model, Geneformer)
        untrained = Geneformer.from_config(model.config, model.vocab, seed=seed)
    with clock.stage("embedding"):
        ours, random = (_embed(each, cells) for each in (model, untrained))
        baselines = demo_baselines(cells, train)
    with clock.stage("scoring"):
        test_cells = model.tokenize(cells[test].copy())
        masked = masked_gene_report(
            model=model,
            train_cells=model.tokenize(cells[train].copy()),
            evaluations={
                "ours": evaluate_masked(model, test_cells, seed=seed),
                "random": evaluate_masked(untrained, test_cells, seed=seed),
            },
            test_cells=test_cells,
            seed=seed,
        )
        embedding = embedding_report(ours, random, baselines, labels, train, test, seed=seed)
    with clock.stage("drawing"):
        _store_cells(cells, work, ours, baselines, train, seed)
        _draw(cells, work, masked, quick)
    text = plain_verdict(masked, embedding, num_parameters=model.num_parameters())
    settings = config.to_dict() | {"out": str(folder)}
    _write_reports(work, masked, embedding, text, cells, settings, clock.seconds)
    return masked, embedding, text


def _pretrain_config(cells: AnnData, work: Path, minutes: float, seed: int, quick: bool) -> PretrainConfig:
    from scfm.train.config import PretrainConfig

    # Two layers of width 128 with a high learning rate learn far more in minutes than a deeper, slower model.
    return PretrainConfig(
        data=[cells],
        out=work,
        num_layers=2,
        hidden_size=128,
        num_heads=4,
        ffn_size=256,
        max_tokens=512,
        special_tokens=True,
        # About 16 cells a step.
        token_budget=16 * 512,
        microbatches_per_step=1,
        learning_rate=3e-3,
        weight_decay=1e-3,
        warmup_ratio=0.05,
        schedule="linear",
        num_epochs=max(round(NUM_EPOCHS_A_MINUTE * minutes), 1),
        max_steps=QUICK_STEPS if quick else None,
        precision="float32",
        checkpoint_every=None,
        held_out_fraction=0.0,
        dropout=0.0,
        seed=seed,
    )


def _embed(model: Geneformer, cells: AnnData) -> NDArray[np.float32]:
    # The mean over genes: with so little training <cls> has hardly learned to summarise. The layer is the
    # authors' default.
    return model.embed(cells, pooling="mean")


def _store_cells(
    cells: AnnData,
    work: Path,
    ours: NDArray[np.float32],
    baselines: dict[str, NDArray[np.float32]],
    train: NDArray[np.int64],
    seed: int,
) -> None:
    in_train = np.zeros(cells.n_obs, dtype=bool)
    in_train[train] = True
    cells.obs["split"] = np.where(in_train, "train", "test")
    cells.obsm["X_geneformer"] = ours
    cells.obsm["X_pca"] = baselines["PCA-50"]
    cells.uns["demo"]["seed"] = seed
    cells.write_h5ad(work / "cells.h5ad")


def _draw(cells: AnnData, work: Path, masked: Report, quick: bool) -> None:
    draw_cells(cells, work, {"X_geneformer": "the small Geneformer of this demo"}, quick=quick)
    metric = masked.metrics[1].name
    lines = (work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    held_out = {"step": records[-1]["step"], "held_out_loss": masked.ours.values[metric]}
    learning_curve(
        [*records, held_out],
        baselines={row.name: row.values[metric] for row in masked.rows if row.role == "baseline"},
        title="masked-gene prediction; dashed: baselines on held-out cells",
        path=work / "learning_curve.png",
    )


def _write_reports(
    work: Path,
    masked: Report,
    embedding: Report,
    verdict: str,
    cells: AnnData,
    settings: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    content: dict[str, Any] = {
        "format": FORMAT,
        "cells": dict(cells.uns["demo"]),
        "settings": settings,
        "masked_genes": masked.to_dict(),
        "embedding": embedding.to_dict(),
        "verdict": verdict,
        "seconds": seconds,
    }
    # The run's own settings name the folder it was made in; what stays must name the one it stands in.
    own = json.loads((work / "settings.json").read_text(encoding="utf-8")) | {"out": settings["out"]}
    (work / "settings.json").write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    (work / REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (work / "report.md").write_text(
        f"# scfm demo\n\n{verdict}\n\n{masked.to_markdown()}\n{embedding.to_markdown()}\n"
        "![UMAP of the model's embedding](umap.png)\n![UMAP of PCA](umap_pca.png)\n"
        "![learning curve](learning_curve.png)\n",
        encoding="utf-8",
    )
