"""The plan of an epoch: each cell once, never more than the budget, the same for ever and from wherever it is asked."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.errors import ConfigError, ScfmError
from scfm.train.corpus.budget_advice import better_budget, unused_share
from scfm.train.corpus.microbatch_plan import MicrobatchPlan


@st.composite
def corpora(draw: st.DrawFn) -> tuple[np.ndarray, list[int], dict[str, int]]:
    """Lengths, cells of each part, and settings: hostile shapes among them."""
    num_cells = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 31, 64]), max_size=4))
    budget = draw(st.sampled_from([2, 7, 30, 97]))
    total = sum(num_cells)
    kind = draw(st.sampled_from(["any", "equal", "one token", "none", "halves"]))
    one = draw(st.integers(1, budget))
    lengths = {
        "any": lambda: draw(st.lists(st.integers(0, budget), min_size=total, max_size=total)),
        "equal": lambda: [one] * total,
        "one token": lambda: [1] * total,
        "none": lambda: [0] * total,
        "halves": lambda: [budget // 2 + 1] * total,
    }[kind]()
    block = draw(st.sampled_from([1, 3, 8]))
    shape = {"token_budget": budget, "block_size": block, "window": block * draw(st.integers(1, 8))}
    return np.array(lengths, dtype=np.uint16), num_cells, shape


def plan_of(lengths, num_cells, shape, *, seed=0, epoch=0, **more) -> MicrobatchPlan:
    return MicrobatchPlan(lengths, num_cells, seed=seed, epoch=epoch, **shape, **more)


@settings(deadline=None, max_examples=150)
@given(corpora(), st.integers(0, 3))
def test_each_cell_is_in_one_microbatch_within_the_budget(corpus, epoch: int) -> None:
    lengths, num_cells, shape = corpus
    plan = plan_of(lengths, num_cells, shape, epoch=epoch)
    microbatches = [plan.microbatch(i) for i in range(plan.num_microbatches)]
    cells = np.concatenate([*microbatches, np.empty(0, dtype=np.int64)])
    np.testing.assert_array_equal(np.sort(cells), np.flatnonzero(lengths))
    assert all(0 < lengths[cells].sum(dtype=int) <= shape["token_budget"] for cells in microbatches)
    room = plan.num_microbatches * shape["token_budget"]
    assert plan.unused_share == pytest.approx(1 - lengths.sum(dtype=int) / room if room else 0.0)
    with pytest.raises(IndexError):
        plan.microbatch(plan.num_microbatches)


@settings(deadline=None, max_examples=60)
@given(corpora(), st.randoms())
def test_it_is_the_same_from_wherever_it_is_asked(corpus, random) -> None:
    in_order = plan_of(*corpus)
    numbers = list(range(in_order.num_microbatches))
    expected = [in_order.microbatch(i).tolist() for i in numbers]
    random.shuffle(numbers)
    asked = plan_of(*corpus)
    assert {i: asked.microbatch(i).tolist() for i in numbers} == dict(enumerate(expected))
    # Windows that were forgotten are packed again.
    from_windows = []
    for number in reversed(range(asked.num_windows)):
        asked._packed.clear()
        window = asked.window(number)
        pieces = [
            window.cells[a:b].tolist() for a, b in zip(window.bounds[:-1], window.bounds[1:], strict=True)
        ]
        from_windows = pieces + from_windows
    assert from_windows == expected


@settings(deadline=None, max_examples=60)
@given(corpora())
def test_a_cell_is_put_off_once_at_most_and_parts_know_their_windows(corpus) -> None:
    num_cells = corpus[1]
    plan = plan_of(*corpus)
    own = {int(cell): w for w in range(plan.num_windows) for cell in plan.order.window(w)}
    part_of = np.repeat(np.arange(len(num_cells)), num_cells)
    for number in range(plan.num_windows):
        for cell in plan.window(number).cells.tolist():
            assert number - own[cell] in (0, 1)
            assert number in plan.windows_of(int(part_of[cell]))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 500).astype(np.uint16)
    shape = {"token_budget": 100, "block_size": 8, "window": 64}

    def cells(seed: int, epoch: int) -> list[int]:
        plan = plan_of(lengths, [500], shape, seed=seed, epoch=epoch)
        return [int(c) for i in range(plan.num_microbatches) for c in plan.microbatch(i)]

    assert cells(0, 0) == cells(0, 0)
    assert len({tuple(cells(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_the_plan_never_changes() -> None:
    """A run that goes on with a newer scfm, numpy or processor goes on with the same cells."""
    lengths = (np.arange(3000, dtype=np.uint64) * 2654435761 % 97 + 4).astype(np.uint16)
    plan = plan_of(
        lengths, [1000, 1, 0, 1999], {"token_budget": 256, "block_size": 16, "window": 512}, seed=7, epoch=3
    )
    cells = np.concatenate([plan.microbatch(i) for i in range(plan.num_microbatches)])
    assert (plan.num_microbatches, zlib.crc32(cells.astype("<i8").tobytes())) == (610, 3455402070)


def test_microbatches_do_not_come_by_length() -> None:
    lengths = np.random.default_rng(1).integers(10, 400, 4000).astype(np.uint16)
    plan = plan_of(lengths, [4000], {"token_budget": 2000, "block_size": 16, "window": 1024})
    longest = [lengths[plan.microbatch(i)].max() for i in range(plan.num_microbatches)]
    first, second = np.array_split(np.array(longest, dtype=float), 2)
    assert abs(first.mean() - second.mean()) < 15


def test_a_cell_longer_than_the_budget_is_an_error_that_names_it() -> None:
    lengths = np.array([5, 300, 7, 301], dtype=np.uint32)
    with pytest.raises(
        ConfigError, match=r"token_budget: 256, .*row 3 of x\.h5ad, has 301 .*2 such cells"
    ) as e:
        plan_of(
            lengths,
            [4],
            {"token_budget": 256, "block_size": 1, "window": 4},
            row_label=lambda cell: f"row {cell} of x.h5ad",
        )
    assert "at least 301" in str(e.value)


def test_impossible_shapes_are_named() -> None:
    for wrong in ({"block_size": 0, "window": 8}, {"block_size": 16, "window": 8}):
        with pytest.raises(ScfmError):
            plan_of(np.ones(4, dtype=np.uint16), [4], {"token_budget": 8, **wrong})


@pytest.mark.parametrize("name", ["pbmc3k_labeled.h5ad", "pbmc_multichem.h5ad"])
@pytest.mark.parametrize(("budget", "most_tokens"), [(8192, 2048), (16384, 1024)])
def test_real_cells_leave_little_of_the_budget_unused(
    data_file, name: str, budget: int, most_tokens: int
) -> None:
    import scfm

    source = scfm.read(data_file(name))
    num_genes = [np.diff(block.indptr) for block in source.blocks()]
    lengths = np.minimum(np.concatenate(num_genes) + 2, most_tokens).astype(np.uint16)
    plan = plan_of(lengths, [len(lengths)], {"token_budget": budget, "block_size": 64, "window": 1024})
    assert plan.unused_share <= 0.02


def test_many_windows_carry_their_rest_on() -> None:
    lengths = np.minimum(np.random.default_rng(2).gamma(4, 250, 20_000) + 50, 2048).astype(np.uint16)
    plan = plan_of(lengths, [12_345, 7_655], {"token_budget": 8192, "block_size": 64, "window": 512})
    assert plan.unused_share < 0.005


def test_a_better_budget_is_told_where_lengths_do_not_divide_it() -> None:
    equal = np.full(5000, 2048, dtype=np.uint16)
    assert better_budget(equal, 8192) is None
    unused, better, left = better_budget(equal, 9000)
    assert unused == pytest.approx(1 - 8192 / 9000) and (better, left) == (8192, 0.0)
    # The longest cell always fits.
    whole_panel = np.full(100, 16_907, dtype=np.uint16)
    _, better, left = better_budget(whole_panel, 30_000)
    assert (better, left) == (33_814, 0.0)
    assert better_budget(np.array([7], dtype=np.uint16), 7) is None
    assert unused_share(np.array([5, 5, 5], dtype=np.uint16), 10) == 0.0
