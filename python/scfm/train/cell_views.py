"""Two views of each cell, which a contrast must know for the same cell: two samples of its genes, and of its counts.

"disjoint": the genes are shared out, so that the two views have nothing in common but the cell; "random": two draws of
a share of them, independent of each other. <cls> leads both, and genes keep their order and their values.

Thinned, a cell looks as a shallower sequencing run would have found it: x' ~ Binomial(x, share), with a share of its
own in each view. Tokens have no counts but values at 10,000 a cell (or their logarithms); the smallest value of a cell
is taken for one count, which it is in all but the very deepest cells.

All draws are keyed by (seed, epoch, cell, view).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scfm import _native
from scfm.data.keyed_draws import words_at
from scfm.data.packed import PackedCells
from scfm.tokenize.scgpt_masking import choose_tokens

__all__ = ["GeneSamples", "thinned", "two_views", "view_lengths"]

GeneSamples = Literal["random", "disjoint"]
# Keeps these draws apart from others of the same seed: "vie" and the view's number.
_PURPOSE = (0x76696530, 0x76696531)
_THIN = 0x7468696E  # "thin"


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


def view_lengths(lengths: Tensor, samples: GeneSamples, share: float) -> Tensor:
    """Tokens of both views together, int64 (C,). lengths: of the whole cells, with <cls>."""
    num_genes = lengths.to(torch.int64) - 1
    if samples == "disjoint":
        return num_genes + 2
    return 2 * (torch.from_numpy(_num_chosen(num_genes.numpy(), samples, share).astype(np.int64)) + 1)


def thinned(
    packed: PackedCells, shares: tuple[float, float], *, logged: bool, view: int, seed: int, epoch: int
) -> PackedCells:
    """The view with its counts thinned; genes of which nothing is left are gone.

    packed: cells that begin with <cls>; values per 10,000, ``logged``: ln(1 + x) of that. shares: least and most that
    are kept, any number between them equally likely.
    """
    assert packed.values is not None
    lengths, starts = packed.lengths.numpy(), packed.cu_seqlens.numpy()[:-1]
    genes = np.ones(packed.num_tokens, dtype=bool)
    genes[starts] = False
    cells = np.repeat(np.arange(packed.num_cells), lengths)
    values = packed.values.numpy().astype(np.float64)
    amounts = np.where(genes, np.expm1(values) if logged else values, np.inf)
    one = np.minimum.reduceat(amounts, starts)[cells]
    counts = np.where(genes, np.rint(np.divide(amounts, one, out=np.zeros_like(one), where=genes)), 0.0)
    ids = packed.cell_ids.numpy().astype(np.uint64)
    key = (seed ^ _PURPOSE[view]) & 0xFFFFFFFFFFFFFFFF
    uniform = words_at((_THIN, ids, ids >> np.uint64(32), epoch), key).astype(np.float64) / 2.0**32
    share = shares[0] + (shares[1] - shares[0]) * uniform
    kept = _native.thin_counts(
        packed.cu_seqlens.numpy().astype(np.int64),
        packed.token_ids.numpy(),
        counts,
        np.ascontiguousarray(packed.cell_ids.numpy()),
        share,
        key,
        epoch,
    )
    found = np.divide(kept * one, share[cells], out=np.zeros_like(kept), where=genes)
    changed = np.where(genes, np.log1p(found) if logged else found, values).astype(np.float32)
    return _with_first(replace(packed, values=torch.from_numpy(changed)), torch.from_numpy(kept > 0))


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
