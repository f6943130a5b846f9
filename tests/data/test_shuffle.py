"""The shuffled order: what it is defined to be, the same for every rank and restart, read as it is written."""

from __future__ import annotations

from itertools import chain, pairwise

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import scfm
from scfm.data.shuffle import ShuffleOrder
from scfm.data.source_list import SourceList
from scfm.errors import InvalidArgumentError

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 5, 16, 33, 64]), min_size=1, max_size=5)
KEYS = st.integers(0, 2**64 - 1)


def philox4x64(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x64-10, from Salmon et al. 2011."""
    mask = 2**64 - 1
    x, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(high >> 64) ^ x[1] ^ k[0], high & mask, (low >> 64) ^ x[3] ^ k[1], low & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x


def sorted_by_key(items: list, key: tuple[int, int], counter: tuple[int, int]) -> list:
    # numpy's generator counts up before it draws.
    words: list[int] = []
    for i in range(1, len(items) // 4 + 2):
        words += philox4x64((i, *counter, 0), key)
    return [items[i] for i in sorted(range(len(items)), key=lambda i: words[i])]


def defined_order(lengths: list[int], seed: int, epoch: int, block_size: int, window: int) -> list[list[int]]:
    """The definition, cell by cell: the windows of the order."""
    blocks, first = [], 0
    for length in lengths:
        blocks += [
            list(range(first + start, first + min(start + block_size, length)))
            for start in range(0, length, block_size)
        ]
        first += length
    blocks = sorted_by_key(blocks, (seed, 3), (0, epoch))
    a_window = window // block_size
    windows = [list(chain(*blocks[i : i + a_window])) for i in range(0, len(blocks), a_window)]
    return [sorted_by_key(cells, (seed, 4), (number, epoch)) for number, cells in enumerate(windows)]


def source_of(lengths: list[int]) -> SourceList:
    """The count of gene 0 tells the cell's position in its part, the number of genes the part."""
    parts = []
    for i, length in enumerate(lengths):
        counts = np.ones((length, 2 + i), dtype=np.float32)
        counts[:, 0] = np.arange(length) + 1
        parts.append(scfm.read(ad.AnnData(sp.csr_matrix(counts))))
    return SourceList(parts)


def cells_read(shuffled) -> list[int]:
    """Positions in the source of the cells, as their counts tell, window by window."""
    firsts = np.cumsum([0, *(len(part) for part in shuffled.source.parts)])
    found: list[int] = []
    cursor = None
    for window in shuffled:
        cells = np.full(len(window.cells), -1)
        for piece in window.pieces:
            first_values = piece.block.data[piece.block.indptr[:-1]].astype(np.int64)
            cells[piece.slots] = firsts[piece.block.num_genes - 2] + first_values - 1
            np.testing.assert_array_equal(piece.cells, first_values - 1)
        np.testing.assert_array_equal(cells, window.cells)
        assert cursor is None or window.cursor > cursor
        cursor = window.cursor
        found += cells.tolist()
    return found


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=KEYS, epoch=KEYS, block_size=st.integers(1, 20), extra=st.integers(0, 60))
def test_the_order_is_the_defined_one(lengths, seed, epoch, block_size, extra) -> None:
    window = block_size + extra
    order = ShuffleOrder(lengths, seed=seed, epoch=epoch, block_size=block_size, window=window)
    expected = defined_order(lengths, seed, epoch, block_size, window)
    assert [order.window(number).tolist() for number in range(order.num_windows)] == expected
    assert order.bounds.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert sorted(chain(*expected)) == list(range(sum(lengths))) and order.num_cells == sum(lengths)
    firsts = np.cumsum([0, *lengths])
    for part, length in enumerate(lengths):
        touching = [
            number
            for number, cells in enumerate(expected)
            if any(firsts[part] <= cell < firsts[part] + length for cell in cells)
        ]
        assert order.windows_of(part).tolist() == touching


