"""Geneformer's pretraining: masked genes, as sums that any number of ranks can add up.

One term, "masked_genes": the cross-entropy of the chosen tokens in nats, over their number. The vocabulary-wide head
runs on these rows only. See geneformer.py for which tokens are chosen and what is shown of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.models.geneformer.model import Geneformer
from scfm.train.objectives.geneformer import mask_genes
from scfm.train.objectives.prepared import Prepared
from scfm.train.objectives.settings import GeneformerSettings

__all__ = ["GeneformerPretraining", "MaskedGenes"]

TERM = "masked_genes"


@dataclass(frozen=True)
class MaskedGenes(Prepared):
    """positions: int64 (M,), the chosen tokens of the pack; targets: int64 (M,), what they were."""

    positions: Tensor
    targets: Tensor


class GeneformerPretraining:
    """Masked genes of a Geneformer with its vocabulary; see PretrainingObjective."""

    family = "geneformer"

    def __init__(self, model: Geneformer, settings: GeneformerSettings, *, seed: int) -> None:
        self.model = model
        self.settings = settings
        self.seed = seed
        self.weights = {TERM: 1.0}

    def at_step(self, step: int) -> dict[str, float]:
        return self.weights

    def lengths_of(self, packed: PackedCells) -> Tensor:
        return packed.lengths.to(torch.int64)

    def prepare(self, packed: PackedCells, *, epoch: int) -> MaskedGenes:
        cells = mask_genes(
            packed, self.model, seed=self.seed, epoch=epoch, mask_ratio=self.settings.mask_ratio
        )
        counts = {TERM: len(cells.positions)}
        return MaskedGenes(cells.packed, counts, packed.num_tokens, cells.positions, cells.targets)

    def losses(self, prepared: Prepared) -> dict[str, Tensor]:
        assert isinstance(prepared, MaskedGenes)
        hidden = self.model(prepared.packed).hidden
        rows = hidden.index_select(0, prepared.positions.to(hidden.device))
        return {TERM: self.model.masked_gene_losses(rows, prepared.targets.to(hidden.device)).sum()}
