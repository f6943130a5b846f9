"""The feed: every rank's share of every step, from any place, ahead of time; and how it fails and ends."""

from __future__ import annotations

import _thread
import threading
import time
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.data.packed import PackedCells
from scfm.errors import ConfigError, InvalidArgumentError, ScfmError
from scfm.train.corpus.feed import MicrobatchFeed, share_of
from scfm.train.corpus.microbatch_plan import MicrobatchPlan
from scfm.train.corpus.read_ahead import ReadAhead
from scfm.train.objectives.prepared import Prepared


class Part:
    """A source whose block of some cells is their positions. asked: every request."""

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self.asked: list[list[int]] = []
        self.report: Any = None

    def __len__(self) -> int:
        return self.num_cells

    def gather(self, requests, report, *, empty_bad_cells):
        for cells in requests:
            self.asked.append(cells.tolist())
            yield cells

    def tell(self, report) -> None:
        pass


class Cells:
    """What the feed needs of a corpus; a cell's tokens are its number, ``lengths`` times."""

    def __init__(
        self, lengths, num_cells, *, token_budget: int, block_size: int = 4, window: int = 16
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.uint16)
        self.parts = [Part(n) for n in num_cells]
        self._shape = {"token_budget": token_budget, "block_size": block_size, "window": window}

    def plan(self, epoch: int) -> MicrobatchPlan:
        return MicrobatchPlan(self.lengths, [len(p) for p in self.parts], seed=5, epoch=epoch, **self._shape)

    def tokens(self, cells, pieces, *, epoch, expect) -> PackedCells:
        firsts = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])
        read = np.full(len(cells), -1)
        for piece in pieces:
            np.testing.assert_array_equal(piece.block, piece.cells)
            read[piece.slots] = piece.cells + firsts[piece.part]
        np.testing.assert_array_equal(read, cells)
        lengths = self.lengths[cells].astype(np.int64)
        return PackedCells(
            torch.from_numpy(np.repeat(cells, lengths).astype(np.int32)),
            None,
            torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
            torch.from_numpy(cells),
        )

    def stream(self, num_microbatches: int) -> list[tuple[int, int, list[int]]]:
        """The first microbatches of the endless stream: epoch, number, cells."""
        found: list[tuple[int, int, list[int]]] = []
        epoch = 0
        while len(found) < num_microbatches:
            plan = self.plan(epoch)
            found += [(epoch, i, plan.microbatch(i).tolist()) for i in range(plan.num_microbatches)]
            epoch += 1
        return found[:num_microbatches]


class Objective:
    """Prepares nothing; fails at the microbatch whose number of calls is ``fails_at``."""

    def __init__(self, fails_at: int | None = None, seconds: float = 0.0) -> None:
        self.fails_at, self.seconds, self.num_calls = fails_at, seconds, 0

    def lengths_of(self, packed: PackedCells) -> torch.Tensor:
        return packed.lengths.to(torch.int64)

    def prepare(self, packed: PackedCells, *, epoch: int) -> Prepared:
        if self.num_calls == self.fails_at:
            raise ScfmError("no such mask")
        self.num_calls += 1
        time.sleep(self.seconds)
        expected = torch.repeat_interleave(packed.cell_ids, packed.lengths.to(torch.int64))
        assert torch.equal(packed.token_ids.to(torch.int64), expected)
        return Prepared(packed, {"tokens": packed.num_tokens}, packed.num_tokens)


def feed_of(corpus, step_size: int, rank: int = 0, world_size: int = 1, **more: Any) -> MicrobatchFeed:
    config: Any = SimpleNamespace(microbatches_per_step=step_size)
    objective = more.pop("objective", None) or Objective()
    return MicrobatchFeed(corpus, objective, config, rank, world_size, **more)


def steps_of(corpus, step_size: int, num_steps: int, rank: int = 0, world_size: int = 1, **more: Any):
    """[(epoch, number, cells) of the rank's microbatches] of each step, and each step's next."""
    with feed_of(corpus, step_size, rank, world_size, **more) as feed:
        steps = list(islice(feed, num_steps))
    cells = [
        [
            (*place, prepared.cell_ids.tolist())
            for place, prepared in zip(step.places, step.microbatches, strict=True)
        ]
        for step in steps
    ]
    return cells, [step.next for step in steps]


