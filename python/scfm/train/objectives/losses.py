"""Losses of predicted expression and of cell embeddings, as functions of packed tensors: what objectives add up.

Functions in the plural give one number for each scored token, cell or pair of cells, for objectives that add them up
over many microbatches. The others are means, over the scored tokens of all cells or over the cells (or pairs of cells)
of the batch, as the authors took it over a padded batch: padding was never scored, so nothing is lost by not having
any. A mean over no token is 0. All is computed in float32, whatever precision the products of the model had.
Source: the released scGPT code (loss.py, model.py); Cui et al. 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CONTRAST_TEMPERATURE",
    "cell_similarity_loss",
    "cell_similarity_losses",
    "contrastive_cell_loss",
    "contrastive_cell_losses",
    "expressed_loss",
    "expressed_losses",
    "masked_mse",
    "masked_relative_error",
    "squared_errors",
]

CONTRAST_TEMPERATURE = 0.5
_RELATIVE_FLOOR = 1e-6


def masked_mse(prediction: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Mean squared error over the scored tokens. prediction, target: float32 (T,); scored: bool (T,)."""
    return _mean(squared_errors(prediction[scored], target[scored]))


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """(prediction - target)^2, float32 (M,)."""
    return (prediction.float() - target).square()


def masked_relative_error(prediction: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Mean of |prediction - target| / (target + 1e-6) over the scored tokens: a figure to watch, not to train on.

    A target of 0 makes it huge, as in the original.
    """
    target = target[scored]
    return _mean((prediction[scored].float() - target).abs() / (target + _RELATIVE_FLOOR))


def expressed_loss(probability: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Mean of ``expressed_losses`` over the scored tokens. probability, target: float32 (T,); scored: bool (T,)."""
    return _mean(expressed_losses(probability[scored], target[scored]))


def expressed_losses(probability: Tensor, target: Tensor) -> Tensor:
    """Negative log likelihoods, in nats, that a gene is expressed (target > 0) or not, float32 (M,).

    probability: (M,), of being expressed, which the original calls "zero probability". With the squared error beside it
    this is the original's zero-inflated likelihood. A probability is kept one float32 epsilon away from 0 and 1, as
    torch's Bernoulli keeps it.
    """
    epsilon = torch.finfo(torch.float32).eps
    kept = probability.float().clamp(epsilon, 1.0 - epsilon)
    return -torch.where(target > 0, kept.log(), torch.log1p(-kept))


def cell_similarity_loss(cells: Tensor, threshold: float) -> Tensor:
    """Mean of ``cell_similarity_losses``. cells: float32 (C, hidden_size), two or more; one alone has no gradient."""
    return cell_similarity_losses(cells, threshold).mean()


def cell_similarity_losses(cells: Tensor, threshold: float) -> Tensor:
    """Elastic cell similarity: cells that are alike are drawn together, others pushed apart.

    1 - (cos - threshold)^2 of all ordered pairs, (C, C), a cell with itself counting as cos 0, as do all negative
    cosines. cells: float32 (C, hidden_size).
    """
    unit = F.normalize(cells.float(), dim=1)
    alone = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    cosine = F.relu((unit @ unit.T).masked_fill(alone, 0.0))
    return 1.0 - (cosine - threshold).square()


def contrastive_cell_loss(first: Tensor, second: Tensor) -> Tensor:
    """Mean of ``contrastive_cell_losses`` at the authors' temperature."""
    return contrastive_cell_losses(first, second).mean()


def contrastive_cell_losses(
    first: Tensor,
    second: Tensor,
    temperature: float = CONTRAST_TEMPERATURE,
    *,
    groups: Tensor | None = None,
) -> Tensor:
    """Contrastive cell embedding: of all cells of the second view, each cell must know itself.

    Cross-entropy, in nats, of cos / temperature, (C,). first, second: float32 (C, hidden_size), two views of the same
    cells: two draws of dropout, or two samples of their genes. Without any difference both are equal, and the loss says
    only how alike different cells are. groups: int64 (C,), where a cell need only be told from those of its own group.
    """
    cosine = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T
    logits = cosine / temperature
    if groups is not None:
        logits = logits.masked_fill(groups.unsqueeze(1) != groups, -torch.inf)
    own = torch.arange(len(first), device=first.device)
    return F.cross_entropy(logits, own, reduction="none")


def _mean(losses: Tensor) -> Tensor:
    return losses.sum() / max(losses.numel(), 1)
