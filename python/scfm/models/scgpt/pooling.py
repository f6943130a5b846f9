"""From the hidden states of a cell's tokens to scGPT's cell embedding.

    "cls": the first token's;  "avg-pool": the mean over all tokens, <cls> among them;  "mean": over the genes alone
    "w-pool": sum of hidden * value, made one long

Each cell is summed on its own, whatever else is packed with it. Padding counts only in a reading of the original's
padded batches (padding.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.models.pooling import mean_of_genes
from scfm.models.scgpt.inputs import Inputs
from scfm.models.scgpt.padding import Padding

POOLINGS = ("cls", "mean", "avg-pool", "w-pool")


def pool_cells(hidden: Tensor, inputs: Inputs, style: str, padding: Padding | None = None) -> Tensor:
    """hidden: float32 (T, hidden_size) -> (C, hidden_size)."""
    if style == "cls" or not inputs.num_cells:  # segment_reduce takes no empty batch
        return hidden.index_select(0, inputs.first_rows)
    if style == "mean":
        return mean_of_genes(hidden, inputs.cu_seqlens, leading=1)
    lengths = inputs.cu_seqlens.diff().to(torch.int64)
    if style == "w-pool":
        assert inputs.values is not None
        hidden = hidden * inputs.values.unsqueeze(1)
    sums = torch.segment_reduce(hidden, "sum", lengths=lengths, axis=0, initial=0.0)
    if padding is not None:
        times = padding.counts * (padding.value if style == "w-pool" else 1.0)
        sums = sums + times.unsqueeze(1) * padding.hidden
        lengths = lengths + padding.counts
    return F.normalize(sums, dim=1) if style == "w-pool" else sums / lengths.unsqueeze(1)


def unit_rows(cells: Tensor) -> Tensor:
    """Rows of length 1, as the original's embed_data gives them."""
    return cells / cells.square().sum(dim=1, keepdim=True).sqrt()
