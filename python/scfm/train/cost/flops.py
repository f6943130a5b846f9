"""Floating-point operations of a microbatch, forward and backward, by formula: what MFU and the cost of a run rest on.

A product of an (m, k) and a (k, n) matrix counts 2 m k n. The backward of a product whose both sides have gradients is
two such products, so a layer with N weights costs 6 N a token, and full attention of a cell with n tokens and L layers
of width d costs 12 L d n^2: two products forward, four backward. Attention is of whole cells, without a causal half.

Counted: every product of the layers, of attention and of the heads, each over the rows that it really runs on. Not
counted: look-ups, norms, activations, softmax, the optimiser (together well under one percent at the released sizes).

    model     what the mathematics needs: the numerator of MFU
    hardware  and what is computed a second time: attention's scores and the vocabulary's logits, which fused kernels
              make again in the backward rather than keep, and the forward of checkpointed blocks: the numerator of HFU

Sources: Chowdhery et al. 2022 (MFU), Korthikanti et al. 2022 (HFU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.nn.performer import PerformerShape
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.mvc import QUERY_SIZE
from scfm.train.objectives.geneformer_pretraining import MaskedGenes
from scfm.train.objectives.prepared import Prepared
from scfm.train.objectives.protocol import PretrainingObjective
from scfm.train.objectives.scbert_pretraining import AskedBins
from scfm.train.objectives.scfoundation_pretraining import ReadDepthCells
from scfm.train.objectives.scgpt_pretraining import HiddenExpression, UnknownExpression

__all__ = [
    "Flops",
    "geneformer_flops",
    "microbatch_flops",
    "scbert_flops",
    "scfoundation_flops",
    "scgpt_flops",
]

Lengths = Sequence[int] | np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Flops:
    """model: forward and backward; again: recomputed by the fused kernels; blocks: one forward of all blocks, which
    activation checkpointing computes again.
    """

    model: float = 0.0
    again: float = 0.0
    blocks: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.again + other.again, self.blocks + other.blocks)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.model * factor, self.again * factor, self.blocks * factor)

    def hardware(self, *, checkpoint_every: int = 0) -> float:
        """With every ``checkpoint_every``-th block computed again (0: none)."""
        return self.model + self.again + (self.blocks / checkpoint_every if checkpoint_every else 0.0)


def microbatch_flops(objective: PretrainingObjective, prepared: Prepared) -> Flops:
    """Of one prepared microbatch, with the terms that have a weight at the step that the objective was last told."""
    config, lengths = objective.model.config, prepared.packed.lengths.numpy()
    if isinstance(prepared, MaskedGenes):
        return geneformer_flops(config, lengths, num_masked=len(prepared.targets))
    if isinstance(prepared, UnknownExpression | HiddenExpression):
        asked, terms = len(prepared.targets), objective.weights
        passes = prepared.num_tokens // max(prepared.packed.num_tokens, 1) + ("second_pass" in terms)
        return scgpt_flops(
            config,
            lengths,
            num_decoded=asked * (("expression" in terms) + ("second_pass" in terms)),
            num_queried=asked * ("mvc" in terms),
            num_known=prepared.num_known.numpy() if isinstance(prepared, UnknownExpression) else None,
            num_passes=passes,
        )
    if isinstance(prepared, AskedBins):
        return scbert_flops(config, prepared.num_cells, num_scored=len(prepared.rows))
    if isinstance(prepared, ReadDepthCells):
        return scfoundation_flops(config, lengths, num_late=prepared.late.num_tokens)
    raise AssertionError(f"no formula for {type(prepared).__name__}")


def geneformer_flops(config: GeneformerConfig, lengths: Lengths, *, num_masked: float) -> Flops:
    """lengths: tokens of each cell; num_masked: rows of the vocabulary-wide head."""
    size = config.hidden_size
    logits = 2.0 * num_masked * size * config.vocab_size
    head = Flops(3 * (2.0 * num_masked * size**2 + logits), again=logits)
    return _encoder(size, config.ffn_size, config.num_layers, *_sums(lengths)) + head


def scgpt_flops(
    config: ScgptConfig,
    lengths: Lengths,
    *,
    num_decoded: float,
    num_queried: float = 0.0,
    num_known: Lengths | None = None,
    num_passes: int = 1,
) -> Flops:
    """num_decoded: rows of the expression decoder, of all passes together; num_queried: rows of which expression is
    asked of the cell's embedding. num_known: in generation, how many of each cell's tokens are given; the others see
    them and themselves, and have no output projection. num_passes: of the encoder. Heads of whole cells do not count.
    """
    size = config.hidden_size
    total = np.asarray(lengths, dtype=np.float64)
    known = total if num_known is None else np.asarray(num_known, dtype=np.float64)
    pairs = float((total * known + (total - known)).sum())
    blocks = _encoder(size, config.ffn_size, config.num_layers, float(total.sum()), pairs)
    unprojected = 2.0 * config.num_layers * size**2 * float((total - known).sum())
    blocks += Flops(-3 * unprojected, blocks=-unprojected)
    decoders = 2 if config.explicit_zeros else 1
    decoder = 3 * 2.0 * num_decoded * size * (size + config.context_size + size) * decoders
    return blocks * num_passes + Flops(decoder) + _mvc(config, num_queried, len(total))


def scbert_flops(config: ScbertConfig, num_cells: int, *, num_scored: float) -> Flops:
    """Every cell has all positions of the panel; num_scored: rows of the head of bins."""
    head = 3 * 2.0 * num_scored * config.hidden_size * config.num_token_ids
    return _performer(config.performer, float(num_cells * config.num_positions)) + Flops(head)


def scfoundation_flops(config: ScfoundationConfig, lengths: Lengths, *, num_late: float) -> Flops:
    """lengths: tokens of each cell that the encoder sees; num_late: hidden genes, which enter at the decoder only."""
    size, narrow, bins = config.hidden_size, config.decoder_size, config.num_bins
    tokens, squares = _sums(lengths)
    rows = float(len(lengths) * config.vocab_size)
    values = 2.0 * (tokens + num_late) * bins * (bins + size)
    entering = 2.0 * (tokens + num_late + config.vocab_size) * size * narrow
    decoder = PerformerShape(
        hidden_size=narrow,
        num_heads=config.decoder_heads,
        num_layers=config.decoder_layers,
        head_dim=config.decoder_head_dim,
        num_features=config.decoder_features,
    )
    ends = Flops(3 * (values + entering + 2.0 * rows * narrow))
    encoder = _encoder(size, config.ffn_size, config.num_layers, tokens, squares)
    return encoder + _performer(decoder, rows) + ends


def _sums(lengths: Lengths) -> tuple[float, float]:
    """Tokens, and pairs of tokens that see each other."""
    each = np.asarray(lengths, dtype=np.float64)
    return float(each.sum()), float((each**2).sum())


def _encoder(size: int, ffn_size: int, num_layers: int, tokens: float, pairs: float) -> Flops:
    """Transformer layers: query, key, value and output projections, two of the feed-forward, attention over pairs."""
    products = 2.0 * tokens * (4 * size**2 + 2 * size * ffn_size)
    scores = 2.0 * size * pairs
    return Flops(3 * (products + 2 * scores), again=scores, blocks=products + 2 * scores) * num_layers


def _performer(shape: PerformerShape, rows: float) -> Flops:
    """Performer blocks. Features are products with a projection that is not trained, so their backward is one product;
    the kernels make features and context again in the backward.
    """
    inner, size = shape.num_heads * shape.head_dim, shape.hidden_size
    wide = size * shape.ffn_mult
    products = 2.0 * rows * (4 * size * inner + size * wide * (3 if shape.glu else 2))
    width = shape.head_dim if shape.attention == "unprojected" else shape.features
    context = 2.0 * rows * inner * width
    features = 0.0 if shape.attention == "unprojected" else context
    norm = 2.0 * rows * shape.num_heads * width
    attention = 2 * features + 2 * context + norm
    backward = 2 * features + 4 * context + 2 * norm
    block = Flops(3 * products + attention + backward, again=attention, blocks=products + attention)
    return block * shape.num_layers


def _mvc(config: ScgptConfig, rows: float, num_cells: int) -> Flops:
    """Expression from a cell's embedding: a query a row, and a product a cell or a small network a row."""
    if not rows or config.mvc_style is None:
        return Flops()
    size, style = config.hidden_size, config.mvc_style
    cell = size + config.context_size
    key = cell if config.joint_mvc else size
    query = 2.0 * rows * key**2 * (2 if style.endswith("detach") else 3)
    if style.startswith("inner product"):
        return Flops(query + 3 * 2.0 * num_cells * key * cell * (2 if config.explicit_zeros else 1))
    return Flops(query + 3 * 2.0 * rows * (2 * key if style == "concat query" else key) * QUERY_SIZE)
