"""The peers' attention, in torch alone: what benches on bare machines time beside ours.

torch's own scaled_dot_product_attention on padded batches, and Performer's FAVOR+ rewritten step by step from its
PyTorch code, feature maps of all tokens in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(C, L, H, D) -> the same. mask: bool, broadcast to (C, H, L, L); True where a query sees a key."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def performer(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """(C, H, L, D) -> the same. projection: (features, D)."""
    scale, ratio, eps = q.shape[-1] ** -0.25, projection.shape[0] ** -0.5, 1e-4
    weights = projection.expand(*q.shape[:2], *projection.shape)

    def features(x: Tensor, is_query: bool) -> Tensor:
        projected = torch.einsum("...id,...jd->...ij", scale * x, weights)
        half_norm = x.square().sum(-1, keepdim=True) / 2.0 * scale**2
        # The released code takes the keys' maximum over the whole tensor.
        top = torch.amax(projected, dim=-1, keepdim=True) if is_query else torch.amax(projected)
        return ratio * (torch.exp(projected - half_norm - top) + eps)

    q_features, k_features = features(q, True), features(k, False)
    inverse = 1.0 / torch.einsum("...nd,...d->...n", q_features, k_features.sum(dim=-2))
    context = torch.einsum("...nd,...ne->...de", k_features, v)
    return torch.einsum("...de,...nd,...n->...ne", context, q_features, inverse)
