"""Two views of each cell, which a contrast must know for the same cell: two samples of its genes, and of its counts.

"disjoint": the genes are shared out, so that the two views have nothing in common but the cell; "random": two draws of
a share of them, independent of each other. <cls> leads both, and genes keep their order and their values.

Thinned, a cell looks as a shallower sequencing run would have found it: x' ~ Binomial(x, share), to a depth of its own
in each view. Tokens have no counts but values at 10,000 a cell (or their logarithms); the smallest value of a cell is
taken for one count, which it is in all but the very deepest cells.

All draws are keyed by (seed, epoch, cell, view).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm import _native
from scfm.data.keyed_draws import words_at
from scfm.data.packed import PackedCells
from scfm.tokenize.scgpt_masking import choose_tokens

__all__ = ["GeneSamples", "cut", "thinned", "two_views", "view_lengths"]

GeneSamples = Literal["random", "disjoint"]
# Keeps these draws apart from others of the same seed: "vie" and the view's number.
_PURPOSE = (0x76696530, 0x76696531)
# "dept", "most" and "cutv".
_DEPTH, _MOST, _CUT = 0x64657074, 0x6D6F7374, 0x63757476
_TARGET_SUM = 1e4


def two_views(
    packed: PackedCells, samples: GeneSamples, *, share: float, seed: int, epoch: int
) -> tuple[PackedCells, PackedCells]:
    """packed: cells that begin with <cls>; share: of a cell's genes in each of the "random" views."""
    num_genes = packed.lengths.numpy() - 1
    num_chosen = _num_chosen(num_genes, samples, share)
    views = []
    for purpose in _PURPOSE[: 1 if samples == "disjoint" else 2]:
        chosen = choose_tokens(packed, num_chosen, num_spared=1, seed=seed, epoch=epoch, purpose=purpose)
        views.append(_with_first(packed, chosen))
        if samples == "disjoint":
            views.append(_with_first(packed, ~chosen))
    return views[0], views[1]


def view_lengths(lengths: Tensor, samples: GeneSamples, share: float, most: int | None) -> Tensor:
    """Most tokens of both views together, int64 (C,). lengths: of the whole cells, with <cls>; most: of each view."""
    num_genes = lengths.to(torch.int64).numpy() - 1
    first = _num_chosen(num_genes, samples, share).astype(np.int64)
    second = num_genes - first if samples == "disjoint" else first
    if most is not None:
        first, second = np.minimum(first, most - 1), np.minimum(second, most - 1)
    return torch.from_numpy(first + second + 2)


def cut(packed: PackedCells, most: int, *, view: int, seed: int, epoch: int) -> PackedCells:
    """The view with at most so many tokens of each cell, <cls> and any others."""
    num_genes = packed.lengths.numpy() - 1
    wanted = np.minimum(num_genes, most - 1).astype(np.int32)
    key = _key(seed, view)
    return _with_first(
        packed, choose_tokens(packed, wanted, num_spared=1, seed=key, epoch=epoch, purpose=_CUT)
    )


def thinned(
    packed: PackedCells,
    depths: Sequence[float],
    most_kept: Sequence[float],
    *,
    logged: bool,
    view: int,
    seed: int,
    epoch: int,
) -> PackedCells:
    """The view with its counts thinned; genes of which nothing is left are gone.

    packed: cells that begin with <cls>; values per 10,000, ``logged``: ln(1 + x) of that. depths: least and most counts
    that the cell has afterwards, its logarithm uniform; most_kept: but never more than this share, uniform too.
    """
    assert packed.values is not None
    lengths, starts = packed.lengths.numpy(), packed.cu_seqlens.numpy()[:-1]
    genes = np.ones(packed.num_tokens, dtype=bool)
    genes[starts] = False
    cells = np.repeat(np.arange(packed.num_cells), lengths)
    values = packed.values.numpy().astype(np.float64)
    amounts = np.where(genes, np.expm1(values) if logged else values, np.inf)
    one = np.minimum.reduceat(amounts, starts) if len(starts) else amounts
    counts = np.where(
        genes, np.rint(np.divide(amounts, one[cells], out=np.zeros_like(amounts), where=genes)), 0.0
    )
    share = _shares(packed.cell_ids.numpy(), _TARGET_SUM / one, depths, most_kept, _key(seed, view), epoch)
    kept = _native.thin_counts(
        packed.cu_seqlens.numpy().astype(np.int64),
        packed.token_ids.numpy(),
        counts,
        np.ascontiguousarray(packed.cell_ids.numpy()),
        share,
        _key(seed, view),
        epoch,
    )
    found = np.divide(kept * one[cells], share[cells], out=np.zeros_like(kept), where=genes)
    changed = np.where(genes, np.log1p(found) if logged else found, values).astype(np.float32)
    return _with_first(replace(packed, values=torch.from_numpy(changed)), torch.from_numpy(kept > 0))


def _shares(
    cell_ids: NDArray[np.int64],
    totals: NDArray[np.float64],
    depths: Sequence[float],
    most_kept: Sequence[float],
    key: int,
    epoch: int,
) -> NDArray[np.float64]:
    """Of each cell's counts, how many are kept."""
    ids = cell_ids.astype(np.uint64)

    def uniform(purpose: int) -> NDArray[np.float64]:
        words = words_at((purpose, ids, ids >> np.uint64(32), epoch), key)
        return np.asarray((words.astype(np.float64) + 0.5) / 2.0**32)

    depth = depths[0] * (depths[1] / depths[0]) ** uniform(_DEPTH)
    most = most_kept[0] + (most_kept[1] - most_kept[0]) * uniform(_MOST)
    # A cell of <cls> alone has no total.
    return np.minimum(np.divide(depth, totals, out=np.ones_like(depth), where=totals > 0), most)


def _key(seed: int, view: int) -> int:
    return (seed ^ _PURPOSE[view]) & 0xFFFFFFFFFFFFFFFF


def _num_chosen(num_genes: np.ndarray, samples: GeneSamples, share: float) -> np.ndarray:
    taken = num_genes * (0.5 if samples == "disjoint" else share)
    chosen: np.ndarray = np.minimum(np.ceil(taken), num_genes).astype(np.int32)
    return chosen


def _with_first(packed: PackedCells, chosen: Tensor) -> PackedCells:
    """The chosen tokens, and each cell's first."""
    chosen = chosen.clone()
    starts = packed.cu_seqlens[:-1].to(torch.int64)
    chosen[starts] = True
    ends = torch.nn.functional.pad(chosen.cumsum(0), (1, 0)).index_select(
        0, packed.cu_seqlens.to(torch.int64)
    )
    return replace(
        packed,
        token_ids=packed.token_ids[chosen],
        values=None if packed.values is None else packed.values[chosen],
        cu_seqlens=ends.to(torch.int32),
    )
