"""BERT's post-norm encoder layer on packed cells: no padding position is ever computed.

    h = LN(h + O attention(QKV h));   h = LN(h + W2 act(W1 h))

The residual stream stays in float32 whatever dtype the products run in; converting at each product costs
about one percent of the layer and keeps bfloat16 embeddings within a cosine of 0.9999 of float32's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.models.nn.linear import Linear
from scfm.ops import varlen_attention
from scfm.ops.products import row_stable_linear

# On a CPU, where nothing is kept for a backward, what follows attention is computed for so many rows at a time: the
# inner states of the feed-forward (4 times the hidden ones) then stay in the cache, instead of 100 MB of fresh memory
# a layer. A GPU would only see its products cut small and launched often.
ROWS_AT_ONCE = 1024

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class EncoderLayer(nn.Module):
    """One post-norm transformer layer. hidden: float32 (T, hidden_size) -> the same."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ffn_size: int,
        *,
        activation: str = "relu",
        norm_eps: float = 1e-12,
        dropout: float = 0.0,
        inner_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.dropout = dropout
        # Also between the two products of the feed-forward: torch's layer has it, BERT's has not.
        self.inner_dropout = inner_dropout
        self.activation = activation
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.attention_out = Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.ffn_in = Linear(hidden_size, ffn_size)
        self.ffn_out = Linear(ffn_size, hidden_size)
        self.ffn_norm = nn.LayerNorm(hidden_size, eps=norm_eps)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self._split_heads(self.qkv(hidden)).unbind(1)
        return self._after_attention(hidden, varlen_attention(q, k, v, cu_seqlens))

    def forward_first_tokens(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The layer's output at each cell's first token only, (C, hidden_size).

        Keys and values of all tokens are still needed; queries, output projection and feed-forward are not,
        which leaves a sixth of the layer's products.
        """
        size = hidden.shape[1]
        weight, bias = self.qkv.weights()
        first = hidden[cu_seqlens[:-1].to(torch.int64)]
        q = row_stable_linear(first, weight[:size], bias[:size]).view(-1, self.num_heads, self.head_dim)
        kv = row_stable_linear(hidden, weight[size:], bias[size:])
        k, v = kv.view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        one_each = torch.arange(len(cu_seqlens), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        return self._after_attention(first, varlen_attention(q, k, v, cu_seqlens, cu_seqlens_q=one_each))

    def attention_probabilities(self, hidden: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        """softmax(q k^T / sqrt(D)) of every cell, float32 (H, L, L) each."""
        q, k, _ = self._split_heads(self.qkv(hidden)).float().unbind(1)
        bounds = cu_seqlens.tolist()
        scale = q.shape[-1] ** -0.5
        return [
            torch.softmax(torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) * scale, dim=-1)
            for a, b in itertools.pairwise(bounds)
        ]

    def _split_heads(self, qkv: Tensor) -> Tensor:
        return qkv.view(-1, 3, self.num_heads, self.head_dim)

    def _after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        return by_rows(self._rows_after_attention, hidden, attended.flatten(1))

    def _rows_after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        return self._rows_after_projection(hidden, self.attention_out(attended))

    def _rows_after_projection(self, hidden: Tensor, projected: Tensor) -> Tensor:
        hidden = self.attention_norm(hidden + self._drop(projected))
        out: Tensor = self.ffn_norm(hidden + self._drop(self._feed_forward(hidden)))
        return out

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        if self.activation == "relu":
            inner = self.ffn_in(hidden, relu=True)
        else:
            inner = ACTIVATIONS[self.activation](self.ffn_in(hidden))
        out: Tensor = self.ffn_out(self._drop(inner) if self.inner_dropout else inner)
        return out

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


def by_rows(step: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, other: Tensor) -> Tensor:
    """``step`` of two tensors with a row a token; on a CPU a block of rows at a time where no gradient is kept."""
    if torch.is_grad_enabled() or hidden.device.type != "cpu" or len(hidden) <= ROWS_AT_ONCE:
        return step(hidden, other)
    out = torch.empty_like(hidden)
    for start in range(0, len(hidden), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        out[rows] = step(hidden[rows], other[rows])
    return out
