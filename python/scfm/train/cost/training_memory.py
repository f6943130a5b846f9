"""Memory of a GPU in pretraining, by formula: weights and what belongs to them, and what a microbatch keeps for its
backward.

With P weights, S ranks that share one copy of them (ddp: 1), e bytes an element of products (2 in bfloat16, 4):

    weights           4 P / S         float32
    gradients         4 P / S         and 4 P whole while several microbatches of a rank are added up (fsdp, hsdp)
    optimiser         8 P / S         AdamW's two moments
    working copies    2 P_blocks      bfloat16 copies of the blocks' matrices, kept for the backward (0 in float32)
    gathered          4 (P - P_blocks + 2 P_block)      fsdp, hsdp: all but the blocks, and the blocks at hand

Activations of a token in one block, of hidden size h, feed-forward f, H heads, inner size i = H D, one byte an element
of a dropout mask (fused kernels of GPUs; m = 0 without dropout):

    encoder block     (6 e + 2 m + 8) h + e f + 4 H + 16      and (e + m) f more with dropout inside the feed-forward
    Performer block   (2 e + 8) h + 4 e i + 2 e f + 16        (4 e f with a gated feed-forward)
    checkpointed      4 h, and one block as above while it is computed again
    all else          as much as one block: the embedding, the heads on their few rows, gradients on their way

Counted from what autograd saves of these blocks, which the tests do again; a whole Geneformer's forward and backward
was measured at 95 to 106 % of the sum. ``RESERVE`` stands for the CUDA context, libraries and communication buffers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from scfm.models.base import FoundationModel
from scfm.models.nn.encoder import EncoderLayer
from scfm.models.nn.performer import PerformerBlock

__all__ = ["RESERVE", "TrainingMemory", "bytes_a_token", "training_memory"]

RESERVE = 2 * 10**9
_FLOAT32 = 4


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    working_copies: int
    gathered: int
    activations: int
    reserve: int = RESERVE

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def training_memory(
    model: FoundationModel,
    *,
    block_tokens: dict[type[nn.Module], float],
    element_size: int,
    shards: int,
    microbatches_per_rank: int,
    checkpoint_every: int = 0,
) -> TrainingMemory:
    """Of a model, which may be on torch's meta device.

    block_tokens: rows that a microbatch runs through the blocks of each kind; element_size: bytes of an element in
    products; shards: ranks that share one copy of the weights; checkpoint_every: activation checkpointing of every k-th
    block (0: none).
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    blocks = [block for block in model.modules() if isinstance(block, EncoderLayer | PerformerBlock)]
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    largest = max(in_blocks, default=0)
    sharded = shards > 1
    gathered = everything - sum(in_blocks) + 2 * largest if sharded else 0
    unsharded_gradients = trained if sharded and microbatches_per_rank > 1 else 0
    return TrainingMemory(
        weights=_FLOAT32 * everything // shards,
        gradients=_FLOAT32 * (trained // shards + unsharded_gradients),
        optimizer=2 * _FLOAT32 * trained // shards,
        working_copies=element_size * sum(in_blocks) if element_size < _FLOAT32 else 0,
        gathered=_FLOAT32 * gathered,
        activations=_activations(blocks, block_tokens, element_size, checkpoint_every),
    )


def _activations(
    blocks: Iterable[EncoderLayer | PerformerBlock],
    block_tokens: dict[type[nn.Module], float],
    element_size: int,
    checkpoint_every: int,
) -> int:
    kept, again, largest = 0.0, 0.0, 0.0
    for number, block in enumerate(blocks):
        tokens = next(rows for kind, rows in block_tokens.items() if isinstance(block, kind))
        whole = tokens * bytes_a_token(block, element_size=element_size)
        largest = max(largest, whole)
        if checkpoint_every and number % checkpoint_every == 0:
            kept += tokens * _FLOAT32 * _hidden_size(block)
            again = max(again, whole)
        else:
            kept += whole
    return int(kept + again + largest)


def bytes_a_token(block: EncoderLayer | PerformerBlock, *, element_size: int, mask_size: int = 1) -> float:
    """What autograd keeps of a token in one block. mask_size: bytes of an element of a dropout mask."""
    size = _hidden_size(block)
    if isinstance(block, PerformerBlock):
        inner = block.attention.num_heads * block.attention.head_dim
        wide = block.ffn.w2.weight.shape[1]
        ffn = (4 if block.ffn.glu else 2) * element_size * wide
        return (2 * element_size + 8) * size + 4 * element_size * inner + ffn + 16
    mask_size = mask_size if block.dropout else 0
    ffn_size = block.ffn_in.weight.shape[0]
    inside = (element_size + mask_size) * ffn_size if block.inner_dropout and block.dropout else 0
    layer = (6 * element_size + 2 * mask_size + 8) * size + element_size * ffn_size
    return layer + inside + 4 * block.num_heads + 16


def _hidden_size(block: EncoderLayer | PerformerBlock) -> int:
    weight: Any = block.attention.to_out.weight if isinstance(block, PerformerBlock) else block.ffn_out.weight
    return int(weight.shape[0])
