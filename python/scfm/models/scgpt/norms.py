"""Batch normalisation of token inputs: one set of statistics, or one for each batch of cells (domain-specific).

The original normalises a padded batch that holds cells of one batch label only, with padding among the statistics.
Here every cell uses its own label's statistics, and padding has no part in anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_NORM_EPS = 6.1e-5
MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """Over channels of (T, hidden_size): statistics of the tokens in training, the running ones otherwise."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, hidden_size: int, *, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if affine else None
        self.register_buffer("running_mean", torch.zeros(hidden_size))
        self.register_buffer("running_var", torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=True,
                momentum=MOMENTUM,
                eps=BATCH_NORM_EPS,
            )
        # Written out, because every token must get the same bits in any company.
        x = (x - self.running_mean) * torch.rsqrt(self.running_var + BATCH_NORM_EPS)
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


class DomainBatchNorm(nn.Module):
    """One BatchNorm without weights for each batch label."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.bns = nn.ModuleList(BatchNorm(hidden_size, affine=False) for _ in range(num_labels))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """labels: int64 (T,), of each token's cell."""
        out = torch.empty_like(x)
        for label in torch.unique(labels).tolist():
            rows = (labels == label).nonzero().flatten()
            out = out.index_copy(0, rows, self.bns[label](x.index_select(0, rows)))
        return out
