"""The feed of a training loop: the cells of this rank's microbatches, read, tokenized and made ready ahead of time.

The stream of microbatches is that of epoch 0, then 1, 2, ... without end. A step is the next ``microbatches_per_step``
of them (G), so every step is full and no cell is lost: a step may begin in one epoch and end in the next. Of each step
rank r of W takes the microbatches r G/W to (r + 1) G/W. Where the stream stands is {epoch, cursor}, the next microbatch
and nothing else: from there any number of ranks goes on with the very same steps.

Two threads work ahead, a bounded distance each. One reads this rank's cells of a whole window of the plan, with one
request a part, and tokenizes them in native code; the other cuts the tokens into microbatches and lets the objective
prepare them. There is no torch.distributed in here: ranks agree because all of them compute the same plan.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.data.packed import PackedCells
from scfm.data.windows import read_windows
from scfm.errors import ConfigError, InvalidArgumentError
from scfm.train.corpus.microbatch_plan import MicrobatchPlan
from scfm.train.corpus.read_ahead import ReadAhead
from scfm.train.objectives.prepared import Prepared

if TYPE_CHECKING:
    from scfm.train.config import PretrainConfig
    from scfm.train.corpus.corpus import Corpus
    from scfm.train.objectives.protocol import PretrainingObjective

__all__ = ["MicrobatchFeed", "StepBatch"]

# Steps that are ready before they are asked for.
STEPS_AHEAD = 4


@dataclass(frozen=True)
class StepBatch:
    """One optimiser step of this rank.

    microbatches: made ready, in order; places: (epoch, number in the epoch) of each; epoch: that of the whole step's
    first microbatch; next: (epoch, cursor) behind the whole step, where a run resumed after it starts; wait_s: seconds
    that the loop waited for it.
    """

    microbatches: list[Prepared]
    places: list[tuple[int, int]]
    epoch: int
    next: tuple[int, int]
    wait_s: float = 0.0


class MicrobatchFeed:
    """Iterate for StepBatch after StepBatch, without end; close it, or use it as a context manager.

    start: (epoch, cursor) of a StepBatch's ``next``. Raises ConfigError where the ranks cannot share a step evenly;
    iterating raises what reading, tokenizing and preparing raise, at the step that needs it.
    """

    def __init__(
        self,
        corpus: Corpus,
        objective: PretrainingObjective,
        config: PretrainConfig,
        rank: int = 0,
        world_size: int = 1,
        *,
        start: tuple[int, int] = (0, 0),
        steps_ahead: int = STEPS_AHEAD,
    ) -> None:
        self._corpus = corpus
        self._objective = objective
        self._config = config
        self._start = start
        self._step_size = config.microbatches_per_step
        self._mine = share_of(rank, world_size, self._step_size)
        self._first_plan = corpus.plan(start[0])
        if start[1] and self._first_plan.window_with(start[1] - 1) is None:
            raise InvalidArgumentError(
                f"microbatch {start[1]:,} of epoch {start[0]}, which has {self._first_plan.num_microbatches:,}",
                where="start",
            )
        self._steps = ReadAhead(self._prepare(), steps_ahead, name="microbatches")

    def __iter__(self) -> MicrobatchFeed:
        return self

    def __next__(self) -> StepBatch:
        begun = time.perf_counter()
        step = next(self._steps)
        return replace(step, wait_s=time.perf_counter() - begun)

    def close(self) -> None:
        self._steps.close()

    def __enter__(self) -> MicrobatchFeed:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _prepare(self) -> Generator[StepBatch, None, None]:
        """Steps, from windows of tokens."""
        microbatches: list[Prepared] = []
        places: list[tuple[int, int]] = []
        first_epoch = self._start[0]
        slot = 0
        with closing(ReadAhead(self._read(), 1, name="windows")) as windows:
            for window in windows:
                for number in window.numbers:
                    if slot == 0:
                        first_epoch = window.epoch
                    if slot in self._mine:
                        cells = window.cells_of(number)
                        microbatches.append(self._objective.prepare(cells, epoch=window.epoch))
                        places.append((window.epoch, number))
                    slot += 1
                    if slot == self._step_size:
                        is_last = window.ends_epoch and number == window.numbers[-1]
                        after = (window.epoch + 1, 0) if is_last else (window.epoch, number + 1)
                        yield StepBatch(microbatches, places, first_epoch, after)
                        microbatches, places, slot = [], [], 0

    def _read(self) -> Generator[_WindowTokens, None, None]:
        """Tokens of this rank's cells, window by window, epoch after epoch."""
        start, cursor = self._start
        slot = 0
        for epoch in count(start):
            plan = self._first_plan if epoch == start else self._corpus.plan(epoch)
            reading = _EpochReading(plan, cursor, slot, self._step_size, self._mine)
            with closing(read_windows(self._corpus.parts, reading)) as windows:
                for number, pieces in windows:
                    cells, bounds = reading.chosen(number)
                    packed = self._corpus.tokens(
                        cells, pieces, epoch=epoch, expect=self._objective.lengths_of
                    )
                    numbers = reading.numbers_of(number)
                    ends = bool(numbers) and plan.window_with(numbers[-1] + 1) is None
                    yield _WindowTokens(epoch, numbers, ends, packed, bounds)
            slot = (slot + plan.num_microbatches - cursor) % self._step_size
            cursor = 0


