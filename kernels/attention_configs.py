"""Tile sizes of the attention kernels, by GPU family, head_dim and storage width.

A table, not an autotuner: what runs must not depend on a timing, and a first call must not pay for a search. The
16-bit entries are what compiles without spills within the family's shared memory (``python -m scfm.kernels.aot``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .launch import Options

# Families by what limits a block: 163 KiB of shared memory (80), 99 KiB (86, also the consumer GPUs after it),
# 227 KiB with wgmma (90) or with tcgen05 (100).
_FAMILY = {80: 80, 87: 80, 90: 90, 100: 100, 103: 100}
_SMALLEST = 86


@dataclass(frozen=True, eq=False)
class Tiles:
    """own: tokens a program holds (queries, or keys for their gradients); streamed: those of a loop's turn."""

    own: int
    streamed: int
    options: Options

    def __str__(self) -> str:
        return f"{self.own}x{self.streamed} w{self.options.num_warps}s{self.options.num_stages}"


def _tiles(own: int, streamed: int, num_warps: int, num_stages: int) -> Tiles:
    return Tiles(own, streamed, Options(num_warps, num_stages))


# (family, 16-bit storage) -> [(largest head_dim, forward, gradient of queries, gradients of keys and values)]
_Row = tuple[int, Tiles, Tiles, Tiles]
_SMALL: list[_Row] = [
    (64, _tiles(128, 64, 8, 2), _tiles(64, 64, 8, 2), _tiles(64, 32, 4, 2)),
    (128, _tiles(128, 32, 8, 2), _tiles(32, 64, 4, 2), _tiles(32, 64, 8, 2)),
    (256, _tiles(32, 32, 8, 2), _tiles(16, 16, 4, 1), _tiles(16, 16, 8, 1)),
]
# Products of full float32 precision run outside the tensor cores and hold whole operands in registers: they spill
# at any size, least at small ones.
_FULL_PRECISION: list[_Row] = [
    (64, _tiles(64, 32, 8, 2), _tiles(32, 16, 4, 1), _tiles(32, 16, 4, 1)),
    (256, _tiles(16, 16, 4, 1), _tiles(16, 16, 4, 1), _tiles(16, 16, 4, 1)),
]
_HALF_PRECISION: dict[int, list[_Row]] = {
    80: [
        (64, _tiles(128, 64, 8, 3), _tiles(128, 64, 8, 2), _tiles(128, 32, 8, 2)),
        (128, _tiles(128, 64, 8, 3), _tiles(128, 32, 8, 2), _tiles(32, 64, 8, 2)),
        (256, _tiles(32, 32, 8, 2), _tiles(16, 16, 4, 1), _tiles(16, 16, 4, 1)),
    ],
    _SMALLEST: _SMALL,
    90: [
        (64, _tiles(128, 128, 8, 3), _tiles(128, 64, 8, 3), _tiles(128, 64, 8, 3)),
        (128, _tiles(128, 64, 8, 3), _tiles(128, 64, 8, 2), _tiles(128, 32, 8, 2)),
        (256, _tiles(128, 64, 8, 2), _tiles(128, 16, 8, 1), _tiles(16, 16, 8, 1)),
    ],
    100: [
        (64, _tiles(128, 128, 8, 3), _tiles(128, 64, 8, 2), _tiles(128, 64, 8, 2)),
        (128, _tiles(128, 64, 8, 2), _tiles(128, 64, 8, 2), _tiles(128, 64, 8, 2)),
        (256, _tiles(64, 64, 8, 2), _tiles(64, 64, 8, 1), _tiles(64, 64, 8, 1)),
    ],
}


@cache
def _row(architecture: int, head_dim: int, bits: int) -> _Row:
    rows = _HALF_PRECISION[_FAMILY.get(architecture, _SMALLEST)] if bits == 16 else _FULL_PRECISION
    return next(row for row in rows if head_dim <= row[0])


def forward_tiles(architecture: int, head_dim: int, bits: int) -> Tiles:
    return _row(architecture, head_dim, bits)[1]


def query_grad_tiles(architecture: int, head_dim: int, bits: int) -> Tiles:
    return _row(architecture, head_dim, bits)[2]


def key_grads_tiles(architecture: int, head_dim: int, bits: int) -> Tiles:
    return _row(architecture, head_dim, bits)[3]
