"""scFoundation as it runs without this engine: its encoder rebuilt from torch.nn on padded batches, its own dense rows.

The released module is a list of nn.TransformerEncoderLayer called one after the other with a padding mask; a user who
knows torch would write nn.TransformerEncoder, whose nested-tensor path leaves most of the padding out. Both are here.
Tokens are made as get_embedding.py makes them: a dense row of 19,264 genes a cell, normalised by numpy, then gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from scfm.models.scfoundation.names import their_name

Array = np.ndarray[Any, np.dtype[Any]]


class PaddedEncoder(nn.Module):
    """The encoder of ``model`` with its weights, from embedded tokens (B, L, D) to (B, L, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        layer = nn.TransformerEncoderLayer(
            config.hidden_size, config.num_heads, config.ffn_size, config.dropout, batch_first=True
        )
        self.whole = nn.TransformerEncoder(layer, config.num_layers).eval()
        self.norm = model.encoder_norm
        state = {their_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
        prefix = "encoder.transformer_encoder."
        layers = {
            f"layers.{name.removeprefix(prefix)}": tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        self.whole.load_state_dict(layers)

    def layer_by_layer(self, embedded: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """As released: the padding is computed too."""
        for layer in self.whole.layers:
            embedded = layer(embedded, src_key_padding_mask=padding)
        normed: torch.Tensor = self.norm(embedded)
        return normed

    def nested(self, embedded: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """nn.TransformerEncoder's own path."""
        normed: torch.Tensor = self.norm(self.whole(embedded, src_key_padding_mask=padding))
        return normed


def dense_rows(matrix: Any, target: float = 4.0) -> Iterator[tuple[Array, Array]]:
    """Positions and values of each cell, as get_embedding.py and gatherData make them of an aligned matrix."""
    for row in matrix.toarray():
        total = row.sum()
        whole = np.append(np.log1p(row / total * 1e4), [target, np.log10(total)]).astype(np.float32)
        positions = np.flatnonzero(whole > 0)
        yield positions, whole[positions]
