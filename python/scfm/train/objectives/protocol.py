"""What the training loop knows of a family: cells to a prepared microbatch, a microbatch to sums of losses.

The loss of a step is

    sum over terms of  weight * (sum over all microbatches of all ranks of losses()) / (the same sum of counts)

so it never depends on how cells were packed or on how many ranks there are. Preparation runs on CPU beside the
training, and draws by (seed, epoch, cell) only; losses() runs inside the forward of whatever wraps the model.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import ConfigError
from scfm.models.base import FoundationModel
from scfm.models.geneformer.model import Geneformer
from scfm.models.scbert.model import Scbert
from scfm.models.scfoundation.model import Scfoundation
from scfm.models.scgpt.model import Scgpt
from scfm.train.config import PretrainConfig
from scfm.train.new_model import new_model
from scfm.train.objectives.geneformer_pretraining import GeneformerPretraining
from scfm.train.objectives.prepared import Prepared
from scfm.train.objectives.scbert_pretraining import ScbertPretraining
from scfm.train.objectives.scfoundation_pretraining import ScfoundationPretraining
from scfm.train.objectives.scgpt_pretraining import ScgptGenerative, ScgptMasked
from scfm.train.objectives.settings import (
    GeneformerSettings,
    ScbertSettings,
    ScfoundationSettings,
    ScgptSettings,
    objective_settings,
)

__all__ = ["Prepared", "PretrainingObjective", "make_objective", "new_model"]


class PretrainingObjective(Protocol):
    """model: unwrapped; weights: of the terms that count at the step that ``at_step`` was last told."""

    model: Any
    family: str
    weights: dict[str, float]

    def lengths_of(self, packed: PackedCells) -> Tensor:
        """Positions that are computed for each cell, int64 (C,): what a microbatch's token budget counts."""
        ...

    def prepare(self, packed: PackedCells, *, epoch: int) -> Prepared:
        """Masks and targets of these cells, on CPU; depends on (seed, epoch, cell) only. Any thread may call it."""
        ...

    def losses(self, prepared: Prepared) -> dict[str, Tensor]:
        """Each term's sum over its ``prepared.counts`` units, 0-dim with gradient; only terms in ``weights``."""
        ...

    def at_step(self, step: int) -> dict[str, float]:
        """Weights of the terms at this optimiser step, counted from 0; call it before the step's losses."""
        ...


def make_objective(
    config: PretrainConfig, model: FoundationModel, *, batch_labels: NDArray[np.int64] | None = None
) -> PretrainingObjective:
    """The family's objective with ``config.objective``. Raises ConfigError naming the setting.

    batch_labels: int64 (cells of the corpus,), each cell's batch, where ``objective.batch`` names a column.
    """
    settings = objective_settings(config.family, config.objective)
    if isinstance(model, Geneformer) and isinstance(settings, GeneformerSettings):
        return GeneformerPretraining(model, settings, seed=config.seed)
    if isinstance(model, Scgpt) and isinstance(settings, ScgptSettings):
        if settings.kind == "generative":
            return ScgptGenerative(model, settings, seed=config.seed)
        return ScgptMasked(model, settings, seed=config.seed, batch_labels=batch_labels)
    if isinstance(model, Scbert) and isinstance(settings, ScbertSettings):
        return ScbertPretraining(model, settings, seed=config.seed)
    if isinstance(model, Scfoundation) and isinstance(settings, ScfoundationSettings):
        return ScfoundationPretraining(model, settings, seed=config.seed)
    raise ConfigError(f"{config.family!r}; the model is a {type(model).__name__}", where="family")
