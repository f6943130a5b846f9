"""What a program of sparse attention has and streams: sizes, its tile, gathered rows, which pairs there are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_configs import Tiles
from .graph_blocks import TILE
from .launch import Options

BLOCK = tl.constexpr(TILE)

# (largest head_dim, forward, gradient of queries, gradients of keys and values); own and streamed divide 64.
_Row = tuple[int, Tiles, Tiles, Tiles]


def _tiles(own: int, streamed: int, num_warps: int, num_stages: int) -> Tiles:
    return Tiles(own, streamed, Options(num_warps, num_stages))


HALF_PRECISION: list[_Row] = [
    (64, _tiles(64, 64, 4, 3), _tiles(64, 64, 4, 3), _tiles(64, 32, 4, 3)),
    (128, _tiles(64, 32, 8, 2), _tiles(64, 32, 8, 2), _tiles(64, 32, 8, 2)),
    (256, _tiles(64, 32, 8, 2), _tiles(32, 32, 8, 1), _tiles(32, 32, 8, 1)),
]
_FULL_PRECISION: list[_Row] = [
    (64, _tiles(32, 32, 4, 1), _tiles(32, 16, 4, 1), _tiles(32, 16, 4, 1)),
    (256, _tiles(16, 16, 4, 1), _tiles(16, 16, 4, 1), _tiles(16, 16, 4, 1)),
]


def sizes_for(q: Tensor) -> tuple[Tiles, Tiles, Tiles]:
    rows = _FULL_PRECISION if q.element_size() == 4 else HALF_PRECISION
    return next(row for row in rows if q.shape[2] <= row[0])[1:]


@triton.jit
def program_tile(tiles_ptr, num_heads, OWN: tl.constexpr):
    """(first token, 64 bits; number of tokens; the part's first token in the tile; head; block ranges).

    Blocks first_block..masked_from hold whole words only, masked_from..end the rest.
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    part = tl.program_id(0) // num_heads
    tile_ptr = tiles_ptr + part // (BLOCK // OWN) * 5
    first_block = tl.load(tile_ptr + 2)
    masked_from = first_block + tl.load(tile_ptr + 3)
    end = first_block + tl.load(tile_ptr + 4)
    offset = part % (BLOCK // OWN) * OWN
    return (
        tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1), offset, head, first_block, masked_from, end,
    )  # fmt: skip


@triton.jit
def gather(ptr, entries, stride, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """(N, D): the rows of the listed tokens; zeros beyond HEAD_DIM."""
    dims = tl.arange(0, D)
    ptrs = ptr + entries.to(tl.int64)[:, None] * stride + dims[None, :]
    if HEAD_DIM < D:
        return tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def is_pair(words, own):
    """(M, N) or (N, M), as the words and the tile's tokens are laid out: whether the bit is set."""
    return ((words >> own) & 1) != 0
