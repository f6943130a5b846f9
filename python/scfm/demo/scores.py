"""The demo's two tables: masked-gene prediction and cell embedding, each beside its baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.evaluate import (
    ClusterScore,
    Interval,
    KnnScore,
    Metric,
    Report,
    Row,
    cluster_score,
    knn_label_score,
    macro_f1,
    masked_gene_baselines,
    paired_bootstrap,
)

if TYPE_CHECKING:
    from scfm.data.packed import PackedCells
    from scfm.models.geneformer.model import Geneformer
    from scfm.train.objectives import MaskedEvaluation

__all__ = ["OURS", "RANDOM", "embedding_report", "masked_gene_report"]

OURS = "scfm, trained here"
RANDOM = "random weights"
NUM_NEIGHBORS = 15
SPLIT = "cells at random within each label (one donor: optimistic about new data)"

HIDDEN_LOSS = Metric("loss where hidden", "lower", "nats")
ALL_LOSS = Metric("loss, all targets", "lower", "nats")
ACCURACY = Metric("accuracy", "higher")
KNN_ACCURACY = Metric("kNN accuracy", "higher")
KNN_F1 = Metric("kNN macro-F1", "higher")
NMI = Metric("NMI", "higher")
ARI = Metric("ARI", "higher")


def masked_gene_report(
    *,
    model: Geneformer,
    train_cells: PackedCells,
    test_cells: PackedCells,
    evaluations: Mapping[str, MaskedEvaluation],
    seed: int,
) -> Report:
    """Held-out masked-gene loss of the model ("ours"), the untrained one ("random") and the counted
    baselines.

    All are scored on the very same positions. "where hidden": positions that show <mask>; "all targets"
    adds those that show a random or the true token, which is what training minimises.
    """
    ours, random = evaluations["ours"], evaluations["random"]
    vocab = model.vocab.token
    mask_token = vocab["<mask>"]
    baselines = masked_gene_baselines(
        train_cells.token_ids.numpy(),
        train_cells.cu_seqlens.numpy(),
        ours.masked_token_ids,
        test_cells.cu_seqlens.numpy(),
        ours.masked_positions,
        ours.targets,
        vocab_size=model.config.vocab_size,
        num_special=sum(name.startswith("<") for name in vocab),
        mask_token=mask_token,
        seed=seed,
    )
    hidden = ours.masked_token_ids[ours.masked_positions] == mask_token
    losses = {name: score.losses for name, score in baselines.items()} | {RANDOM: random.losses}
    accuracy = {name: score.accuracy for name, score in baselines.items()} | {RANDOM: random.accuracy}
    cell = np.searchsorted(test_cells.cu_seqlens.numpy(), ours.masked_positions, side="right")
    gains: dict[tuple[str, str], Interval] = {}
    for name, loss in losses.items():
        gains[name, HIDDEN_LOSS.name] = paired_bootstrap(
            loss[hidden], ours.losses[hidden], groups=cell[hidden], seed=seed
        )
        gains[name, ALL_LOSS.name] = paired_bootstrap(loss, ours.losses, groups=cell, seed=seed)
    rows = [Row(OURS, "ours", _masked_values(ours.losses, hidden, ours.accuracy))]
    rows += [
        Row(name, "baseline", _masked_values(losses[name], hidden, accuracy[name])) for name in baselines
    ]
    rows.append(Row(RANDOM, "control", _masked_values(random.losses, hidden, random.accuracy)))
    bigram = baselines["neighbour-bigram"].settings
    return Report(
        title="Masked-gene prediction on held-out cells",
        metrics=(HIDDEN_LOSS, ALL_LOSS, ACCURACY),
        rows=tuple(rows),
        split=SPLIT,
        num_train=train_cells.num_cells,
        num_test=test_cells.num_cells,
        seed=seed,
        gains=gains,
        notes=(
            f"{ours.num_masked:,} targets, {int(hidden.sum()):,} of them shown as <mask>, the same for all",
            "the baselines are told which positions were selected, the model is not",
            f"neighbour-bigram: {bigram}, chosen on training cells; "
            f"rank-conditional: {baselines['rank-conditional'].settings}",
        ),
    )


def embedding_report(
    ours: NDArray[np.float32],
    random: NDArray[np.float32],
    baselines: Mapping[str, NDArray[np.float32]],
    labels: NDArray[np.str_],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    *,
    seed: int,
    name: str = OURS,
    fitted: str = "no method saw a label; genes, components and weights come from training cells only",
) -> Report:
    """kNN label accuracy (train cells vote on test cells) and k-means NMI and ARI of the test cells.

    ours, random, baselines: (cells, dimensions) each, fitted without labels and without test cells. name: of ours;
    fitted: a note on what was fitted to which cells.
    """
    embeddings = {name: ours, **baselines, RANDOM: random}
    knn = {
        method: knn_label_score(points, labels, train, test, k=NUM_NEIGHBORS)
        for method, points in embeddings.items()
    }
    clusters = {
        method: cluster_score(points[test], labels[test], seed=seed) for method, points in embeddings.items()
    }
    rows = [Row(name, "ours", _embedding_values(knn[name], clusters[name]))]
    rows += [Row(other, "baseline", _embedding_values(knn[other], clusters[other])) for other in baselines]
    rows.append(Row(RANDOM, "control", _embedding_values(knn[RANDOM], clusters[RANDOM])))
    rows.append(_majority_row(labels[train], labels[test]))
    return Report(
        title="Cell embedding: do cells of one type lie together?",
        metrics=(KNN_ACCURACY, KNN_F1, NMI, ARI),
        rows=tuple(rows),
        split=SPLIT,
        num_train=train.size,
        num_test=test.size,
        seed=seed,
        gains={
            (other, KNN_ACCURACY.name): paired_bootstrap(knn[name].correct, knn[other].correct, seed=seed)
            for other in (*baselines, RANDOM)
        },
        notes=(
            f"kNN: {NUM_NEIGHBORS} nearest training cells by cosine; NMI and ARI: k-means of the test cells, "
            f"k = {clusters[name].num_clusters} labels",
            fitted,
        ),
    )


def _masked_values(
    losses: NDArray[np.float64], hidden: NDArray[np.bool_], accuracy: float
) -> dict[str, float]:
    return {
        HIDDEN_LOSS.name: float(losses[hidden].mean()),
        ALL_LOSS.name: float(losses.mean()),
        ACCURACY.name: accuracy,
    }


def _embedding_values(knn: KnnScore, clusters: ClusterScore) -> dict[str, float]:
    return {
        KNN_ACCURACY.name: knn.accuracy,
        KNN_F1.name: knn.macro_f1,
        NMI.name: clusters.nmi,
        ARI.name: clusters.ari,
    }


def _majority_row(train_labels: NDArray[np.str_], test_labels: NDArray[np.str_]) -> Row:
    """Always the commonest training label: the accuracy that needs no data."""
    common = Counter(train_labels.tolist()).most_common(1)[0][0]
    names, codes = np.unique(np.append(test_labels, common), return_inverse=True)
    truth, guess = codes[:-1].astype(np.int64), np.full(test_labels.size, codes[-1], dtype=np.int64)
    values = {KNN_ACCURACY.name: float((truth == guess).mean()), KNN_F1.name: macro_f1(truth, guess)}
    return Row("commonest label", "control", values, note=f"always {names[codes[-1]]}")