@st.composite
def corpora(draw: st.DrawFn) -> Cells:
    """Parts of no, one, few or a prime number of cells; equal lengths, single tokens, cells without any."""
    num_cells = draw(st.lists(st.sampled_from([0, 1, 3, 13, 37]), min_size=1, max_size=3))
    total = sum(num_cells)
    budget = draw(st.sampled_from([4, 20]))
    lengths = draw(
        st.one_of(
            st.lists(st.integers(0, budget), min_size=total, max_size=total),
            st.sampled_from([1, budget // 2, budget]).map(lambda one: [one] * total),
        )
    )
    if not any(lengths):
        num_cells, lengths = [*num_cells, 1], [*lengths, 1]
    return Cells(lengths, num_cells, token_budget=budget)


def joined(ranks) -> list[list[tuple[int, int, list[int]]]]:
    """Each step's microbatches, rank after rank."""
    return [
        list(chain.from_iterable(of_ranks)) for of_ranks in zip(*(cells for cells, _ in ranks), strict=True)
    ]


@settings(deadline=None, max_examples=15)
@given(corpora(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 3))
def test_ranks_share_every_step_and_any_number_goes_on_from_it(corpus, step_size: int, resumed: int) -> None:
    num_steps = 4
    stream = corpus.stream(num_steps * step_size)
    expected = [stream[i * step_size : (i + 1) * step_size] for i in range(num_steps)]
    ends: list[list[tuple[int, int]]] = []
    for world_size in [w for w in (1, 2, 4, 8) if step_size % w == 0]:
        ranks = [steps_of(corpus, step_size, num_steps, rank, world_size) for rank in range(world_size)]
        assert joined(ranks) == expected
        ends += [after for _, after in ranks]
    assert all(after == ends[0] for after in ends)
    # From any step on, at another number of ranks, exactly what was left.
    start = (0, 0) if resumed == 0 else ends[0][resumed - 1]
    ranks = [
        steps_of(corpus, step_size, num_steps - resumed, rank, step_size, start=start)
        for rank in range(step_size)
    ]
    assert joined(ranks) == expected[resumed:]
    assert all(after == ends[0][resumed:] for _, after in ranks)


@pytest.mark.parametrize("num_cells", [3, 5, 22])
def test_a_run_goes_on_from_places_that_are_no_multiple_of_a_step(num_cells: int) -> None:
    """Epochs of a prime number of microbatches, so that steps begin anywhere in them."""
    corpus = Cells([4] * num_cells, [num_cells], token_budget=4)
    expected = corpus.stream(4 * 12)
    _, ends = steps_of(corpus, 4, 11)
    assert len({cursor % 4 for _, cursor in ends}) > 1
    for number, start in enumerate(ends, 1):
        for world_size in (1, 2, 4):
            ranks = [steps_of(corpus, 4, 1, rank, world_size, start=start) for rank in range(world_size)]
            assert joined(ranks) == [expected[4 * number : 4 * number + 4]]


def test_an_epoch_ends_where_the_next_begins() -> None:
    """The place behind an epoch's last microbatch is the next epoch's first, so that a loop sees the end."""
    corpus = Cells([4] * 12, [12], token_budget=4)
    _, after = steps_of(corpus, 4, 6)
    assert after == [(0, 4), (0, 8), (1, 0), (1, 4), (1, 8), (2, 0)]
    # Where a step straddles epochs it is still full, and with fewer cells than a step it holds cells of several epochs.
    cells, after = steps_of(Cells([4] * 3, [3], token_budget=4), 8, 2)
    assert [len(step) for step in cells] == [8, 8]
    assert after == [(2, 2), (5, 1)]
    assert sorted(cell for place in cells[0][:3] for cell in place[2]) == [0, 1, 2]


def test_a_place_that_an_epoch_does_not_have_is_refused() -> None:
    corpus = Cells([4] * 12, [12], token_budget=4)
    with pytest.raises(InvalidArgumentError, match="microbatch 13 of epoch 2, which has 12"):
        feed_of(corpus, 4, start=(2, 13))
    # Just behind the last one is the next epoch's first.
    cells, _ = steps_of(corpus, 4, 1, start=(2, 12))
    assert [place[:2] for place in cells[0]] == [(3, 0), (3, 1), (3, 2), (3, 3)]


def test_only_this_ranks_cells_are_read_with_one_request_a_part_and_window() -> None:
    corpus = Cells([1] * 400, [150, 250], token_budget=10, window=40)
    num_windows, num_steps = corpus.plan(0).num_windows, corpus.plan(0).num_microbatches // 4
    share, _ = steps_of(corpus, 4, num_steps, rank=1, world_size=4)
    mine = {cell for step in share for *_, cells in step for cell in cells}
    # The feed is ahead of its steps, so requests of the next epoch may have begun behind those of this one.
    for part, first in zip(corpus.parts, (0, 150), strict=True):
        of_part = {cell - first for cell in mine if first <= cell < first + len(part)}
        asked = 0
        for request in part.asked[:num_windows]:
            assert len(set(request)) == len(request)
            asked += len(of_part & set(request))
            assert set(request) <= of_part or asked >= len(of_part)
        assert asked >= len(of_part)


def test_a_step_that_ranks_cannot_share_is_refused_by_number() -> None:
    with pytest.raises(ConfigError, match=r"microbatches_per_step: 6 .* 4 ranks\. .*1, 2, 3, 6"):
        share_of(0, 4, 6)
    with pytest.raises(InvalidArgumentError, match="rank"):
        share_of(2, 2, 4)
    assert [share_of(rank, 3, 6) for rank in range(3)] == [range(2), range(2, 4), range(4, 6)]


def test_an_error_comes_at_the_step_that_it_would_have_spoilt() -> None:
    corpus = Cells([4] * 40, [40], token_budget=4)
    with feed_of(corpus, 4, objective=Objective(fails_at=10)) as feed:
        assert [next(feed).next for _ in range(2)] == [(0, 4), (0, 8)]
        for _ in range(2):
            with pytest.raises(ScfmError, match="no such mask"):
                next(feed)


def test_preparing_keeps_a_bounded_distance_and_waiting_is_measured() -> None:
    corpus = Cells([4] * 400, [400], token_budget=4)
    objective = Objective()
    with feed_of(corpus, 4, objective=objective, steps_ahead=2) as feed:
        next(feed)
        deadline = time.monotonic() + 10
        while objective.num_calls < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        # The step taken, two ready, and one in hand that finds no room.
        assert objective.num_calls == 16
    slow = Objective(seconds=0.05)
    with feed_of(corpus, 1, objective=slow) as feed:
        assert next(feed).wait_s >= 0.04


def test_closing_never_hangs_wherever_the_thread_is() -> None:
    corpus = Cells([4] * 400, [400], token_budget=4)
    for seconds in (0.0, 0.02):
        before = set(threading.enumerate())
        feed = feed_of(corpus, 4, objective=Objective(seconds=seconds))
        next(feed)
        begun = time.monotonic()
        feed.close()
        feed.close()
        assert time.monotonic() - begun < 5
        assert not [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
        with pytest.raises(StopIteration):
            next(feed)


def test_what_is_raised_in_the_thread_keeps_its_kind() -> None:
    def items():
        yield 1
        raise MemoryError("too much")

    ahead = ReadAhead(items(), 5)
    assert next(ahead) == 1
    with pytest.raises(MemoryError, match="too much"):
        next(ahead)


def test_a_waiting_loop_can_be_interrupted() -> None:
    """Ctrl-C while the data do not come, and then an end although they still do not."""
    release = threading.Event()
    closed = threading.Event()

    def stuck():
        try:
            release.wait(30)
            yield 1
        finally:
            closed.set()

    ahead = ReadAhead(stuck(), 1)
    timer = threading.Timer(0.2, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        next(ahead)
    timer.join()
    release.set()
    ahead.close()
    assert closed.wait(5)


def test_files_are_closed_in_the_thread_that_opened_them() -> None:
    where: list[threading.Thread] = []

    def items():
        where.append(threading.current_thread())
        try:
            while True:
                yield 1
        finally:
            where.append(threading.current_thread())

    ahead = ReadAhead(items(), 1)
    next(ahead)
    ahead.close()
    assert len(where) == 2 and where[0] is where[1] is not threading.current_thread()
