"""The block plan of sparse attention: for every tile of tokens whom it sees, compacted, with one bit a pair.

A tile is up to 64 neighbouring tokens. Its list holds each token that any of them sees (for the backward of keys: is
seen by) once, so a program streams 64 gathered rows at a time and never touches a row that nobody in its tile needs;
of 64 x 64 blocks at fixed places a sparse graph leaves hardly one empty. The 64-bit word of an entry says which tokens
of the tile it is paired with. Entries paired with the whole tile come first: blocks of them need no masks.

Tiles start where nothing before is paired with anything after, thus at each cell's start: what a token gets does not
depend, bit for bit, on the other cells of the batch. Built by torch on the tensors' device, once a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

TILE = 64  # tokens a tile, the bits of a word; also the entries of a block
_CACHE = "_scfm_block_plan"


@dataclass(frozen=True)
class TileLists:
    """Whom each tile is paired with.

    tiles: int32 (N, 5), those with most blocks first: first token, number of tokens, first block, blocks whose pairs
    are all there, blocks. entries: int32 (64 * blocks,), token positions; words: int64, alike: bit i is the pair with
    the tile's token i (always set beyond its last). Blocks are filled up by an entry of theirs with an empty word.
    """

    tiles: Tensor
    entries: Tensor
    words: Tensor


@dataclass(frozen=True)
class BlockPlan:
    """keys: what tiles of queries see. queries: who sees tiles of keys."""

    keys: TileLists
    queries: TileLists


def block_plan(row_offsets: Tensor, columns: Tensor) -> BlockPlan:
    """The plan of tokens that see columns[row_offsets[i] : row_offsets[i + 1]], int64 (T + 1,) and int32 (E,).

    Kept on ``columns`` until either tensor is changed in place. Tensors made in inference mode do not tell that: do not
    change those. The build waits for the device, so the plan may be used in any stream and in a CUDA graph.
    """
    key = (id(row_offsets), _version(row_offsets), _version(columns))
    kept = columns.__dict__.get(_CACHE)
    if kept is None or kept[0] != key:
        # row_offsets is kept too: while it lives no other tensor can have its id.
        kept = (key, _build(row_offsets, columns), row_offsets)
        setattr(columns, _CACHE, kept)
        if columns.is_cuda:
            torch.cuda.current_stream(columns.device).synchronize()
    plan: BlockPlan = kept[1]
    return plan


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _build(row_offsets: Tensor, columns: Tensor) -> BlockPlan:
    everyone = torch.arange(row_offsets.numel() - 1, device=columns.device)
    rows = torch.repeat_interleave(everyone, row_offsets.diff())
    first = _first_tokens(row_offsets, columns.long(), everyone)
    return BlockPlan(
        keys=_tile_lists(first, everyone, rows, columns.long()),
        queries=_tile_lists(first, everyone, columns.long(), rows),
    )


def _first_tokens(row_offsets: Tensor, columns: Tensor, everyone: Tensor) -> Tensor:
    """The first token of every tile: 64 tokens at most, from the start of each range that no pair leaves."""
    if not everyone.numel():
        return everyone
    sees = row_offsets.diff() > 0
    low, high = everyone.clone(), everyone.clone()
    low[sees] = torch.minimum(low[sees], columns[row_offsets[:-1][sees]])
    high[sees] = torch.maximum(high[sees], columns[row_offsets[1:][sees] - 1])
    reached = torch.cummax(high, 0).values.roll(1)
    reached[0] = -1
    starts = (reached < everyone) & (torch.cummin(low.flip(0), 0).values.flip(0) >= everyone)
    begin = torch.cummax(torch.where(starts, everyone, 0), 0).values
    return everyone[(everyone - begin) % TILE == 0]


def _tile_lists(first: Tensor, everyone: Tensor, own: Tensor, other: Tensor) -> TileLists:
    """The lists of tiles by the pairs of their tokens ``own`` with tokens ``other``."""
    num_tokens, num_tiles = everyone.numel(), first.numel()
    num_own = torch.cat([first, first.new_full((1,), num_tokens)]).diff()
    tile_of = torch.repeat_interleave(torch.arange(num_tiles, device=first.device), num_own)
    bit_of = everyone - first[tile_of]

    pairs, place = torch.unique(tile_of[own] * num_tokens + other, return_inverse=True)
    bits = torch.ones_like(own) << bit_of[own]
    # A token is paired with another once at most: the sum of its tile's bits is their union.
    words = torch.zeros_like(pairs).index_add_(0, place, bits)
    tile, entry = pairs // max(num_tokens, 1), pairs % max(num_tokens, 1)
    beyond = torch.where(num_own < TILE, -torch.ones_like(num_own) << (num_own % TILE), 0)
    words |= beyond[tile]
    order = torch.sort(tile * 2 + (words != -1), stable=True).indices
    tile, entry, words = tile[order], entry[order], words[order]

    counts = torch.bincount(tile, minlength=num_tiles)
    num_blocks = (counts + TILE - 1) // TILE
    first_block = torch.cumsum(num_blocks, 0) - num_blocks
    first_entry = torch.cumsum(counts, 0) - counts
    rank = torch.arange(len(tile), device=first.device) - first_entry[tile]
    slot = first_block[tile] * TILE + rank
    # What fills a block up is an entry of the tile, so that loads need no mask and nobody else's NaN comes in.
    seen = counts > 0
    entries = torch.repeat_interleave(entry[first_entry[seen]], num_blocks[seen] * TILE)
    entries[slot] = entry
    slots = torch.zeros_like(entries)
    slots[slot] = words
    num_full = torch.bincount(tile[words == -1], minlength=num_tiles) // TILE
    tiles = torch.stack([first, num_own, first_block, num_full, num_blocks], 1)
    longest_first = torch.sort(num_blocks, descending=True, stable=True).indices
    return TileLists(tiles[longest_first].int().contiguous(), entries.int(), slots)


def num_tile_parts(own: int) -> int:
    """How many programs share a tile when each holds ``own`` of its tokens."""
    return triton.cdiv(TILE, own)
