"""Tile lists: every block of every cell once, longest cells first, kept as long as the offsets are unchanged."""

from __future__ import annotations

import packs
import pytest
import torch
from scfm.kernels.tiles import tile_list


def expected(lengths, block, work=None):
    work = lengths if work is None else work
    order = sorted(range(len(lengths)), key=lambda c: (-work[c], c))
    return [[c, start] for c in order for start in range(0, lengths[c], block)]


@pytest.mark.parametrize(
    "lengths",
    [*packs.LENGTHS, [1] * 130, [64, 65, 63], [20000, 3]],
    ids=lambda x: f"{len(x)} cells",
)
def test_lists_every_tile_once(lengths, device):
    offsets = packs.offsets(lengths).to(device)
    tiles = tile_list(offsets, sum(lengths), 64).tolist()
    wanted = expected(lengths, 64)
    assert tiles[: len(wanted)] == wanted
    assert tiles[len(wanted) :] == [[-1, 0]] * (len(tiles) - len(wanted))


def test_counts_and_work(device):
    lengths, counts = [200, 10, 0, 130], [65, 10, 0, 1]
    offsets = packs.offsets(lengths).to(device)
    known = torch.tensor(counts, dtype=torch.int32, device=device)
    by_known = tile_list(offsets, 340, 64, work=known).tolist()
    assert by_known[: len(expected(lengths, 64, counts))] == expected(lengths, 64, counts)
    cut = tile_list(offsets, 340, 64, counts=known, work=offsets).tolist()
    assert cut[: len(expected(counts, 64, lengths))] == expected(counts, 64, lengths)
    assert cut[len(expected(counts, 64, lengths))] == [-1, 0]


def test_kept_until_changed_in_place(device):
    offsets = packs.offsets([3, 70]).to(device)
    first = tile_list(offsets, 73, 64)
    assert tile_list(offsets, 73, 64) is first
    offsets[1] = 70
    assert tile_list(offsets, 73, 64)[:3].tolist() == [[0, 0], [0, 64], [1, 0]]
    known = torch.tensor([1, 2], dtype=torch.int32, device=device)
    assert tile_list(offsets, 73, 64, work=known)[:3].tolist() == [[1, 0], [0, 0], [0, 64]]
    known[0] = 9
    assert tile_list(offsets, 73, 64, work=known)[:3].tolist() == [[0, 0], [0, 64], [1, 0]]


def test_inference_tensors_are_never_kept(device):
    with torch.inference_mode():
        offsets = packs.offsets([3, 70]).to(device)
        tile_list(offsets, 73, 64)
        offsets[1] = 70
        assert tile_list(offsets, 73, 64)[:3].tolist() == [[0, 0], [0, 64], [1, 0]]


def test_memory_is_bounded(device):
    offsets = packs.offsets([3, 70]).to(device)
    for _ in range(20):
        tile_list(offsets, 73, 64, work=torch.ones(2, dtype=torch.int32, device=device))
    assert len(offsets.__dict__["_scfm_tiles"]) <= 16
