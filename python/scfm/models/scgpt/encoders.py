"""What enters scGPT's encoder at each token: its gene, its value, and for some models flags, batch or modality.

    x = LN(E[gene]) + value network(value) [+ P[flag]]        "scaling": x = LN(E[gene]) * value

Every term is a row of a table: genes by id, values by distinct value (a binned cell has at most 53 of them, and the
network gives the same numbers whether it is asked once or for every token). For inference the normalised gene table
and the rows of all bins are worked out once and kept, so that a token costs two look-ups and an addition. The value
network computes in float32 whatever the encoder does; it is asked too rarely to matter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.models.nn.derived import Derived
from scfm.models.scgpt.layers import NORM_EPS
from scfm.ops import embed_norm
from scfm.ops.products import row_stable_linear

MAX_VALUE = 512.0  # the original clamps larger values; smaller ones, down to the mask's and pad's, pass


class TokenTable(nn.Module):
    """LN(E): genes, batch labels, modalities and categories of values. ids (N,) -> float32 (N, hidden_size).

    frozen_row: the row that training leaves as it is, because the original made it the padding.
    """

    def __init__(self, num_rows: int, hidden_size: int, *, frozen_row: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_rows, hidden_size)
        self.enc_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.frozen_row = frozen_row
        self._normed = Derived()

    def forward(self, ids: Tensor) -> Tensor:
        table, *norm = self.rows()
        weight, bias = norm or (None, None)
        return embed_norm([ids], [table], weight, bias, eps=NORM_EPS)

    def normed(self) -> Tensor:
        """All of LN(E), (num_rows, hidden_size), kept where no gradient could be needed."""
        if not torch.is_grad_enabled():
            weights = [self.embedding.weight, self.enc_norm.weight, self.enc_norm.bias]
            return self._normed.of(weights, lambda: self.enc_norm(self.embedding.weight))
        normed: Tensor = self.enc_norm(without_gradient_at(self.embedding.weight, self.frozen_row))
        return normed

    def rows(self) -> list[Tensor]:
        """The table to look up in: the normalised one, or with gradients the raw one and its norm's weight and bias."""
        if not torch.is_grad_enabled():
            return [self.normed()]
        table = without_gradient_at(self.embedding.weight, self.frozen_row)
        return [table, self.enc_norm.weight, self.enc_norm.bias]


class ContinuousValues(nn.Module):
    """LN(W2 relu(w1 min(v, 512) + b1) + b2) of every value that a pack holds, as a table and each token's row in it."""

    def __init__(self, hidden_size: int, num_bins: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.num_bins = num_bins
        self._bins = Derived()

    def forward(self, values: Tensor) -> Tensor:
        """float32 (N,) -> (N, hidden_size)."""
        scaled = values.clamp(max=MAX_VALUE).unsqueeze(1) * self.linear1.weight[:, 0]
        inner = F.relu(scaled + self.linear1.bias)
        out: Tensor = self.norm(row_stable_linear(inner, self.linear2.weight, self.linear2.bias))
        return out

    def look_up(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """A table of distinct values' rows, and int64 (T,): each token's row."""
        if torch.is_grad_enabled():
            distinct, ids = torch.unique(values, return_inverse=True)
            return self(distinct), ids
        low = -2.0  # the pad's and the mask's values come before the bins
        table = self._bins.of([*self.parameters()], lambda: self(self._bin_values(low)))
        ids = (values - low).to(torch.int64)
        inside = (values == values.round()) & (values >= low) & (values <= self.num_bins)
        if bool(inside.all()):
            return table, ids
        distinct, others = torch.unique(values[~inside], return_inverse=True)
        ids[~inside] = others + len(table)
        return torch.cat([table, self(distinct)]), ids

    def _bin_values(self, low: float) -> Tensor:
        device = self.linear1.weight.device
        return torch.arange(int(low), self.num_bins + 1, dtype=torch.float32, device=device)


class CategoryValues(TokenTable):
    """Values that are rows of a table: bins, the pad's id and the mask's."""

    def look_up(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.normed(), values.to(torch.int64)


class PlainTable(nn.Module):
    """A table without a norm: perturbation flags, and the marks of genes to be generated."""

    def __init__(self, num_rows: int, hidden_size: int, *, frozen_row: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size))
        self.frozen_row = frozen_row

    def rows(self) -> Tensor:
        return without_gradient_at(self.weight, self.frozen_row)


def without_gradient_at(table: Tensor, row: int | None) -> Tensor:
    """The table itself, one row of which gets no gradient (torch's padding_idx)."""
    if row is None or not (torch.is_grad_enabled() and table.requires_grad):
        return table
    out: Tensor = _WithoutGradientAt.apply(table, row)  # type: ignore[no-untyped-call]
    return out


class _WithoutGradientAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if bool(grad[ctx.row].any()):
            grad = grad.clone()
            grad[ctx.row] = 0
        return grad, None
