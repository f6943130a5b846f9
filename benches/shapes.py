"""The real model shapes and cell lengths that benches run on, written once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scfm.models.geneformer.config import GeneformerConfig

V1_10M = GeneformerConfig.preset("V1-10M")
V2_104M = GeneformerConfig.preset("V2-104M")


@dataclass(frozen=True)
class EncoderShape:
    """An encoder as its authors released it; num_tokens: of the cells it is timed on (the mean where they differ)."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    num_tokens: int
    num_features: int = 0  # of Performer's projection; 0 where attention is softmax


GENEFORMER = EncoderShape(
    "Geneformer V2-104M", V2_104M.num_layers, V2_104M.hidden_size, V2_104M.num_heads, V2_104M.head_dim,
    V2_104M.ffn_size, V2_104M.vocab_size, num_tokens=2000,
)  # fmt: skip
SCGPT = EncoderShape("scGPT whole-human", 12, 512, 8, 64, 512, vocab_size=60_697, num_tokens=1200)
SCBERT = EncoderShape("scBERT", 6, 200, 10, 64, 800, vocab_size=7, num_tokens=16_907, num_features=266)
SCFOUNDATION = EncoderShape("scFoundation", 12, 768, 12, 64, 3072, vocab_size=19_266, num_tokens=1200)
GRAPH_GENES, GRAPH_NEIGHBORS = 2000, 32


def cell_lengths(num_cells: int, *, mean: float = 2000.0, longest: int = 4096, seed: int = 0) -> np.ndarray:
    """Tokens a cell: log-normal as detected genes are in tissue atlases (medians of 840 to 3,000), clipped.

    Evenly spaced quantiles rather than draws, so that a few cells already have the distribution's mean.
    """
    quantiles = (np.arange(num_cells) + 0.5) / num_cells
    normal = np.sort(np.random.default_rng(seed).standard_normal(200_000))
    lengths = np.exp(0.5 * normal[(quantiles * normal.size).astype(int)])
    for _ in range(50):
        clipped = np.clip(lengths, 64, longest)
        lengths = lengths * (mean / clipped.mean())
    return np.clip(lengths, 64, longest).astype(int)


def forward_gflop(config: GeneformerConfig, lengths: np.ndarray, num_layers: int | None = None) -> float:
    """Multiply-adds counted as two: linear layers and attention of a full forward, head left out."""
    layers = config.num_layers if num_layers is None else num_layers
    linear = 2 * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.ffn_size)
    tokens, squares = float(lengths.sum()), float((lengths.astype(float) ** 2).sum())
    return layers * (linear * tokens + 4 * config.hidden_size * squares) / 1e9
