"""Token-budget batches: cells of similar length together, never more tokens at once than the budget."""

from __future__ import annotations

import torch
from torch import Tensor


def token_budget_batches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Positions of cells, batch by batch, longest cells first.

    lengths: int (C,). A batch holds at most ``token_budget`` tokens, or one cell if that alone is longer.
    Every cell appears exactly once; cells of equal length keep their order.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    batches: list[Tensor] = []
    start, tokens = 0, 0
    for position, length in enumerate(lengths[order].tolist()):
        if position > start and tokens + length > token_budget:
            batches.append(order[start:position])
            start, tokens = position, 0
        tokens += length
    if start < len(order):
        batches.append(order[start:])
    return batches
