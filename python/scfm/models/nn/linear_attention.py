"""The linear attentions that Performer's code offers beside FAVOR+, on packed cells.

    out_i = (q'_i . sum_j k'_j v_j^T) / (q'_i . sum_j k'_j)

    generalized:  x' = relu(c x W^T) + 1e-3,  c = D^(-1/4)
    unprojected:  q' = softmax of q over its dimensions,  k' = softmax of k over the cell's tokens

No released model was trained with them, so they are written in torch, a cell at a time. A cell's result depends on
the cell alone. Source: generalized_kernel, linear_attention and FastAttention of performer_pytorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GENERALIZED_EPS = 1e-3

_Features = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def generalized_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, cu_seqlens: Tensor) -> Tensor:
    """q, k, v: (T, H, D); projection: (F, D); cu_seqlens: int32 (C + 1,). Returns (T, H, D)."""
    weights = projection.to(q.dtype).T * q.shape[-1] ** -0.25

    def features(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        q_features, k_features = (F.relu(x @ weights) + GENERALIZED_EPS for x in (queries, keys))
        return q_features, k_features

    return _by_cell(q, k, v, cu_seqlens, features)


def unprojected_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """q, k, v: (T, H, D); cu_seqlens: int32 (C + 1,). Returns (T, H, D)."""
    return _by_cell(
        q, k, v, cu_seqlens, lambda queries, keys: (queries.softmax(dim=-1), keys.softmax(dim=-2))
    )


def _by_cell(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, features: _Features) -> Tensor:
    out = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        queries, keys, values = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        q_features, k_features = features(queries, keys)
        norm = q_features @ k_features.sum(dim=1).unsqueeze(-1)
        out.append((q_features @ (k_features.transpose(1, 2) @ values) / norm).transpose(0, 1))
    return torch.cat(out)
