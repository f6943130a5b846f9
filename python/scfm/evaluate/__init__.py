"""Scores and the baselines they are shown beside. Arrays in, numbers out: no model, no AnnData, no torch."""

from __future__ import annotations

from scfm.evaluate.bootstrap import Interval, paired_bootstrap
from scfm.evaluate.clustering import (
    ClusterScore,
    adjusted_rand_index,
    cluster_score,
    normalized_mutual_information,
)
from scfm.evaluate.expression_baselines import (
    Pca,
    expression_baselines,
    fit_pca,
    highly_variable_genes,
    log1p_cp10k,
)
from scfm.evaluate.linear_probe import LinearScore, linear_label_score
from scfm.evaluate.masked_gene_baselines import MaskedScore, masked_gene_baselines
from scfm.evaluate.neighbors import KnnScore, knn_label_score, macro_f1, nearest_neighbors
from scfm.evaluate.report import Metric, Report, Row, verdict
from scfm.evaluate.split import stratified_split

__all__ = [
    "ClusterScore",
    "Interval",
    "KnnScore",
    "LinearScore",
    "MaskedScore",
    "Metric",
    "Pca",
    "Report",
    "Row",
    "adjusted_rand_index",
    "cluster_score",
    "expression_baselines",
    "fit_pca",
    "highly_variable_genes",
    "knn_label_score",
    "linear_label_score",
    "log1p_cp10k",
    "macro_f1",
    "masked_gene_baselines",
    "nearest_neighbors",
    "normalized_mutual_information",
    "paired_bootstrap",
    "stratified_split",
    "verdict",
]
