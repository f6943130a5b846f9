"""A linear layer whose rows do not depend on their company, in float32 or bfloat16.

Weights stay in float32 (they are what is saved and trained); a bfloat16 copy is made once, at the first use for
inference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scfm.models.nn.weight_state import weight_state
from scfm.ops.products import row_stable_linear


class Linear(nn.Module):
    """y = x W^T + b. x: (T, in_features); W: float32 (out_features, in_features); y in ``compute_dtype``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.compute_dtype = torch.float32
        self._copy: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return row_stable_linear(x, *self.weights(), relu=relu)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias in ``compute_dtype``; the copy is kept only where no gradient could need it."""
        if self.compute_dtype == self.weight.dtype:
            return self.weight, self.bias
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return self.weight.to(self.compute_dtype), self.bias.to(self.compute_dtype)
        state = weight_state(self.weight, self.bias)
        if self._copy is None or self._copy[0] != state:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # an inference tensor could enter no later graph
                copies = self.weight.to(self.compute_dtype), self.bias.to(self.compute_dtype)
            self._copy = (state, *copies)
        return self._copy[1], self._copy[2]
