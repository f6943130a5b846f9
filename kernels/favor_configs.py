"""Tile sizes of the FAVOR+ kernels by head_dim and storage width.

At head_dim 64, which every released model has, nothing spills on compute capability 8.0, 9.0 and 10.0; at 128 on the
latter two (see aot.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .attention_configs import Tiles
from .launch import Options


@dataclass(frozen=True)
class Sizes:
    """keys and queries_grad hold features and stream tokens; the others hold tokens and stream features."""

    keys: Tiles
    queries: Tiles
    query_grad: Tiles
    queries_grad: Tiles
    key_grads: Tiles


def _sizes(*rows: tuple[int, int, int, int]) -> Sizes:
    return Sizes(*(Tiles(own, streamed, Options(warps, stages)) for own, streamed, warps, stages in rows))


HALF_PRECISION = {
    64: _sizes((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    128: _sizes(*5 * [(64, 32, 8, 2)]),
    256: _sizes((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
}
_FULL_PRECISION = {
    64: _sizes((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
    256: _sizes(*5 * [(16, 16, 4, 1)]),
}


def tiles_for(q: Tensor) -> Sizes:
    table = _FULL_PRECISION if q.element_size() == 4 else HALF_PRECISION
    return next(sizes for head_dim, sizes in table.items() if q.shape[2] <= head_dim)
