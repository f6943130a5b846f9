"""The objectives that models are trained with, by family.

Geneformer's masked genes: geneformer_objectives.py. scGPT's expression, cells and batches: scgpt_objectives.py.
scFoundation's hidden genes at another read depth: scfoundation_objectives.py. What
they add up is in losses.py: functions of tensors alone.
"""

from __future__ import annotations

from scfm.train.geneformer_objectives import (
    MaskedCells,
    MaskedEvaluation,
    evaluate_masked,
    mask_genes,
    masked_gene_loss,
)
from scfm.train.scfoundation_objectives import HiddenGenes, hide_genes, read_depth_loss
from scfm.train.scgpt_objectives import (
    ExpressionTargets,
    FineTuningObjective,
    GenerativeObjective,
    GenerativeTargets,
    ObjectiveLoss,
    hide_expression,
    split_expression,
)

__all__ = [
    "ExpressionTargets",
    "FineTuningObjective",
    "GenerativeObjective",
    "GenerativeTargets",
    "HiddenGenes",
    "MaskedCells",
    "MaskedEvaluation",
    "ObjectiveLoss",
    "evaluate_masked",
    "hide_expression",
    "hide_genes",
    "mask_genes",
    "masked_gene_loss",
    "read_depth_loss",
    "split_expression",
]
