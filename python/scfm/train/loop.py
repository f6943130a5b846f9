"""The optimiser steps of a run, the same numbers whatever the number of ranks that share them.

One step, on every rank at once:

    counts of all ranks (units of each term, cells, tokens, requests to stop)       one sum of whole numbers
    forward and backward of this rank's microbatches                                gradients summed with the last one
    sums of losses, and which rank saw one that is not finite                       one sum of float64
    clip, optimiser                                                                 only where all was finite everywhere

The learning rate follows the tokens seen, never the clock. Dropout is seeded by (seed, epoch, microbatch). What a step
computes therefore depends on the settings, the cells and the state before it, and a run that was killed goes on to the
same numbers from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scfm.errors import ScfmError
from scfm.train.checkpoint import CheckpointStore, TrainState
from scfm.train.config import PretrainConfig
from scfm.train.corpus.feed import MicrobatchFeed, StepBatch
from scfm.train.cost.device_peaks import peak_flops
from scfm.train.cost.flops import microbatch_flops
from scfm.train.distributed.launch import World
from scfm.train.distributed.parallel import ParallelModel
from scfm.train.distributed.projection_redraw import ProjectionRedraw
from scfm.train.distributed.step_agreement import StepLosses, StepTotals
from scfm.train.distributed.stop_request import StopRequest
from scfm.train.metrics import MetricsLog, StepMetrics, peak_memory_bytes
from scfm.train.objectives.prepared import Prepared
from scfm.train.objectives.protocol import PretrainingObjective
from scfm.train.schedule import learning_rate_factor

__all__ = ["Evaluation", "TrainingLoop", "is_done"]

Evaluation = Callable[[int], Mapping[str, Any]]
Progress = Callable[[dict[str, Any]], None]
_PURPOSE_DROPOUT = 0x64726F70  # "drop"


def is_done(config: PretrainConfig, state: TrainState) -> bool:
    """Whether all epochs are through or the last step is taken. The last step may reach into one epoch more."""
    limit = config.max_steps
    return state.epoch >= config.num_epochs or (limit is not None and state.step >= limit)


class TrainingLoop:
    """The run between two checkpoints: from ``state`` to the end, or to the step at which the ranks agree to stop.

    state: steps, position and tokens so far, kept up to date. total_tokens: of the whole run. evaluate: called with the
    step by every rank alike, gives what rank 0 found. log, progress: of rank 0, None on the others.
    """

    def __init__(
        self,
        config: PretrainConfig,
        world: World,
        objective: PretrainingObjective,
        parallel: ParallelModel,
        store: CheckpointStore,
        state: TrainState,
        *,
        total_tokens: int,
        optimizer: torch.optim.Optimizer,
        evaluate: Evaluation | None,
        log: MetricsLog | None,
        progress: Progress | None,
    ) -> None:
        self.config = config
        self.world = world
        self.objective = objective
        self.parallel = parallel
        self.store = store
        self.state = state
        self._optimizer = optimizer
        self._total_tokens = max(total_tokens, 1)
        self._evaluate = evaluate
        self._log = log
        self._progress = progress
        self._redraw = ProjectionRedraw(parallel.model)
        self._bad_steps = 0
        self._saved_at: int | None = state.step or None
        peak = peak_flops(world.device, parallel.model.compute_dtype)
        self._peak = None if peak is None else peak * world.size

    def share_done(self) -> float:
        """How much of the run is behind, in [0, 1]: of its tokens, or of max_steps where that is more."""
        by_tokens = self.state.tokens_seen / self._total_tokens
        by_steps = self.state.step / self.config.max_steps if self.config.max_steps else 0.0
        return min(max(by_tokens, by_steps), 1.0)

    def run(self, feed: MicrobatchFeed, stop: StopRequest) -> str | None:
        """Train until it is done (None), or until a reason to stop, which is returned; a checkpoint is written then.

        Raises ScfmError after max_bad_steps steps in a row whose loss or gradient was not finite.
        """
        model = self.parallel.model
        model.train()
        reason = None
        self._start = time.perf_counter()
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        try:
            # Dropout is seeded at every microbatch; the caller's generator is not ours to change.
            with torch.random.fork_rng(devices):
                while not is_done(self.config, self.state) and reason is None:
                    self.world.watch()
                    reason = self._step(feed, stop)
                    self.store.poll()
        except BaseException:
            if self.world.size == 1:  # several ranks can no longer agree on what is whole
                self.store.finish()
            raise
        finally:
            self._redraw.release()
        if self._saved_at != self.state.step:
            self._save()
        self.store.finish()
        model.eval()
        if reason is not None:
            self._tell("stopping", why=reason)
        return reason

    # ---- one step -----------------------------------------------------------------------------------------------

    def _step(self, feed: MicrobatchFeed, stop: StopRequest) -> str | None:
        begun = time.perf_counter()
        batch = next(feed)
        weights = self.objective.at_step(self.state.step)
        totals = StepTotals.agreed(
            self.world,
            batch.microbatches,
            list(weights),
            flops=self._flops(batch.microbatches),
            stops=stop.notes(),
        )
        reason = StopRequest.agreed(totals.stops)
        if reason is not None:
            return reason
        rate = self._set_learning_rate()
        self._redraw.before_step(self.config.microbatches_per_step)
        sums = self._backward(batch, weights, totals.counts)
        norm = self.parallel.gradient_norm()
        losses = StepLosses.agreed(self.world, sums, norm)
        if not losses.bad:
            self.parallel.clip_gradients(norm, self.config.clip_norm)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._advance(batch, totals)
        took = time.perf_counter() - begun
        means = {term: losses.sums[term] / max(totals.counts[term], 1) for term in weights}
        self._report(
            StepMetrics(
                step=self.state.step,
                epoch=batch.epoch,
                loss=sum(weights[term] * mean for term, mean in means.items()),
                terms=means,
                grad_norm=losses.norm,
                learning_rate=rate,
                tokens=totals.num_tokens,
                cells=totals.num_cells,
                step_s=took,
                data_wait_s=batch.wait_s,
                memory_bytes=peak_memory_bytes(self.world.device),
                mfu=None if self._peak is None else totals.flops / (took * self._peak),
                progress=self.share_done(),
                seconds=time.perf_counter() - self._start,
                applied=not losses.bad,
                extra=self._evaluated(),
            )
        )
        self._count_bad_steps(losses, means)
        if self.config.checkpoint_every and self.state.step % self.config.checkpoint_every == 0:
            self._save()
        return None

    def _backward(
        self, batch: StepBatch, weights: Mapping[str, float], counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Gradients of the whole step; this rank's sum of each term, float64 on the device."""
        device = self.world.device
        sums = {term: torch.zeros((), dtype=torch.float64, device=device) for term in weights}
        last = len(batch.microbatches) - 1
        for i, (prepared, (epoch, number)) in enumerate(zip(batch.microbatches, batch.places, strict=True)):
            torch.manual_seed(_dropout_seed(self.config.seed, epoch, number))
            found = self.parallel.microbatch(prepared, weights, counts, is_last=i == last)
            for term in weights:
                sums[term] += found[term]
        return sums

    def _flops(self, microbatches: Sequence[Prepared]) -> float:
        """What this rank's share of the step takes; 0 where there is no peak to measure it against."""
        if self._peak is None:
            return 0.0
        return sum(microbatch_flops(self.objective, prepared).model for prepared in microbatches)

    def _set_learning_rate(self) -> float:
        factor = learning_rate_factor(
            self.share_done(), warmup_ratio=self.config.warmup_ratio, schedule=self.config.schedule
        )
        rate = self.config.learning_rate * factor
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _advance(self, batch: StepBatch, totals: StepTotals) -> None:
        epoch, cursor = batch.next
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            epoch=epoch,
            cursor=cursor,
            # Of the plan, like the total: a schedule must reach its end also where fewer are computed.
            tokens_seen=self.state.tokens_seen + totals.planned_tokens,
            cells_seen=self.state.cells_seen + totals.num_cells,
        )

    # ---- what happens between steps ---------------------------------------------------------------------------------

    def _evaluated(self) -> Mapping[str, Any]:
        """Every ``evaluate_every`` steps and after the last one."""
        every = self.config.evaluate_every
        if self._evaluate is None or not every:
            return {}
        if self.state.step % every and not is_done(self.config, self.state):
            return {}
        found = self._evaluate(self.state.step)
        self.parallel.model.train()
        return found

    def _count_bad_steps(self, losses: StepLosses, means: Mapping[str, float]) -> None:
        if not losses.bad:
            self._bad_steps = 0
            return
        self._bad_steps += 1
        why = f"not finite: {'; '.join(losses.bad)}"
        self._tell("skipped", why=why)
        if self._bad_steps < self.config.max_bad_steps:
            return
        self.store.finish()
        good = self.store.last
        kept = "no checkpoint was written yet" if good is None else f"the last good checkpoint is {good}"
        shown = ", ".join(f"{term} {mean:.6g}" for term, mean in means.items())
        raise ScfmError(
            f"{self._bad_steps} steps in a row were not applied; {why} (losses: {shown}; norm of the gradient "
            f"{losses.norm:.6g}); {kept}",
            where=f"step {self.state.step}",
            hint="Lower the learning rate, lengthen the warm-up, or look at the data of these steps.",
        )

    def _save(self) -> None:
        self.store.save(self.state, self.parallel.model, self._optimizer)
        self._saved_at = self.state.step

    def _report(self, metrics: StepMetrics) -> None:
        if self._log is not None:
            line = self._log.step(metrics)
            if self._progress is not None:
                self._progress(line)

    def _tell(self, event: str, **facts: Any) -> None:
        if self._log is not None:
            self._log.event(event, self.state.step, **facts)
            if self._progress is not None:
                self._progress({"event": event, "step": self.state.step, **facts})


def _dropout_seed(seed: int, epoch: int, number: int) -> int:
    words = np.random.SeedSequence([seed, _PURPOSE_DROPOUT, epoch, number]).generate_state(1, np.uint64)
    return int(words[0] >> 1)
