"""What scBERT's original does: its modules rebuilt from torch.nn, a cell at a time as in predict.py; its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from attention_peers import performer

Array = np.ndarray[Any, np.dtype[Any]]


class ScbertOriginal(torch.nn.Module):
    """PerformerLM up to its encodings, on dense bins: (C, L) -> (C, L, hidden_size)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model  # its weights; nothing of its forward

    def forward(self, bins: torch.Tensor) -> torch.Tensor:
        model, linear = self.model, torch.nn.functional.linear
        hidden = model.token_emb(bins)
        hidden += model.pos_emb
        for block in model.performer.layers:
            attention, ffn = block.attention, block.ffn
            normed = block.attention_norm(hidden)
            q, k, v = (
                linear(normed, part.weight).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                for part in (attention.to_q, attention.to_k, attention.to_v)
            )
            attended = performer(q, k, v, attention.projection_matrix).transpose(1, 2).flatten(2)
            hidden = hidden + linear(attended, attention.to_out.weight, attention.to_out.bias)
            inner = torch.nn.functional.gelu(linear(block.ffn_norm(hidden), ffn.w1.weight, ffn.w1.bias))
            hidden = hidden + linear(inner, ffn.w2.weight, ffn.w2.bias)
        encodings: torch.Tensor = model.norm(hidden)
        return encodings


def scbert_bins(cells: sp.csr_matrix) -> Array:
    """preprocess.py and SCDataset on cells that are aligned already: dense bins with the slot, uint8 (C, L)."""
    dense = np.asarray(cells.todense(), dtype=np.float32)
    dense /= dense.sum(axis=1, keepdims=True) / 1e4
    np.log1p(dense, out=dense)
    dense /= np.log(2, dtype=np.float32)
    np.minimum(dense, 5, out=dense)
    return np.pad(dense.astype(np.uint8), ((0, 0), (0, 1)))
