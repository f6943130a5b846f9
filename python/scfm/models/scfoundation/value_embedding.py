"""From an expression value to a vector: a soft choice among learned bins, the same for every gene.

    u = LeakyReLU(x w + b);   p = softmax(alpha u + W u + c);   e(x) = p E

Two numbers stand for no expression at all: a masked value and padding have vectors of their own. Source:
AutoDiscretizationEmbedding2 of the released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.models.nn.derived import Derived
from scfm.ops.products import row_stable_linear

_SLOPE = 0.1


class Affine(nn.Module):
    """Weight and bias of a small product that always runs in the weight's dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))


class Table(nn.Module):
    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))


class ValueEmbedding(nn.Module):
    """values: (T,) -> (T, hidden_size), in the dtype of the weights. A row depends on its value alone."""

    def __init__(
        self, hidden_size: int, num_bins: int, *, alpha: float, mask_value: float, pad_value: float
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.mask_value, self.pad_value = mask_value, pad_value
        self.mlp = Affine(1, num_bins)
        self.mlp2 = Affine(num_bins, num_bins)
        self.emb = Table(num_bins, hidden_size)
        self.emb_mask = Table(1, hidden_size)
        self.emb_pad = Table(1, hidden_size)
        self._zero = Derived()

    def forward(self, values: Tensor) -> Tensor:
        x = values.to(self.emb.weight.dtype)
        rows = row_stable_linear(self.bin_weights(x), self.emb.weight.T.contiguous())
        for number, table in ((self.mask_value, self.emb_mask), (self.pad_value, self.emb_pad)):
            special = x == number
            if bool(special.any()):
                rows = torch.where(special.unsqueeze(1), table.weight, rows)
        return rows

    def bin_weights(self, values: Tensor) -> Tensor:
        """The soft choice p of each value, (T, num_bins)."""
        first = F.leaky_relu(values.unsqueeze(1) * self.mlp.weight[:, 0] + self.mlp.bias, _SLOPE)
        return (self.alpha * first + row_stable_linear(first, self.mlp2.weight, self.mlp2.bias)).softmax(
            dim=1
        )

    def of_zero(self) -> Tensor:
        """e(0), (hidden_size,): what a gene without expression is to the decoder. Worked out once a model."""
        weights = [*self.mlp.parameters(), *self.mlp2.parameters(), *self.emb.parameters()]
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return self._compute_zero()
        return self._zero.of(weights, self._compute_zero)

    def _compute_zero(self) -> Tensor:
        row: Tensor = self.forward(self.emb.weight.new_zeros(1))[0]
        return row
