"""The demo with the model that comes with the package: scfm-mini embeds real cells that it never saw, at once.

Its weights are fitted to none of these cells, nor are random weights of the same shape; PCA is, without labels, on the
training cells. Labels are then looked up among the training cells' neighbours, the same for all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from scfm.demo.cells import demo_baselines, demo_cells
from scfm.demo.clock import Clock
from scfm.demo.folder import FORMAT, REPORT
from scfm.demo.pictures import draw_cells
from scfm.demo.scores import embedding_report
from scfm.demo.verdict import zero_shot_verdict
from scfm.evaluate import Report, stratified_split
from scfm.models.shipped import SHIPPED

__all__ = ["BASIS", "PRODUCTS", "produce"]

TEST_FRACTION = 0.2
BASIS = "X_scfm_mini"
PRODUCTS: tuple[str, ...] = (
    "report.md",
    "cells.h5ad",
    "umap.png",
    "umap_pca.png",
    REPORT,  # last: its presence says that the rest is there
)
FITTED = (
    f"{SHIPPED} and random weights were fitted to none of these cells, principal components to the train cells; "
    "no method saw a label"
)


def produce(work: Path, seed: int, quick: bool, clock: Clock) -> tuple[Report, str]:
    """Make PRODUCTS in ``work``; the table of the embedding and the verdict."""
    from scfm.models.load import load
    from scfm.models.scgpt.model import Scgpt
    from scfm.models.shipped import with_own_tokenizer

    with clock.stage("reading the cells"):
        cells = demo_cells()
        labels = cells.obs["cell_type"].astype(str).to_numpy()
        train, test = stratified_split(labels, test_fraction=TEST_FRACTION, seed=seed)
    with clock.stage("embedding"):
        model = load(SHIPPED)
        assert isinstance(model, Scgpt)
        untrained = with_own_tokenizer(Scgpt.from_config(model.config, model.vocab, seed=seed))
        untrained.set_compute_dtype(model.compute_dtype)
        ours, random = model.embed(cells), untrained.embed(cells)
        baselines = demo_baselines(cells, train)
    with clock.stage("scoring"):
        report = embedding_report(
            ours, random, baselines, labels, train, test, seed=seed, name=SHIPPED, fitted=FITTED
        )
    with clock.stage("drawing"):
        in_train = np.zeros(cells.n_obs, dtype=bool)
        in_train[train] = True
        cells.obs["split"] = np.where(in_train, "train", "test")
        cells.obsm[BASIS] = ours
        cells.obsm["X_pca"] = baselines["PCA-50"]
        cells.uns["demo"]["seed"] = seed
        cells.write_h5ad(work / "cells.h5ad")
        draw_cells(cells, work, {BASIS: f"{SHIPPED}, which never saw these cells"}, quick=quick)
    verdict = zero_shot_verdict(report, num_parameters=model.num_parameters())
    _write_reports(work, report, verdict, dict(cells.uns["demo"]), clock.seconds)
    return report, verdict


def _write_reports(
    work: Path, report: Report, verdict: str, cells: dict[str, Any], seconds: dict[str, float]
) -> None:
    content = {
        "format": FORMAT,
        "cells": cells,
        "model": SHIPPED,
        "embedding": report.to_dict(),
        "verdict": verdict,
        "seconds": seconds,
    }
    (work / REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (work / "report.md").write_text(
        f"# scfm demo\n\n{verdict}\n\n{report.to_markdown()}\n"
        "![UMAP of the model's embedding](umap.png)\n![UMAP of PCA](umap_pca.png)\n",
        encoding="utf-8",
    )
