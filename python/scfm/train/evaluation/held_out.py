"""Evaluation during training: held-out cells beside baselines, labelled sets beside PCA. No score without them.

One call, on one rank with a whole model, gives numbers for the log and tables for people. What does not change with
the weights (baselines, PCA, the untrained model) is worked out the first time. The model is left as it was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from scfm.errors import ConfigError
from scfm.evaluate import Metric, Report, Row, paired_bootstrap
from scfm.models.base import FoundationModel
from scfm.train.config import PretrainConfig
from scfm.train.evaluation.embedding_probe import EmbeddingProbe
from scfm.train.evaluation.held_out_tasks import HeldOutTask, ItemScores, held_out_task
from scfm.train.new_model import new_model
from scfm.train.objectives.settings import objective_settings

if TYPE_CHECKING:
    from scfm.train.corpus.corpus import Corpus

__all__ = ["HeldOutEvaluation", "HeldOutResult"]

# Training cells that the baselines are counted on, at most.
BASELINE_CELLS = 4096
_NUM_RESAMPLES = 500


@dataclass(frozen=True)
class HeldOutResult:
    """metrics: numbers by name for a log: "held_out/loss", "held_out/baseline/unigram/loss", "probe/<set>/knn",
    "probe/<set>/pca-50/knn", ...; reports: the same as tables.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    reports: tuple[Report, ...] = ()

    def to_text(self) -> str:
        return "\n".join(report.to_text() for report in self.reports)


class HeldOutEvaluation:
    """Called with a model of the run: how it does on held-out cells and on the sets of ``config.probe``.

    corpus: measured. At most config.held_out_cells are looked at, of it and of each set. batch_labels: int64 (cells of
    the corpus,), for scGPTs that take them. Raises ConfigError for tables of ``probe`` that do not fit their file, at
    once.
    """

    def __init__(
        self, config: PretrainConfig, corpus: Corpus, *, batch_labels: NDArray[np.int64] | None = None
    ) -> None:
        self.config = config
        self.corpus = corpus
        self._batch_labels = batch_labels
        self._task: HeldOutTask | None = None
        names = _names([table["path"] for table in config.probe])
        self._probes = [
            EmbeddingProbe(
                table,
                name=names[number],
                where=f"probe[{number}]",
                layer=config.layer,
                folder=config.data_folder,
                most_cells=config.held_out_cells,
                seed=config.seed,
            )
            for number, table in enumerate(config.probe)
        ]
        if not self._probes and not corpus.num_held_out:
            raise ConfigError(
                "there is nothing to evaluate on: no held-out cell and no probe",
                where="evaluate_every",
                hint="Set held_out_fraction, or held_out in a table of data, or probe.",
            )

    @torch.no_grad()
    def __call__(self, model: FoundationModel) -> HeldOutResult:
        metrics: dict[str, float] = {}
        reports: list[Report] = []
        with _in_evaluation(model):
            if self.corpus.num_held_out:
                report = self._held_out(model)
                reports.append(report)
                metrics |= _held_out_metrics(report)
            for probe in self._probes:
                report = probe(model, partial(self._untrained, model))
                reports.append(report)
                metrics |= probe.metrics(report)
        return HeldOutResult(metrics, tuple(reports))

    def _held_out(self, model: FoundationModel) -> Report:
        config = self.config
        if self._task is None:
            self._training = self.corpus.training_pack(BASELINE_CELLS)
            self._cells = self.corpus.held_out_pack(config.held_out_cells)
            if not self._cells.num_cells:
                raise ConfigError("no held-out cell has a token", where="held_out_fraction")
            self._task = held_out_task(
                model,
                objective_settings(config.family, config.objective),
                self._cells,
                self._training,
                seed=config.seed,
                token_budget=config.token_budget,
                batch_labels=self._batch_labels,
            )
        scores = self._task.score(model)
        return _report(
            self._task,
            scores,
            num_train=self._training.num_cells,
            num_test=self._cells.num_cells,
            seed=config.seed,
        )

    def _untrained(self, model: FoundationModel) -> FoundationModel:
        """The run's model as it was before the first step."""
        num_labels = getattr(model.config, "num_batch_labels", 0)
        found = new_model(self.config, self.corpus, num_batch_labels=num_labels)
        return found.to(model.device).set_compute_dtype(model.compute_dtype).eval()


def _report(
    task: HeldOutTask, scores: dict[str, ItemScores], *, num_train: int, num_test: int, seed: int
) -> Report:
    ours, *others = scores
    has_guesses = scores[ours].correct is not None
    loss = Metric("loss", "lower", "nats" if has_guesses else "squared error", digits=4)
    metrics = (loss, Metric("accuracy")) if has_guesses else (loss,)
    rows = [Row("ours", "ours", _values(scores[ours]))]
    rows += [Row(name, "baseline", _values(one)) for name, one in task.baselines.items()]
    rows += [Row(f"ours, {name}", "control", _values(scores[name])) for name in others]
    gains = {
        (name, loss.name): paired_bootstrap(
            one.losses, scores[ours].losses, groups=task.cells, num_resamples=_NUM_RESAMPLES, seed=seed
        )
        for name, one in task.baselines.items()
    }
    return Report(
        title="Held-out cells",
        metrics=metrics,
        rows=tuple(rows),
        split="cells held out of training",
        num_train=num_train,
        num_test=num_test,
        seed=seed,
        gains=gains,
        notes=(f"{len(task.cells):,} {task.items}, the same for all; baselines from training cells",),
    )


def _values(scores: ItemScores) -> dict[str, float]:
    found = {"loss": float(scores.losses.mean())}
    if scores.correct is not None:
        found["accuracy"] = float(scores.correct.mean())
    return found


def _held_out_metrics(report: Report) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in report.rows:
        kind = {"ours": "", "baseline": "baseline/", "control": "head/"}[row.role]
        place = f"held_out/{kind}" + ("" if row.role == "ours" else f"{_slug(row.name)}/")
        found |= {place + metric: value for metric, value in row.values.items()}
    return found


def _slug(name: str) -> str:
    return name.removeprefix("ours, ").lower().replace("'", "").replace(",", "").replace(" ", "-")


def _names(paths: list[object]) -> list[str]:
    """A name for each set: its file's, numbered where several have the same."""
    stems = [Path(path).stem if isinstance(path, str | Path) else type(path).__name__ for path in paths]
    return [
        stem if stems.count(stem) == 1 else f"{stem}-{stems[: number + 1].count(stem)}"
        for number, stem in enumerate(stems)
    ]


@contextmanager
def _in_evaluation(model: FoundationModel) -> Iterator[None]:
    """Evaluation mode and no change of the caller's random numbers; each part of the model as it was, afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, was in training.items():
            module.training = was
