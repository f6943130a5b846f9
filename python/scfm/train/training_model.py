"""The model of a run: fresh, with what it is trained for; whole again when ranks share it; how it does meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.data.atomic_file import storage_errors, whole_file
from scfm.errors import ConfigError, ScfmWarning, StorageError
from scfm.models.base import FoundationModel
from scfm.train.config import PretrainConfig
from scfm.train.corpus.corpus import Corpus
from scfm.train.distributed.launch import World
from scfm.train.distributed.parallel import ParallelModel
from scfm.train.evaluation.held_out import HeldOutEvaluation, HeldOutResult
from scfm.train.objectives.protocol import PretrainingObjective, make_objective, new_model

__all__ = ["RunEvaluation", "batch_labels", "new_objective", "whole_model"]

EVALUATION = "evaluation.md"


def new_objective(config: PretrainConfig, corpus: Corpus, device: torch.device) -> PretrainingObjective:
    """The objective of a model with fresh weights, which ``objective.model`` is."""
    labels = batch_labels(config, corpus)
    num_labels = 0 if labels is None else int(labels.max()) + 1
    model = new_model(config, corpus, num_batch_labels=num_labels).to(device)
    model.set_compute_dtype(config.precision)
    return make_objective(config, model, batch_labels=labels)


def batch_labels(config: PretrainConfig, corpus: Corpus) -> NDArray[np.int64] | None:
    """Each cell's batch, numbered by the sorted names, where the objective has a column of obs for it.

    Raises ConfigError for cells without one.
    """
    name = config.objective.get("batch")
    if name is None:
        return None
    column = corpus.obs_column(name)
    missing = len(corpus) if column is None else int(column.isna().sum())
    if column is None or missing:
        raise ConfigError(
            f"{missing:,} of {len(corpus):,} cells have no value in the column {name!r} of obs",
            where="objective.batch",
        )
    codes, _ = pd.factorize(column.astype(str), sort=True)
    return codes.astype(np.int64)


def whole_model(config: PretrainConfig, corpus: Corpus, parallel: ParallelModel) -> FoundationModel:
    """The model with all its weights on this rank, in evaluation mode: itself, or of a sharded one a copy.

    All ranks must ask together.
    """
    if not parallel.is_sharded:
        return parallel.model.eval()
    return _copy(config, corpus, parallel, parallel.whole_state())


def _copy(
    config: PretrainConfig, corpus: Corpus, parallel: ParallelModel, weights: Mapping[str, Tensor]
) -> FoundationModel:
    model: FoundationModel = new_objective(config, corpus, parallel.model.device).model
    model.load_state_dict(weights)
    return model.eval()


class RunEvaluation:
    """Called by all ranks at the same step: rank 0 evaluates while the others wait. latest: what it found, on rank 0.

    The tables of the newest evaluation are in ``out``/evaluation.md.
    """

    def __init__(self, config: PretrainConfig, corpus: Corpus, world: World, parallel: ParallelModel) -> None:
        self._config = config
        self._corpus = corpus
        self._world = world
        self._parallel = parallel
        self.latest: HeldOutResult | None = None
        self._evaluate: HeldOutEvaluation | None = None
        with world.first_alone() as first:
            if first:
                labels = batch_labels(config, corpus)
                self._evaluate = HeldOutEvaluation(config, corpus, batch_labels=labels)

    def __call__(self, step: int) -> Mapping[str, Any]:
        """Numbers by name, of rank 0; nothing on the others."""
        parallel = self._parallel
        weights = parallel.whole_state(wanted=self._world.is_first) if parallel.is_sharded else None
        with self._world.first_alone():
            if self._evaluate is None:
                return {}
            model = (
                parallel.model if weights is None else _copy(self._config, self._corpus, parallel, weights)
            )
            self.latest = self._evaluate(model)
            self._write(step, self.latest)
            return self.latest.metrics

    def _write(self, step: int, found: HeldOutResult) -> None:
        """A disk that is full costs the tables, not the training."""
        tables = "\n".join(report.to_markdown() for report in found.reports)
        path = Path(self._config.out) / EVALUATION
        try:
            with storage_errors(path), whole_file(path) as temporary:
                temporary.write_text(f"# After {step:,} steps\n\n{tables}\n", encoding="utf-8")
        except StorageError as error:
            warnings.warn(f"{error}; training goes on", ScfmWarning, stacklevel=2)
