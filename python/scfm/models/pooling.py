"""From the hidden states of a cell's tokens to one vector a cell."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_genes(hidden: Tensor, cu_seqlens: Tensor, *, leading: int = 0, trailing: int = 0) -> Tensor:
    """Mean over each cell's gene tokens, float32 (C, hidden_size).

    hidden: (T, hidden_size). ``leading`` and ``trailing`` special tokens of every cell are left out. A cell
    with no gene token gives a row of NaN. Each cell is summed on its own, whatever else is packed with it.
    """
    lengths = cu_seqlens.diff().to(torch.int64)
    genes = (lengths - leading - trailing).clamp(min=0)
    parts = torch.stack([lengths.clamp(max=leading), genes, lengths - genes - lengths.clamp(max=leading)], 1)
    sums = torch.segment_reduce(hidden.float(), "sum", lengths=parts.flatten(), axis=0, initial=0.0)
    return sums[1::3] / genes.unsqueeze(1)
