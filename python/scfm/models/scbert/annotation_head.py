"""scBERT's annotation head: one number a position, then three layers over the whole panel.

    a = relu(<w, h_position> + b);   scores = W3 relu(W2 relu(W1 a))

All positions enter, the slot among them, each at its own place; nothing is pooled. Always in float32. Source: the class
Identity of the released finetune.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.models.scbert.config import ScbertConfig
from scfm.ops.products import row_stable_linear


class PositionReadout(nn.Module):
    """<w, h> + b, stored as the authors' convolution of one channel."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, 1, hidden_size))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, hidden_size) -> (T,)."""
        return row_stable_linear(hidden, self.weight.flatten(0, 2), self.bias).squeeze(1)


class AnnotationHead(nn.Module):
    """Scores of the classes from a cell's final hidden states."""

    def __init__(self, config: ScbertConfig) -> None:
        super().__init__()
        wide, narrow = config.head_sizes
        self.num_positions = config.num_positions
        self.conv1 = PositionReadout(config.hidden_size)
        self.fc1 = nn.Linear(config.num_positions, wide)
        self.fc2 = nn.Linear(wide, narrow)
        self.fc3 = nn.Linear(narrow, config.num_classes)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (C * P, hidden_size) -> (C, num_classes)."""
        read = F.relu(self.conv1(hidden)).view(-1, self.num_positions)
        if torch.is_grad_enabled():
            return self._layers(read)
        # A sum over the whole panel is cut by how many rows there are; alone, a cell has the same bits in any company.
        return torch.cat([self._layers(read[cell : cell + 1]) for cell in range(len(read))])

    def _layers(self, read: Tensor) -> Tensor:
        for layer in (self.fc1, self.fc2):
            read = F.relu(row_stable_linear(read, layer.weight, layer.bias))
        return row_stable_linear(read, self.fc3.weight, self.fc3.bias)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """torch's defaults."""
        for module in (self.conv1, self.fc1, self.fc2, self.fc3):
            bound = module.weight.shape[-1] ** -0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            module.bias.uniform_(-bound, bound, generator=generator)
