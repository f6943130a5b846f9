"""Losses of predicted expression and of cell embeddings, as functions of packed tensors: what objectives add up.

Every loss is a mean, over the scored tokens of all cells or over the cells (or pairs of cells) of the batch, as the
authors took it over a padded batch: padding was never scored, so nothing is lost by not having any. A mean over no
token is 0. All is computed in float32, whatever precision the products of the model had.
Source: the released scGPT code (loss.py, model.py); Cui et al. 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "cell_similarity_loss",
    "contrastive_cell_loss",
    "expressed_loss",
    "masked_mse",
    "masked_relative_error",
]

CONTRAST_TEMPERATURE = 0.5
_RELATIVE_FLOOR = 1e-6


def masked_mse(prediction: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Mean squared error over the scored tokens. prediction, target: float32 (T,); scored: bool (T,)."""
    return _mean((prediction[scored].float() - target[scored]).square())


def masked_relative_error(prediction: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Mean of |prediction - target| / (target + 1e-6) over the scored tokens: a figure to watch, not to train on.

    A target of 0 makes it huge, as in the original.
    """
    target = target[scored]
    return _mean((prediction[scored].float() - target).abs() / (target + _RELATIVE_FLOOR))


def expressed_loss(probability: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Negative log likelihood, in nats, that a gene is expressed (target > 0) or not, over the scored tokens.

    probability: float32 (T,), of being expressed, which the original calls "zero probability". With the squared error
    beside it this is the original's zero-inflated likelihood. A probability is kept one float32 epsilon away from 0 and
    1, as torch's Bernoulli keeps it.
    """
    epsilon = torch.finfo(torch.float32).eps
    kept = probability[scored].float().clamp(epsilon, 1.0 - epsilon)
    return _mean(-torch.where(target[scored] > 0, kept.log(), torch.log1p(-kept)))


def cell_similarity_loss(cells: Tensor, threshold: float) -> Tensor:
    """Elastic cell similarity: cells that are alike are drawn together, others pushed apart.

    Mean of 1 - (cos - threshold)^2 over all ordered pairs, a cell with itself counting as cos 0, as do all negative
    cosines. cells: float32 (C, hidden_size), two or more; one alone has no gradient.
    """
    unit = F.normalize(cells.float(), dim=1)
    alone = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    cosine = F.relu((unit @ unit.T).masked_fill(alone, 0.0))
    return (1.0 - (cosine - threshold).square()).mean()


def contrastive_cell_loss(first: Tensor, second: Tensor) -> Tensor:
    """Contrastive cell embedding: of all cells of the second view, each cell must know itself.

    Cross-entropy, in nats, of cos / 0.5. first, second: float32 (C, hidden_size), the same cells under two draws of
    dropout. Without dropout both are equal, and the loss says only how alike different cells are.
    """
    cosine = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T
    return F.cross_entropy(cosine / CONTRAST_TEMPERATURE, torch.arange(len(first), device=first.device))


def _mean(losses: Tensor) -> Tensor:
    return losses.sum() / max(losses.numel(), 1)
