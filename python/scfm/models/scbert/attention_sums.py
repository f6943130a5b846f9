"""How much attention each gene gets in a cell, in time linear in the panel's length.

    A = mean over layers and heads of q'_i k'_j / (q'_i . sum_j k'_j);   sum_j = mean over queries i of A_ij

The authors build every map A, of 16,907 x 16,907 numbers, to sum it up afterwards. As it is a product of feature maps,
the sum over queries can be taken before the product with the keys:

    sum_j = (sum_i q'_i / (q'_i . z)) . k'_j,  z = sum_j k'_j

As there, queries and keys are those of the state behind the layer's attention, not of the one before it. In float32:
the released code's float16 overflows for short panels. Source: attn_sum_save.py of the released scBERT code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.nn.performer import PerformerBlock
from scfm.models.scbert.features import EPS, key_exponentials, logits, query_features, scaled_projection
from scfm.models.scbert.inputs import checked_inputs
from scfm.models.scbert.model import Scbert

_ROWS = 1024


@torch.no_grad()
def attention_sums(model: Scbert, packed: PackedCells) -> Tensor:
    """float32 (C, P): each position's share of a cell's attention; a row adds up to 1.

    Raises InvalidArgumentError for a variant whose attention has no random features, or a pack that does not fit.
    """
    if model.config.attention != "favor" or model.config.reversible:
        raise InvalidArgumentError(
            f"{'reversible layers' if model.config.reversible else model.config.attention + ' attention'}; attention "
            "sums are those of FAVOR+",
            where="model",
        )
    inputs = checked_inputs(model.config, packed, model.device)
    out = torch.zeros(inputs.num_cells, model.config.num_positions, device=model.device)
    for number in range(inputs.num_cells):
        cell = inputs.cells(slice(number, number + 1))
        hidden = model.embed_bins(cell.bins)
        for block in model.performer.blocks():
            after_attention = hidden + block.attention_branch(hidden, cell.cu_seqlens)
            out[number] += _of_block(block, after_attention)
            hidden = after_attention + block.ffn_branch(after_attention)
    return out / out.sum(dim=1, keepdim=True)


def _of_block(block: PerformerBlock, hidden: Tensor) -> Tensor:
    """(P,): the sum over heads and queries of one layer's attention, in float32."""
    attention = block.attention
    q, k, _ = attention.qkv(block.normed(hidden))
    weights = scaled_projection(attention.projection_matrix, torch.float32)
    spans = [slice(start, start + _ROWS) for start in range(0, len(q), _ROWS)]
    heads = range(attention.num_heads)
    maximum = max(float(logits(k[rows, head], weights).amax()) for head in heads for rows in spans)
    out = torch.zeros(len(q), device=q.device)
    for head in heads:
        keys = [_key_features(k[rows, head], weights, maximum) for rows in spans]
        total = torch.stack([features.sum(dim=0) for features in keys]).sum(dim=0)
        asked = torch.zeros_like(total)
        for rows in spans:
            features = query_features(q[rows, head], weights)
            asked += (features / (features @ total).unsqueeze(1)).sum(dim=0)
        out += torch.cat([features @ asked for features in keys])
    return out


def _key_features(keys: Tensor, weights: Tensor, maximum: float) -> Tensor:
    return key_exponentials(keys, logits(keys, weights), maximum) + EPS
