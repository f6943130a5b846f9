"""scGPT's classifiers of a cell's embedding: its type, and the batch it came from behind a reversed gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scfm.models.nn.linear import Linear
from scfm.models.scgpt.layers import NORM_EPS


class CellClassifier(nn.Module):
    """Linear, activation, LayerNorm, (num_layers - 1) times; then one score a class.

    (C, hidden_size) -> float32 (C, num_classes).
    """

    def __init__(
        self, hidden_size: int, num_classes: int, num_layers: int, *, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        inner: list[nn.Module] = []
        for _ in range(num_layers - 1):
            inner += [Linear(hidden_size, hidden_size), activation(), nn.LayerNorm(hidden_size, eps=NORM_EPS)]
        self._decoder = nn.ModuleList(inner)
        self.out_layer = Linear(hidden_size, num_classes)

    def forward(self, cells: Tensor) -> Tensor:
        for step in self._decoder:
            cells = step(cells).float()
        return self.out_layer(cells).float()  # type: ignore[no-any-return]


class BatchAdversary(CellClassifier):
    """Scores of the batch labels; what it learns, the encoder unlearns.

    reversal: what the gradient is multiplied by, negated, on its way back into the cell's embedding.
    """

    def __init__(
        self, hidden_size: int, num_labels: int, num_layers: int = 3, *, reversal: float = 1.0
    ) -> None:
        super().__init__(hidden_size, num_labels, num_layers, activation=nn.LeakyReLU)
        self.reversal = reversal

    def forward(self, cells: Tensor) -> Tensor:
        reversed_cells: Tensor = _ReverseGradient.apply(cells, self.reversal)  # type: ignore[no-untyped-call]
        return super().forward(reversed_cells)


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * grad, None
