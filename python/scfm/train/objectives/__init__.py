"""The objectives that models are trained with, by family.

Geneformer's masked genes: geneformer.py. scGPT's expression, cells and batches: scgpt.py. scBERT's bins and cell
types: scbert.py. scFoundation's hidden genes at another read depth: scfoundation.py. What they add up is in
losses.py: functions of tensors alone. *_pretraining.py make of them what the training loop asks for (protocol.py).
"""

from __future__ import annotations

from scfm.train.objectives.geneformer import (
    MaskedCells,
    MaskedEvaluation,
    evaluate_masked,
    mask_genes,
    masked_gene_loss,
)
from scfm.train.objectives.scfoundation import HiddenGenes, hide_genes, read_depth_loss
from scfm.train.objectives.scgpt import (
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
