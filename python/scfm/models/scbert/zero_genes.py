"""Layer 0 of a cell from its expressed genes alone; the genes with bin 0 are constants of the model.

Before layer 0 a gene with bin 0 has the same state in every cell, so its query, key and value are the same too, and so
is its part of attention's sums. With E the expressed positions and M the cell's largest a_k, exactly:

    sum_j k'_j v_j = e^(M0 - M) S0 + sum_E (k'_j v_j - k0'_j v0_j)  (+ the eps part, likewise)

S0 is the sum over all positions at bin 0 relative to its own maximum M0. Sums are kept in float64. Where taking the
expressed genes out of S0 would cancel its leading digits (M0 stems from one of them and M is far below), or where many
genes are expressed, the caller computes the layer in the ordinary way. Constants follow the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scfm.models.nn.performer import PerformerBlock
from scfm.models.nn.weight_state import weight_state
from scfm.models.scbert.features import (
    EPS,
    key_exponentials,
    logits,
    query_features,
    scaled_projection,
)

_ROWS = 1024
MOST_EXPRESSED = 0.25  # share of the positions, above which nothing is won
_MOST_FALL = 1.0  # of the maximum, in which a factor of e is lost to cancellation


@dataclass(frozen=True)
class _Sums:
    """Over positions, relative to M: products (H, F, D), weighted (H, F), plain (H, D); float64."""

    products: Tensor
    weighted: Tensor
    plain: Tensor

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.products + other.products, self.weighted + other.weighted, self.plain + other.plain)

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(self.products - other.products, self.weighted - other.weighted, self.plain - other.plain)

    def rescaled(self, factor: float) -> _Sums:
        return _Sums(self.products * factor, self.weighted * factor, self.plain)


@dataclass(frozen=True)
class _Constants:
    """hidden: (P, hidden_size), before layer 0 at bin 0; q: (P, H, D); key_max: (P,), the largest a_k of each."""

    hidden: Tensor
    q: Tensor
    key_max: Tensor
    maximum: float
    sums: _Sums


class ZeroGenes:
    """The constants of one model's layer 0. Copies of a model do not share them: other memory, other weights."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], _Constants] | None = None

    def attend(
        self, block: PerformerBlock, zero_states: Tensor, expressed: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """States before layer 0 and the heads' outputs (P, H * D) of one cell; None where it is not worth it.

        zero_states: (P, hidden_size), at bin 0; expressed: int64 (n,), positions with another bin; states: (n,
        hidden_size), theirs. Not to be called where a gradient is kept.
        """
        if len(expressed) > MOST_EXPRESSED * len(zero_states):
            return None
        constants = self._constants(block, zero_states)
        attention = block.attention
        q, k, v = attention.qkv(block.normed(states))
        _, k_zero, v_zero = attention.qkv(block.normed(constants.hidden[expressed]))
        weights = scaled_projection(attention.projection_matrix, zero_states.dtype)
        others = constants.key_max.index_fill(0, expressed, -torch.inf).amax()
        a, a_zero = (_all_logits(keys, weights) for keys in (k, k_zero))
        maximum = max(float(others), float(a.amax())) if len(expressed) else float(others)
        if constants.maximum - maximum > _MOST_FALL:
            return None
        sums = constants.sums.rescaled(math.exp(constants.maximum - maximum))
        sums = sums + _sums(k, v, a, maximum) - _sums(k_zero, v_zero, a_zero, maximum)
        hidden = constants.hidden.index_copy(0, expressed, states)
        queries = constants.q.index_copy(0, expressed, q)
        return hidden, _mixed(queries, weights, sums)

    def _constants(self, block: PerformerBlock, zero_states: Tensor) -> _Constants:
        attention = block.attention
        watched = [zero_states, attention.projection_matrix, *_weights_before_attention(block)]
        version = (attention.compute_dtype, *weight_state(*watched))
        if self._kept is None or self._kept[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (version, _work_out(block, zero_states.detach()))
        return self._kept[1]


def _weights_before_attention(block: PerformerBlock) -> list[nn.Parameter]:
    attention = block.attention
    modules = (block.attention_norm, attention.to_q, attention.to_k, attention.to_v)
    return [parameter for module in modules for parameter in module.parameters()]


def _work_out(block: PerformerBlock, hidden: Tensor) -> _Constants:
    attention = block.attention
    weights = scaled_projection(attention.projection_matrix, hidden.dtype)
    q, k, v = (x.clone() for x in attention.qkv(block.normed(hidden)))
    spans = [slice(start, start + _ROWS) for start in range(0, len(hidden), _ROWS)]
    key_max = torch.cat([_all_logits(k[rows], weights).amax(dim=(0, 2)) for rows in spans])
    maximum = float(key_max.amax())
    parts = [_sums(k[rows], v[rows], _all_logits(k[rows], weights), maximum) for rows in spans]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return _Constants(hidden, q, key_max, maximum, total)


def _all_logits(keys: Tensor, weights: Tensor) -> Tensor:
    """(n, H, D) -> (H, n, F)."""
    return torch.stack([logits(keys[:, head], weights) for head in range(keys.shape[1])])


def _sums(keys: Tensor, values: Tensor, a: Tensor, maximum: float) -> _Sums:
    products, weighted, plain = [], [], []
    for head in range(keys.shape[1]):
        exponentials = key_exponentials(keys[:, head], a[head], maximum)
        v = values[:, head].to(a.dtype)
        products.append((exponentials.T @ v).double())
        weighted.append(exponentials.sum(dim=0, dtype=torch.float64))
        plain.append(v.sum(dim=0, dtype=torch.float64))
    return _Sums(torch.stack(products), torch.stack(weighted), torch.stack(plain))


def _mixed(queries: Tensor, weights: Tensor, sums: _Sums) -> Tensor:
    """(P, H, D) queries against the merged sums -> (P, H * D)."""
    num_rows, num_heads, head_dim = queries.shape
    context = sums.products + EPS * sums.plain.unsqueeze(1)
    norm = sums.weighted + EPS * num_rows
    joined = torch.cat([context, norm.unsqueeze(-1)], dim=-1).to(weights.dtype)
    out = torch.empty(num_rows, num_heads * head_dim, dtype=queries.dtype, device=queries.device)
    for start in range(0, num_rows, _ROWS):
        rows = slice(start, start + _ROWS)
        for head in range(num_heads):
            mixed = query_features(queries[rows, head], weights) @ joined[head]
            columns = slice(head * head_dim, (head + 1) * head_dim)
            out[rows, columns] = mixed[:, :-1] / mixed[:, -1:]
    return out
