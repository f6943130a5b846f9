"""scBERT's pretraining: hidden bins, as sums that any number of ranks can add up.

One term, "hidden_bins": the cross-entropy of the bins that are asked for, in nats, over their number. See
scbert.py for which these are. Every position of the panel is computed in every cell, expressed or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import ConfigError
from scfm.models.scbert.model import Scbert
from scfm.train.objectives.prepared import Prepared
from scfm.train.objectives.scbert import hide_bins
from scfm.train.objectives.settings import ScbertSettings

__all__ = ["AskedBins", "ScbertPretraining"]

TERM = "hidden_bins"


@dataclass(frozen=True)
class AskedBins(Prepared):
    """rows: int64 (M,), which of the C * P positions are asked for; targets: int64 (M,), their bins."""

    rows: Tensor
    targets: Tensor


class ScbertPretraining:
    """Hidden bins of a scBERT; see PretrainingObjective."""

    family = "scbert"

    def __init__(self, model: Scbert, settings: ScbertSettings, *, seed: int) -> None:
        self.model = model
        self.settings = settings
        self.seed = seed
        self.weights = {TERM: 1.0}
        if model.to_out is None and not model.config.tied_head:
            raise ConfigError("the model has no head for bins", where="model.has_bin_head")

    def at_step(self, step: int) -> dict[str, float]:
        return self.weights

    def lengths_of(self, packed: PackedCells) -> Tensor:
        return torch.full((packed.num_cells,), self.model.config.num_positions, dtype=torch.int64)

    def prepare(self, packed: PackedCells, *, epoch: int) -> AskedBins:
        cells = hide_bins(
            packed,
            self.model,
            seed=self.seed,
            epoch=epoch,
            mask_ratio=self.settings.mask_ratio,
            replaced=self.settings.replaced,
        )
        num_tokens = packed.num_cells * self.model.config.num_positions
        return AskedBins(cells.packed, {TERM: len(cells.rows)}, num_tokens, cells.rows, cells.targets)

    def losses(self, prepared: Prepared) -> dict[str, Tensor]:
        assert isinstance(prepared, AskedBins)
        hidden = self.model(prepared.packed, kmax_scope=self.settings.kmax_scope).hidden
        scores = self.model.bin_scores(hidden.index_select(0, prepared.rows.to(hidden.device)))
        targets = prepared.targets.to(hidden.device)
        return {TERM: F.cross_entropy(scores.float(), targets, reduction="sum")}
