"""scGPT's encoder layers: BERT's post-norm layer with three more ways through it.

Generation: known genes see known genes; a gene to be generated sees them and itself, and its attended values pass
by the output projection, as in the pretraining code. Padding: the layer's output at the position of a <pad>, which
attends to the cell's tokens and to which nothing attends; computed only where the original's numbers are asked for.
Pre-norm: the released flash layer's, whose residual starts from the normalised tensor:

    x = norm1(x); x = x + attention(x); x = norm2(x); x = x + feed_forward(x)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from scfm.models.nn.encoder import EncoderLayer, by_rows
from scfm.ops import generative_attention, varlen_attention

NORM_EPS = 1e-5


class ScgptLayer(EncoderLayer):
    """One post-norm layer. hidden: float32 (T, hidden_size) -> the same."""

    def __init__(self, hidden_size: int, num_heads: int, ffn_size: int, *, dropout: float) -> None:
        super().__init__(
            hidden_size, num_heads, ffn_size, norm_eps=NORM_EPS, dropout=dropout, inner_dropout=True
        )

    def forward_generative(
        self, hidden: Tensor, cu_seqlens: Tensor, num_known: Tensor, known_rows: Tensor
    ) -> Tensor:
        """The layer over cells whose first ``num_known`` (int32 (C,)) tokens are known.

        known_rows: int64, the rows of all known tokens in the pack.
        """
        q, k, v = self._split_heads(self.qkv(hidden)).unbind(1)
        attended = generative_attention(q, k, v, cu_seqlens, num_known).flatten(1)
        projected = self.attention_out(attended.index_select(0, known_rows))
        projected = attended.index_copy(0, known_rows, projected)
        return by_rows(self._rows_after_projection, hidden, projected)

    def forward_padded(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        token_rows: Tensor,
        cu_seqlens_padded: Tensor,
        reading: Literal["plain", "flash"],
    ) -> Tensor:
        """The layer over cells that end in one <pad> each.

        cu_seqlens: of the tokens alone, whose rows are ``token_rows``; cu_seqlens_padded: with the <pad>. Its query is
        answered in plain attention, and gives zeros before the output projection in the flash reading.
        """
        q, k, v = self._split_heads(self.qkv(hidden)).unbind(1)
        keys, values = k.index_select(0, token_rows), v.index_select(0, token_rows)
        if reading == "plain":
            attended = varlen_attention(q, keys, values, cu_seqlens, cu_seqlens_q=cu_seqlens_padded)
        else:
            inside = varlen_attention(q.index_select(0, token_rows), keys, values, cu_seqlens)
            attended = q.new_zeros(q.shape).index_copy(0, token_rows, inside)
        return self._after_attention(hidden, attended)


class PreNormLayer(ScgptLayer):
    """The released flash layer with pre_norm=True."""

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return super().forward(self.attention_norm(hidden), cu_seqlens)

    def forward_first_tokens(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return super().forward_first_tokens(self.attention_norm(hidden), cu_seqlens)

    def forward_generative(
        self, hidden: Tensor, cu_seqlens: Tensor, num_known: Tensor, known_rows: Tensor
    ) -> Tensor:
        return super().forward_generative(self.attention_norm(hidden), cu_seqlens, num_known, known_rows)

    def forward_padded(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        token_rows: Tensor,
        cu_seqlens_padded: Tensor,
        reading: Literal["plain", "flash"],
    ) -> Tensor:
        hidden = self.attention_norm(hidden)
        return super().forward_padded(hidden, cu_seqlens, token_rows, cu_seqlens_padded, reading)

    def attention_probabilities(self, hidden: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        return super().attention_probabilities(self.attention_norm(hidden), cu_seqlens)

    def _rows_after_projection(self, hidden: Tensor, projected: Tensor) -> Tensor:
        hidden = self.ffn_norm(hidden + self._drop(projected))
        return hidden + self._drop(self._feed_forward(hidden))
