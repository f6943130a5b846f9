"""``scfm.tl.mapping_report``: was it worth a model? Mapped labels beside those of the same vote over plain expression.

The cells' labels are known here and compared with what map_to_reference gave them; beside it stand the commonest label
and the same number of neighbours over 50 principal components and over the highly variable genes, both of log counts,
chosen on the reference's cells alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.errors import GeneMappingError, InvalidArgumentError
from scfm.evaluate import (
    Metric,
    Report,
    Row,
    expression_baselines,
    knn_label_score,
    macro_f1,
    paired_bootstrap,
)
from scfm.tasks.map_to_reference import UNASSIGNED

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["mapping_report"]

ACCURACY = Metric("accuracy", "higher")
MACRO_F1 = Metric("macro-F1", "higher")
_DISTANCES: dict[str, Literal["euclidean", "cosine"]] = {"l2": "euclidean", "cosine": "cosine"}


def mapping_report(
    adata: AnnData,
    reference: AnnData,
    *,
    labels: str,
    truth: str | None = None,
    key: str | None = None,
    counts: Any = None,
    reference_counts: Any = None,
    seed: int = 0,
) -> Report:
    """Accuracy and macro-F1 of ``obs[key]`` (default "mapped_<labels>") against ``obs[truth]`` (default ``labels``).

    The baselines need raw counts of both over common gene names: ``counts`` and ``reference_counts``, whatever
    scfm.read accepts, in the same order of cells; by default those of the AnnData. Cells of ``adata`` without a true
    label, and cells of the reference without one, take no part. "Unassigned" counts as wrong. Raises
    InvalidArgumentError, NotCountsError, GeneMappingError where no gene is common.
    """
    key = key or f"mapped_{labels}"
    truth = truth or labels
    settings = _settings(adata, key)
    ours = _column(adata, key, "adata.obs")
    theirs, known = _column(adata, truth, "adata.obs"), _column(reference, labels, "reference.obs")
    train, test = np.flatnonzero(known.notna()), np.flatnonzero(theirs.notna())
    if not train.size or not test.size:
        raise InvalidArgumentError(
            f"{train.size} labelled reference cells, {test.size} labelled cells", where="labels"
        )
    train_labels = known.to_numpy(dtype=object)[train].astype(str)
    test_labels = theirs.to_numpy(dtype=object)[test].astype(str)
    predicted = ours.to_numpy(dtype=object)[test].astype(str)
    correct = predicted == test_labels
    baselines = _baseline_embeddings(
        adata if counts is None else counts,
        reference if reference_counts is None else reference_counts,
        train,
        test,
    )
    all_labels = np.concatenate([train_labels, test_labels])
    rows_of = (np.arange(train.size), np.arange(train.size, train.size + test.size))
    scores = {
        f"kNN on {name}": knn_label_score(
            points, all_labels, *rows_of, k=settings["num_neighbors"], metric=_DISTANCES[settings["metric"]]
        )
        for name, points in baselines.items()
    }
    name = f"mapped by {settings['use_rep']}"
    rows = [Row(name, "ours", _values(test_labels, predicted))]
    rows += [
        Row(baseline, "baseline", {ACCURACY.name: score.accuracy, MACRO_F1.name: score.macro_f1})
        for baseline, score in scores.items()
    ]
    common = Counter(train_labels.tolist()).most_common(1)[0][0]
    rows.append(Row("commonest label", "control", _values(test_labels, np.full(test.size, common))))
    return Report(
        title=f"Mapping {labels} to the reference",
        metrics=(ACCURACY, MACRO_F1),
        rows=tuple(rows),
        split="reference cells vote, the mapped cells are scored",
        num_train=train.size,
        num_test=test.size,
        seed=seed,
        gains={
            (baseline, ACCURACY.name): paired_bootstrap(correct, score.correct, seed=seed)
            for baseline, score in scores.items()
        },
        notes=_notes(settings, test_labels, train_labels, predicted),
    )


def _settings(adata: AnnData, key: str) -> Mapping[str, Any]:
    kept = adata.uns.get("scfm", {})
    settings = kept.get(key) if isinstance(kept, Mapping) else None
    if not isinstance(settings, Mapping) or settings.get("task") != "map_to_reference":
        raise InvalidArgumentError(
            f"adata.uns['scfm'] says nothing of a mapping {key!r}",
            where="key",
            hint="Run scfm.tl.map_to_reference first.",
        )
    return settings


def _column(adata: AnnData, name: str, where: str) -> Any:
    if name not in adata.obs:
        raise InvalidArgumentError(
            f"no column {name!r}; there are {list(adata.obs.columns)[:8]}", where=where
        )
    return adata.obs[name]


def _values(truth: NDArray[Any], predicted: NDArray[Any]) -> dict[str, float]:
    codes = np.unique(np.concatenate([truth, predicted]), return_inverse=True)[1].astype(np.int64)
    return {
        ACCURACY.name: float((truth == predicted).mean()),
        MACRO_F1.name: macro_f1(codes[: len(truth)], codes[len(truth) :]),
    }


def _baseline_embeddings(
    counts: Any, reference_counts: Any, train: NDArray[np.int64], test: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """PCA-50 and highly variable genes of the reference's labelled cells, then the scored ones."""
    there, here = read(reference_counts), read(counts)
    common = there.genes.index.intersection(here.genes.index).unique()
    if not len(common):
        raise GeneMappingError(
            f"none of the {there.num_genes:,} gene names of the reference is among the {here.num_genes:,} of the cells",
            where="var_names",
            hint="Give both the same kind of names: Ensembl ids or symbols.",
        )
    parts = [_counts(there, common, train), _counts(here, common, test)]
    joined = sparse.vstack([part for part, _ in parts], format="csr")
    return expression_baselines(
        joined.indptr,
        joined.indices,
        joined.data,
        len(common),
        np.arange(train.size),
        library_size=np.concatenate([size for _, size in parts]),
    )


