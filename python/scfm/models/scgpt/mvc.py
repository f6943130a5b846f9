"""Expression of a gene from its cell's embedding and its own embedding alone (masked value prediction by cell).

    query = sigmoid(Q g);  "inner product": <W query, cell>  (", detach": g gets no gradient)
    "concat query": W2 prelu(W1 [cell, query]);  "sum query": W2 prelu(W1 (cell + query))

The inner product is taken as <query, W^T cell>: one product a cell instead of one a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scfm.models.nn.linear import Linear
from scfm.models.scgpt.decoders import Expression, ToOne, row_stable
from scfm.ops.products import row_stable_linear

QUERY_SIZE = 64  # inner width of the two query styles


class MvcDecoder(nn.Module):
    """key_size: of the gene embeddings; cell_size: of the cell embeddings, with what is appended to each."""

    def __init__(self, key_size: int, cell_size: int, *, style: str, explicit_zeros: bool) -> None:
        super().__init__()
        self.style = style
        self.gene2query = Linear(key_size, key_size)
        if style.startswith("inner product"):
            self.W = WithoutBias(key_size, cell_size)
            if explicit_zeros:
                self.W_zero_logit = Linear(key_size, cell_size)
        else:
            wide = 2 * key_size if style == "concat query" else key_size
            self.fc1 = Linear(wide, QUERY_SIZE)
            self.hidden_activation = nn.PReLU()
            self.fc2 = ToOne(QUERY_SIZE)
        self.explicit_zeros = explicit_zeros

    def forward(self, genes: Tensor, cells: Tensor, cell_of_token: Tensor) -> Expression:
        """genes: (T, key_size) gene embeddings, not contextual; cells: (C, cell_size); cell_of_token: int64 (T,)."""
        query = torch.sigmoid(
            self.gene2query(genes.detach() if self.style.endswith("detach") else genes)
        ).float()
        if self.style.startswith("inner product"):
            keys = row_stable_linear(cells, self.W.weight.T).index_select(0, cell_of_token)
            prediction = (query * keys).sum(-1)
            if not self.explicit_zeros:
                return Expression(prediction)
            keys = row_stable_linear(cells, self.W_zero_logit.weight.T).index_select(0, cell_of_token)
            offset = (cells * self.W_zero_logit.bias).sum(-1).index_select(0, cell_of_token)
            logits = (query * keys).sum(-1) + offset
            return Expression(prediction, row_stable(torch.sigmoid, logits))
        each = cells.index_select(0, cell_of_token)
        both = torch.cat([each, query], dim=1) if self.style == "concat query" else each + query
        return Expression(self.fc2(self.hidden_activation(self.fc1(both))))


class WithoutBias(nn.Module):
    """A weight (out_features, in_features) that its owner multiplies by."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
