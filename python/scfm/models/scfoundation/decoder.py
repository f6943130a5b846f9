"""scFoundation's decoder: a Performer over all genes of a cell, expressed or not, and the two depths.

    row = (encoder's state, or e(0) where nothing is expressed) + position;   h = Performer(W row + b)

Rows of genes without expression are the same in every cell, so their way into the decoder is computed once a model.
The authors' result depends on which cells share a batch, through the maximum of the keys (kmax_scope="batch"); here a
cell stands alone by default, and then the rows of one cell after the other are in memory, never those of a batch.
Source: MaeAutobin of the released code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from scfm.models.nn.linear import Linear
from scfm.models.nn.performer import KmaxScope, Performer, PerformerShape
from scfm.models.scfoundation.config import ScfoundationConfig


class Decoder(nn.Module):
    """From states of the tokens to a state of every position, (vocab_size, decoder_size) a cell."""

    def __init__(self, config: ScfoundationConfig) -> None:
        super().__init__()
        self.num_rows = config.vocab_size
        self.embed = Linear(config.hidden_size, config.decoder_size)
        self.performer = Performer(
            PerformerShape(
                hidden_size=config.decoder_size,
                num_heads=config.decoder_heads,
                num_layers=config.decoder_layers,
                head_dim=config.decoder_head_dim,
                num_features=config.decoder_features,
                qkv_bias=True,
            )
        )
        self.performer_norm = nn.LayerNorm(config.decoder_size, eps=1e-5)
        self.norm = nn.LayerNorm(config.decoder_size, eps=1e-5)
        self.to_final = Linear(config.decoder_size, 1)

    def enter(self, rows: Tensor) -> Tensor:
        """Rows of the model's width, (T, hidden_size), in the decoder's, in their dtype."""
        entered: Tensor = self.embed(rows)
        return entered.to(rows.dtype)

    def states(
        self,
        empty: Tensor,
        token_ids: Tensor,
        entered: Tensor,
        cu_seqlens: Tensor,
        kmax_scope: KmaxScope = "cell",
    ) -> Iterator[Tensor]:
        """States of every position, float32 (cells, vocab_size, decoder_size), some cells at a time.

        empty: (vocab_size, decoder_size), every position as it enters without expression. token_ids: int64 (T,), the
        positions that enter as ``entered`` (T, decoder_size) instead; cu_seqlens: their cells. One cell comes after
        the other, with kmax_scope="batch" all of them at once.
        """
        bounds = cu_seqlens.tolist()
        if kmax_scope == "batch":
            cells = [
                empty.index_copy(0, token_ids[start:stop], entered[start:stop])
                for start, stop in itertools.pairwise(bounds)
            ]
            yield self._run(torch.cat(cells), len(cells), kmax_scope) if cells else empty[None, :0]
            return
        for start, stop in itertools.pairwise(bounds):
            yield self._run(empty.index_copy(0, token_ids[start:stop], entered[start:stop]), 1, kmax_scope)

    def expression(self, states: Tensor) -> Tensor:
        """Predicted ln(1 + CP10k) at the target's depth, float32 (cells, vocab_size)."""
        found: Tensor = self.to_final(states.flatten(0, 1))
        return found.view(states.shape[:2]).to(states.dtype)

    def _run(self, rows: Tensor, num_cells: int, kmax_scope: KmaxScope) -> Tensor:
        offsets = torch.arange(num_cells + 1, dtype=torch.int32, device=rows.device) * self.num_rows
        hidden = self.performer(rows, offsets, kmax_scope)
        normed: Tensor = self.norm(self.performer_norm(hidden))
        return normed.view(num_cells, self.num_rows, -1)
