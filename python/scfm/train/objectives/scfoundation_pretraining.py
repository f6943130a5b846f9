"""scFoundation's pretraining: read-depth recovery, as sums that any number of ranks can add up.

One term, "hidden_genes": squared errors of the hidden genes' ln(1 + CP10k) at the cell's real depth, over their number.
See scfoundation.py for what is hidden and what is shown. A cell costs the tokens that the encoder sees and
all positions in the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.models.scfoundation.model import Scfoundation
from scfm.train.objectives.losses import squared_errors
from scfm.train.objectives.prepared import Prepared
from scfm.train.objectives.scfoundation import hide_genes
from scfm.train.objectives.settings import ScfoundationSettings

__all__ = ["ReadDepthCells", "ScfoundationPretraining"]

TERM = "hidden_genes"


@dataclass(frozen=True)
class ReadDepthCells(Prepared):
    """most_tokens: num_tokens with nothing hidden. late: what the decoder sees of the hidden genes. cells, positions:
    int64 (M,), the hidden genes; targets: float32 (M,), ln(1 + CP10k) of the whole cell.
    """

    most_tokens: int
    late: PackedCells
    cells: Tensor
    positions: Tensor
    targets: Tensor

    @property
    def planned_tokens(self) -> int:
        return self.most_tokens


class ScfoundationPretraining:
    """Read-depth recovery of a scFoundation; see PretrainingObjective."""

    family = "scfoundation"

    def __init__(self, model: Scfoundation, settings: ScfoundationSettings, *, seed: int) -> None:
        self.model = model
        self.settings = settings
        self.seed = seed
        self.weights = {TERM: 1.0}

    def at_step(self, step: int) -> dict[str, float]:
        return self.weights

    def lengths_of(self, packed: PackedCells) -> Tensor:
        """Most positions of a cell: of its tokens some are hidden from the encoder."""
        return packed.lengths.to(torch.int64) + self.model.config.vocab_size

    def prepare(self, packed: PackedCells, *, epoch: int) -> ReadDepthCells:
        found = hide_genes(
            packed,
            self.model,
            seed=self.seed,
            epoch=epoch,
            deep_cell=self.settings.deep_cell,
            down_sampled=self.settings.down_sampled,
        )
        num_tokens = found.shown.num_tokens + packed.num_cells * self.model.config.vocab_size
        counts = {TERM: len(found.targets)}
        return ReadDepthCells(
            found.shown,
            counts,
            num_tokens,
            most_tokens=int(self.lengths_of(packed).sum()),
            late=found.late,
            cells=found.cells,
            positions=found.positions,
            targets=found.targets,
        )

    def losses(self, prepared: Prepared) -> dict[str, Tensor]:
        assert isinstance(prepared, ReadDepthCells)
        out = self.model(prepared.packed, late=prepared.late, kmax_scope=self.settings.kmax_scope)
        prediction = out.prediction
        device = prediction.device
        found = prediction[prepared.cells.to(device), prepared.positions.to(device)]
        return {TERM: squared_errors(found, prepared.targets.to(device)).sum()}
