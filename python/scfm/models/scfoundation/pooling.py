"""From the states of a cell's tokens to one vector, as the authors read it.

    "all": [h of S, h of T, max over genes, mean over genes], 4 times as wide;   "max": max over all tokens

S and T are the last token and the one before, wherever they stand: a cell without its depth tokens reads others there,
as in the original (the tokenizer warns of such cells). Each cell is read on its own. Source: get_embedding.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = {"all": 4, "max": 1}
_NUM_LAST = 2


def pool_cells(hidden: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """hidden: (T, size) -> (C, size or 4 size); NaN for a cell without a gene before its last two tokens."""
    lengths = cu_seqlens.diff().to(torch.int64)
    if pooling == "max":
        most: Tensor = torch.segment_reduce(hidden, "max", lengths=lengths, axis=0, initial=float("-inf"))
        return most.masked_fill(lengths.unsqueeze(1) == 0, float("nan"))
    genes = (lengths - _NUM_LAST).clamp(min=0)
    parts = torch.stack([genes, lengths - genes], dim=1).flatten()
    sums, most = (
        torch.segment_reduce(hidden, how, lengths=parts, axis=0, initial=start)[0::2]
        for how, start in (("sum", 0.0), ("max", float("-inf")))
    )
    ends = cu_seqlens[1:].to(torch.int64)
    last, before = (hidden.index_select(0, (ends - back).clamp(min=0)) for back in (1, 2))
    pooled = torch.cat([last, before, most, sums / genes.unsqueeze(1)], dim=1)
    return pooled.masked_fill((genes == 0).unsqueeze(1), float("nan"))