def test_the_order_of_today_is_the_order_for_ever() -> None:
    order = ShuffleOrder([10, 3], seed=7, epoch=2, block_size=4, window=8)
    assert [order.window(i).tolist() for i in range(order.num_windows)] == [
        [0, 12, 11, 3, 10, 1, 2],
        [8, 5, 7, 6, 4, 9],
    ]


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    block_size=st.integers(1, 20),
    extra=st.integers(0, 60),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    share=st.floats(0, 1),
)
def test_ranks_and_restarts_read_the_one_order(lengths, block_size, extra, world_size, share) -> None:
    source = source_of(lengths)
    keys = {"seed": 5, "epoch": 1, "block_size": block_size, "window": block_size + extra}
    whole = source.shuffled(**keys)
    plan = whole.positions().tolist()
    assert cells_read(whole) == plan
    start = round(share * len(source))
    assert whole.positions(start // 2, start).tolist() == plan[start // 2 : start]
    by_cursor: dict[int, list[int]] = {}
    for rank in range(world_size):
        shuffled = source.shuffled(**keys, start=start, rank=rank, world_size=world_size)
        windows = list(shuffled)
        assert len(shuffled) == sum(len(window.cells) for window in windows)
        by_cursor |= {window.cursor: window.cells.tolist() for window in windows}
        bounds = whole.order.bounds.tolist()
        assert all((bounds.index(window.cursor) - 1) % world_size == rank for window in windows)
        # Each rank goes on from its own last cursor.
        for window, later in pairwise(windows):
            again = source.shuffled(**keys, start=window.cursor, rank=rank, world_size=world_size)
            assert next(iter(again)).cells.tolist() == later.cells.tolist()
    assert list(chain(*(by_cursor[cursor] for cursor in sorted(by_cursor)))) == plan[start:]
    if plan[start:]:
        assert max(by_cursor) == len(plan)


def test_a_restart_in_the_middle_of_a_window_reads_the_rest_of_it() -> None:
    source = source_of([40, 30, 1, 0])
    keys = {"seed": 1, "block_size": 8, "window": 32}
    plan = source.shuffled(**keys).positions().tolist()
    for start in range(len(plan) + 1):
        shuffled = source.shuffled(**keys, start=start)
        assert cells_read(shuffled) == plan[start:] and len(shuffled) == len(plan) - start


def test_seeds_and_epochs_differ() -> None:
    source = source_of([200])
    orders = {
        tuple(source.shuffled(seed=seed, epoch=epoch, block_size=4, window=32).positions().tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_windows_are_made_of_whole_blocks_and_mix_them() -> None:
    source = source_of([1000, 500])
    for window in source.shuffled(seed=0, block_size=50, window=220):
        blocks = np.unique(window.cells // 50)
        assert len(window.cells) == 50 * len(blocks) and len(blocks) in (4, 2)
        # Shuffled within the window: no block stands together.
        assert (np.diff(window.cells) == 1).sum() < 20


def test_one_file_or_several_of_the_same_blocks_have_one_order() -> None:
    keys = {"seed": 9, "epoch": 4, "block_size": 8, "window": 40}
    whole = source_of([96]).shuffled(**keys).positions().tolist()
    assert source_of([32, 64]).shuffled(**keys).positions().tolist() == whole
    plain = source_of([96]).parts[0]
    assert plain.parts == [plain]
    assert plain.shuffled(**keys).positions().tolist() == whole


def test_selections_shuffle_their_own_cells() -> None:
    source = source_of([50, 20])
    chosen = np.random.default_rng(0).permutation(70)[:33]
    selection = source.select(chosen)
    keys = {"seed": 2, "block_size": 4, "window": 12}
    plan = selection.shuffled(**keys).positions()
    assert sorted(plan.tolist()) == list(range(33))
    lengths = [int((chosen < 50).sum()), int((chosen >= 50).sum())]
    assert [len(part) for part in selection.parts] == lengths
    seen: list[int] = []
    for window in selection.shuffled(**keys):
        for piece in window.pieces:
            rows = piece.block.rows + (0 if piece.part == 0 else 50)
            np.testing.assert_array_equal(rows, chosen[window.cells[piece.slots]])
        seen += window.cells.tolist()
    assert seen == plan.tolist()
    part = source.parts[0].select([7, 7, 3])
    assert sorted(part.shuffled(seed=0).positions().tolist()) == [0, 1, 2]


def test_files_are_read_in_the_shuffled_order(tmp_path) -> None:
    lengths = [300, 1, 77]
    for i, part in enumerate(source_of(lengths).parts):
        counts = np.concatenate([np.asarray(dense(block)) for block in part.blocks()])
        ad.AnnData(sp.csr_matrix(counts)).write_h5ad(tmp_path / f"{i}.h5ad", compression="gzip")
    source = SourceList([scfm.read(tmp_path / f"{i}.h5ad") for i in range(3)])
    for rank in range(2):
        shuffled = source.shuffled(seed=0, block_size=16, window=64, start=50, rank=rank, world_size=2)
        cells_read(shuffled)
        assert source.report.num_cells == len(shuffled)


def dense(block) -> np.ndarray:
    shape = (block.num_cells, block.num_genes)
    return sp.csr_matrix((block.data, block.indices, block.indptr), shape).toarray()


def test_no_cells_give_no_windows() -> None:
    shuffled = source_of([0, 0]).shuffled(seed=0)
    assert list(shuffled) == [] and len(shuffled) == 0 and shuffled.positions().tolist() == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("epoch", 1.0),
        ("block_size", 0),
        ("window", 63),
        ("start", 11),
        ("start", -1),
        ("rank", 2),
        ("rank", -1),
        ("world_size", 0),
        ("world_size", True),
    ],
)
def test_settings_out_of_range_are_named(name: str, value) -> None:
    keys = {"seed": 0, "world_size": 2, name: value}
    with pytest.raises(InvalidArgumentError, match=rf"{name}.*expected a whole number from") as error:
        source_of([10]).shuffled(**keys)
    assert repr(value) in str(error.value)
    with pytest.raises(InvalidArgumentError, match="stop"):
        source_of([10]).shuffled(seed=0).positions(0, 11)
