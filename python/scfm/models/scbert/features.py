"""FAVOR+'s feature maps of one head in plain torch, for what needs them apart: layer 0's constants, attention sums.

    a = (c x) W^T;   n(x) = |c x|^2 / 2;   c = D^(-1/4)
    q' = exp(a_q - n(q) - max_f a_q) + eps;   k' = exp(a_k - n(k) - M) + eps

The sums that attention needs are taken without eps, whose part is added where they are merged, so that sums relative to
one M can be rescaled to another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scfm.ops.favor_attention import EPS

__all__ = ["EPS", "key_exponentials", "logits", "query_features", "scaled_projection"]


def scaled_projection(projection: Tensor, dtype: torch.dtype) -> Tensor:
    """c W^T, (D, F), in the dtype that features are computed in."""
    scaled: Tensor = projection.to(dtype) * projection.shape[1] ** -0.25
    return scaled.T.contiguous()


def logits(x: Tensor, weights: Tensor) -> Tensor:
    """a: x (n, D), weights c W^T -> (n, F)."""
    product: Tensor = x.to(weights.dtype) @ weights
    return product


def key_exponentials(keys: Tensor, a: Tensor, maximum: Tensor | float) -> Tensor:
    """k' - eps: keys (n, D), a (n, F), maximum M."""
    return torch.exp(a - (_half_norm(keys, a.dtype) + maximum))


def query_features(queries: Tensor, weights: Tensor) -> Tensor:
    """q': queries (n, D), weights c W^T -> (n, F)."""
    a = logits(queries, weights)
    a -= a.amax(dim=1, keepdim=True) + _half_norm(queries, a.dtype)
    return a.exp_().add_(EPS)


def _half_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    halved: Tensor = x.to(dtype).square().sum(dim=1, keepdim=True) * (x.shape[1] ** -0.5 / 2)
    return halved