@dataclass(frozen=True)
class _WindowTokens:
    """numbers: the window's microbatches from the cursor on, of all ranks; ends_epoch: none come behind them; packed:
    the cells of this rank's; bounds: microbatch -> where its cells begin and end in ``packed``.
    """

    epoch: int
    numbers: range
    ends_epoch: bool
    packed: PackedCells
    bounds: dict[int, tuple[int, int]]

    def cells_of(self, number: int) -> PackedCells:
        """A microbatch's cells, not copied: they stand together."""
        start, stop = self.bounds[number]
        packed = self.packed
        offsets = packed.cu_seqlens[start : stop + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        return PackedCells(
            token_ids=packed.token_ids[tokens],
            values=None if packed.values is None else packed.values[tokens],
            cu_seqlens=offsets - offsets[0],
            cell_ids=packed.cell_ids[start:stop],
        )


class _EpochReading:
    """What one rank reads of an epoch, as a plan of windows; see scfm.data.windows.WindowPlan.

    cursor: the first microbatch wanted; slot: its place in a step of ``step_size``, of which ``mine`` are read.
    """

    def __init__(self, plan: MicrobatchPlan, cursor: int, slot: int, step_size: int, mine: range) -> None:
        self._plan = plan
        self._cursor = cursor
        self._slot = slot
        self._step_size = step_size
        self._mine = mine
        first = plan.window_with(cursor)
        self.numbers: Sequence[int] = range(plan.num_windows if first is None else first, plan.num_windows)

    def numbers_of(self, window: int) -> range:
        planned = self._plan.window(window)
        return range(max(planned.first, self._cursor), planned.first + planned.num_microbatches)

    def chosen(self, window: int) -> tuple[NDArray[np.int64], dict[int, tuple[int, int]]]:
        """This rank's cells of a window, microbatch by microbatch, and where each microbatch begins and ends."""
        planned = self._plan.window(window)
        cells = []
        bounds = {}
        end = 0
        for number in self.numbers_of(window):
            if (number - self._cursor + self._slot) % self._step_size in self._mine:
                start, stop = planned.bounds[number - planned.first : number - planned.first + 2]
                cells.append(planned.cells[start:stop])
                bounds[number] = (end, end := end + int(stop - start))
        return np.concatenate([*cells, np.empty(0, dtype=np.int64)]), bounds

    def joined(self, number: int) -> NDArray[np.int64]:
        return self.chosen(number)[0]

    def touching(self, part: int) -> Sequence[int]:
        return [number for number in self._plan.windows_of(part).tolist() if number in self.numbers]


def share_of(rank: int, world_size: int, microbatches_per_step: int) -> range:
    """Which microbatches of a step a rank takes. Raises ConfigError where they cannot be shared out evenly."""
    if microbatches_per_step % world_size:
        allowed = [n for n in range(1, microbatches_per_step + 1) if microbatches_per_step % n == 0]
        raise ConfigError(
            f"{microbatches_per_step} cannot be shared out evenly between {world_size} ranks",
            where="microbatches_per_step",
            hint=f"Possible numbers of ranks are {', '.join(map(str, allowed))}; or give a multiple of {world_size}.",
        )
    if not 0 <= rank < world_size:
        raise InvalidArgumentError(f"is {rank}, expected 0 to {world_size - 1}", where="rank")
    share = microbatches_per_step // world_size
    return range(rank * share, (rank + 1) * share)