def _counts(
    source: CellSource, genes: Any, rows: NDArray[np.int64]
) -> tuple[sparse.csr_matrix, NDArray[np.float64]]:
    """Counts of these genes (columns of one name added up) and the counts of all genes, for some cells."""
    place = {gene: number for number, gene in enumerate(genes)}
    slot = np.array([place.get(gene, -1) for gene in source.genes.index])
    columns = np.flatnonzero(slot >= 0)
    gather = sparse.csr_matrix(
        (np.ones(columns.size), (columns, slot[columns])), shape=(source.num_genes, len(genes))
    )
    blocks = [
        sparse.csr_matrix(
            (block.data, block.indices, block.indptr), shape=(block.num_cells, source.num_genes)
        )
        for block in source.blocks()
    ]
    everything = sparse.vstack(blocks, format="csr")[rows].astype(np.float64)
    return sparse.csr_matrix(everything @ gather), np.asarray(everything.sum(axis=1)).ravel()


def _notes(
    settings: Mapping[str, Any], truth: NDArray[Any], known: NDArray[Any], predicted: NDArray[Any]
) -> tuple[str, ...]:
    unseen = ~np.isin(truth, known)
    unassigned = predicted == UNASSIGNED
    return (
        f"{settings['num_neighbors']} neighbours, {settings['metric']}, {settings['weights']} votes; "
        "the baselines vote uniformly",
        f"{int(unseen.sum()):,} scored cells have a label that the reference lacks: nobody can be right about them",
        f"{int(unassigned.sum()):,} scored cells are Unassigned, which counts as wrong; of those the reference knows, "
        f"{_share(predicted, truth, ~unassigned & ~unseen)} of the assigned ones are right",
    )


def _share(predicted: NDArray[Any], truth: NDArray[Any], chosen: NDArray[np.bool_]) -> str:
    return f"{float((predicted == truth)[chosen].mean()):.3f}" if chosen.any() else "none"
