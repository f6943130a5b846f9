"""Pretraining from end to end: the corpus, a fresh model or the newest checkpoint, the loop, the saved model.

    out/
        settings.json       the run's settings
        metrics.jsonl       a line a step (metrics.py)
        evaluation.md       held-out cells and probes beside their baselines, newest (evaluation/held_out.py)
        checkpoints/        where a run that was stopped or killed goes on (checkpoint/)
        corpus/             vocabulary and lengths of the cells, found once (corpus/folder.py)
        model/              the trained model; it appears when the run is finished, whole

The same call begins a run, goes on with one that was interrupted, and gives the result of one that is finished. Under
torchrun every rank makes it.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scfm import __version__
from scfm.data.atomic_file import whole_file
from scfm.errors import ConfigError
from scfm.models.base import FoundationModel
from scfm.train.checkpoint import (
    CheckpointStore,
    FoundCheckpoint,
    TrainState,
    compare_settings,
    expect_same_data,
)
from scfm.train.config import PretrainConfig
from scfm.train.corpus.corpus import Corpus, read_corpus
from scfm.train.corpus.feed import MicrobatchFeed
from scfm.train.distributed.launch import World, joined
from scfm.train.distributed.parallel import ParallelModel
from scfm.train.distributed.run_lock import RunLock
from scfm.train.distributed.stop_request import StopRequest
from scfm.train.evaluation.held_out import HeldOutResult
from scfm.train.loop import TrainingLoop, is_done
from scfm.train.metrics import FILE_NAME, MetricsLog, require_tensorboard
from scfm.train.training_model import RunEvaluation, new_objective, whole_model

__all__ = ["PretrainResult", "pretrain"]

ProgressCallback = Callable[[dict[str, Any]], None]
CHECKPOINTS, MODEL, SETTINGS = "checkpoints", "model", "settings.json"


@dataclass(frozen=True)
class PretrainResult:
    """model: as trained so far, in evaluation mode. folder: where it was saved, None where the run stopped early;
    stopped: why, "SIGTERM", "SIGUSR1" or "max_minutes", or None. metrics_file: one JSON line a step. step: steps done;
    checkpoint: the newest. evaluation: the last one of this process, on rank 0.
    """

    model: FoundationModel
    folder: Path | None
    metrics_file: Path
    tokenizer: Any
    corpus: Corpus
    step: int
    checkpoint: Path | None
    stopped: str | None = None
    evaluation: HeldOutResult | None = None

    @property
    def finished(self) -> bool:
        return self.stopped is None

    def to_dict(self) -> dict[str, Any]:
        """In plain words and numbers, for a program or a person."""
        facts = {"model": self.folder, "metrics": self.metrics_file, "checkpoint": self.checkpoint}
        shown: dict[str, Any] = {name: str(path) for name, path in facts.items() if path is not None}
        scores = {} if self.evaluation is None else {"evaluation": self.evaluation.metrics}
        return {**shown, "steps": self.step, "stopped": self.stopped, **scores}


def pretrain(
    config: PretrainConfig | Mapping[str, Any] | str | Path, *, progress: ProgressCallback | None = None
) -> PretrainResult:
    """Pretrain a model on raw counts and save it under ``config.out``; see the head of this file.

    config: settings, a mapping of them or a TOML file; progress: called on rank 0 with each step's metrics, and with
    events such as {"event": "resumed", "step": 100, ...}. SIGTERM and SIGUSR1 stop the run after the step at hand, with
    a checkpoint. Raises ConfigError for settings, also for those that a resumed run may not change, IntegrityError for
    data that changed, the readers' errors for data, and ScfmError when losses stop being finite. Among several ranks an
    error is printed and ends the process (distributed/launch.py).
    """
    config = _settings(config)
    with joined(config.device, config.timeout_seconds) as world:
        return _pretrain(config, world, progress if world.is_first else None)


def _settings(config: PretrainConfig | Mapping[str, Any] | str | Path) -> PretrainConfig:
    if isinstance(config, PretrainConfig):
        return config
    if isinstance(config, str | Path):
        return PretrainConfig.from_file(config)
    if isinstance(config, Mapping):
        return PretrainConfig.from_mapping(config)
    raise ConfigError(f"is a {type(config).__name__}; expected settings or a TOML file", where="config")


def _pretrain(config: PretrainConfig, world: World, progress: ProgressCallback | None) -> PretrainResult:
    out = Path(config.out)
    if config.tensorboard:
        require_tensorboard()
    with _only_job(out, world):
        store = CheckpointStore(out / CHECKPOINTS, config.keep_last, config.keep_every)
        found = _checkpoint(config, store)
        corpus = read_corpus(config, rank=world.rank, watch=world.watch)
        objective = new_objective(config, corpus, world.device)
        corpus.measure(objective.lengths_of)
        world.watch()
        if found is not None:
            expect_same_data(corpus.differences(found.state.data_fingerprint), config.allow_change)
        if world.is_first:
            with whole_file(out / SETTINGS) as temporary:
                temporary.write_text(config.to_json() + "\n", encoding="utf-8")
        parallel = ParallelModel(objective, config, world)
        optimizer = torch.optim.AdamW(
            parallel.parameter_groups(config.weight_decay), lr=config.learning_rate, fused=True
        )
        before = (
            TrainState(0, 0, 0, config.seed)
            if found is None
            else store.load(found, objective.model, optimizer)
        )
        state = _state_of(config, before, corpus, world)
        evaluation = RunEvaluation(config, corpus, world, parallel) if config.evaluate_every else None
        with ExitStack() as stack:
            log = None
            if world.is_first and not is_done(config, state):
                log = stack.enter_context(_log(config, before, found, progress))
            start = (state.epoch, state.cursor)
            feed = MicrobatchFeed(corpus, objective, config, world.rank, world.size, start=start)
            stack.enter_context(feed)
            loop = TrainingLoop(
                config,
                world,
                objective,
                parallel,
                store,
                state,
                total_tokens=config.num_epochs * corpus.num_tokens,
                optimizer=optimizer,
                evaluate=evaluation,
                log=log,
                progress=progress,
            )
            stopped = loop.run(feed, stack.enter_context(StopRequest(config.max_minutes)))
        whole = whole_model(config, corpus, parallel)
        parallel.release()
        if stopped is None:
            with world.first_alone() as first:
                if first:
                    _save(whole, out / MODEL, is_new=loop.state.step > before.step)
        return PretrainResult(
            model=whole,
            folder=out / MODEL if stopped is None else None,
            metrics_file=out / FILE_NAME,
            tokenizer=corpus.tokenizer,
            corpus=corpus,
            step=loop.state.step,
            checkpoint=store.last,
            stopped=stopped,
            evaluation=None if evaluation is None else evaluation.latest,
        )


def _state_of(config: PretrainConfig, before: TrainState, corpus: Corpus, world: World) -> TrainState:
    """Where this process begins: as before, in the next epoch if an allowed change made this one shorter than that."""
    is_behind = before.cursor and corpus.plan(before.epoch).window_with(before.cursor - 1) is None
    return replace(
        before,
        epoch=before.epoch + 1 if is_behind else before.epoch,
        cursor=0 if is_behind else before.cursor,
        world_size=world.size,
        settings=config.identity(),
        data_fingerprint=corpus.fingerprint,
        versions={"scfm": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    )


def _checkpoint(config: PretrainConfig, store: CheckpointStore) -> FoundCheckpoint | None:
    """The checkpoint that the run goes on from, if there is one and the settings are those of the run."""
    out = Path(config.out)
    found = store.newest()
    if found is None and (out / MODEL).exists():
        raise ConfigError(
            "already holds a model that is of no run",
            path=out / MODEL,
            where="out",
            hint="Choose another folder.",
        )
    if found is not None:
        if not config.resume:
            raise ConfigError(
                f"already holds a run, with a checkpoint of step {found.step}, and resume is false",
                path=out,
                where="resume",
                hint="Choose another folder, or go on with resume=true.",
            )
        compare_settings(found.state.settings, config.identity(), config.allow_change)
    return found


def _log(
    config: PretrainConfig,
    state: TrainState,
    found: FoundCheckpoint | None,
    progress: ProgressCallback | None,
) -> MetricsLog:
    """The run's log; of a resumed one it says from where, as does the callback."""
    if found is None:
        return MetricsLog(config.out, tensorboard=config.tensorboard)
    facts = {
        "checkpoint": found.path.name,
        "world_size_before": state.world_size,
        "skipped": list(found.skipped),
    }
    log = MetricsLog(config.out, tensorboard=config.tensorboard, resumed_at=state.step, **facts)
    if progress is not None:
        progress({"event": "resumed", "step": state.step, **facts})
    return log


def _save(model: FoundationModel, folder: Path, *, is_new: bool) -> None:
    """The family's folder. An older model of the run gives way to one that was trained further."""
    if folder.exists():
        if not is_new:
            return
        shutil.rmtree(folder)
    model.save(folder)


@contextmanager
def _only_job(out: Path, world: World) -> Iterator[None]:
    """Rank 0 holds the folder's lock; the others go on when it has it."""
    with ExitStack() as stack:
        if world.is_first:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(RunLock(out))
        world.meet()
        yield
