"""How well cell types are found in the embedding of a labelled set: loss and embedding part ways, so both are watched.

Two scores, the vote of the 15 nearest cells and a linear classifier, on a fixed split of the set; beside them PCA's,
fitted on the set itself without its labels, and those of the run's model before its first step, which tell how much of
a score is the tokens' (or that of the vectors that genes started from) and not the training's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scfm.data.source import CellSource
from scfm.errors import ConfigError
from scfm.evaluate import (
    Interval,
    Metric,
    Report,
    Row,
    expression_baselines,
    knn_label_score,
    linear_label_score,
    paired_bootstrap,
    stratified_split,
)
from scfm.evaluate.split import keyed_generator
from scfm.models.base import FoundationModel
from scfm.train.corpus.cells import cells_where, opened

__all__ = ["EmbeddingProbe"]

OURS, PCA, UNTRAINED = "ours", "PCA-50", "before training"
NUM_NEIGHBORS = 15
_KNN, _LINEAR = Metric("kNN accuracy"), Metric("linear accuracy")
_SPLIT = "cells at random within each label"


class EmbeddingProbe:
    """One labelled set. Called with a model, it gives a Report.

    table: {path, label, layer, keep}; name: what the set is called; folder: where relative paths start; most_cells:
    chosen by (seed, cell) where there are more. Raises ConfigError naming the table's key.
    """

    def __init__(
        self,
        table: Mapping[str, Any],
        *,
        name: str,
        where: str,
        layer: str | None,
        folder: Any,
        most_cells: int,
        seed: int,
    ) -> None:
        self.name = name
        self.seed = seed
        source = opened(table["path"], layer=table.get("layer", layer), folder=folder)
        if table.get("keep"):
            source = source.select(cells_where(source, table["keep"], every=True, where=f"{where}.keep"))
        column = source.obs_column(table["label"])
        if column is None:
            raise ConfigError(
                f"there is no column {table['label']!r}; there are: {', '.join(source.obs_column_names) or 'none'}",
                path=source.name,
                where=f"{where}.label",
            )
        labels = column.astype(object).to_numpy()
        labelled = np.flatnonzero(column.notna().to_numpy())
        if len(labelled) > most_cells:
            labelled = np.sort(keyed_generator(seed, "probe").permutation(labelled)[:most_cells])
        self.source = source.select(labelled)
        self.labels: NDArray[np.str_] = labels[labelled].astype(str)
        if len(np.unique(self.labels)) < 2:
            raise ConfigError(
                f"{len(labelled):,} cells with {len(np.unique(self.labels))} label; expected two and more",
                path=source.name,
                where=f"{where}.label",
            )
        self._others: dict[str, NDArray[np.float32]] = {}

    def __call__(self, model: FoundationModel, untrained: Callable[[], FoundationModel]) -> Report:
        """untrained: gives the model as it was before the first step; called the first time only."""
        if not self._others:
            self._others = {PCA: _pca(self.source), UNTRAINED: _embedded(untrained(), self.source)}
        embeddings = {OURS: _embedded(model, self.source), **self._others}
        # Cells without any known gene have no embedding in any of the models; PCA leaves them out too.
        known = np.logical_and.reduce([np.isfinite(points).all(axis=1) for points in embeddings.values()])
        labels = self.labels[known]
        train, test = stratified_split(labels, seed=self.seed)
        num_neighbors = min(NUM_NEIGHBORS, len(train))
        values, correct = {}, {}
        for name, points in embeddings.items():
            knn = knn_label_score(points[known], labels, train, test, k=num_neighbors)
            linear = linear_label_score(points[known], labels, train, test)
            values[name] = {_KNN.name: knn.accuracy, _LINEAR.name: linear.accuracy}
            correct[name] = {_KNN.name: knn.correct, _LINEAR.name: linear.correct}
        rows = [
            Row(OURS, "ours", values[OURS]),
            Row(PCA, "baseline", values[PCA], note="fitted on this set"),
            Row(UNTRAINED, "control", values[UNTRAINED]),
        ]
        gains: dict[tuple[str, str], Interval] = {
            (other, metric): paired_bootstrap(
                correct[OURS][metric], correct[other][metric], num_resamples=500, seed=self.seed
            )
            for other in (PCA, UNTRAINED)
            for metric in (_KNN.name, _LINEAR.name)
        }
        return Report(
            title=f"Labels in the cell embedding: {self.name}",
            metrics=(_KNN, _LINEAR),
            rows=tuple(rows),
            split=_SPLIT,
            num_train=len(train),
            num_test=len(test),
            seed=self.seed,
            gains=gains,
            notes=(f"kNN: {num_neighbors} nearest by cosine; linear: logistic regression",),
        )

    def metrics(self, report: Report) -> dict[str, float]:
        """The report's numbers by the names that a log has for them."""
        found = {}
        for row in report.rows:
            place = f"probe/{self.name}/" + ("" if row.role == "ours" else f"{_slug(row.name)}/")
            found[place + "knn"] = row.values[_KNN.name]
            found[place + "linear"] = row.values[_LINEAR.name]
        return found


@torch.no_grad()
def _embedded(model: FoundationModel, source: CellSource) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model.embed(source, on_bad_cell="nan")
    return found


def _pca(source: CellSource) -> NDArray[np.float32]:
    indptr, indices, data = [np.zeros(1, dtype=np.int64)], [], []
    for block in source.blocks():
        indptr.append(block.indptr[1:] + indptr[-1][-1])
        indices.append(block.indices)
        data.append(block.data)
    every = np.arange(len(source))
    found = expression_baselines(
        np.concatenate(indptr), np.concatenate(indices), np.concatenate(data), source.num_genes, every
    )
    return found[PCA]


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")
