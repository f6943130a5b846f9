"""Two views of each cell: two samples of its genes, which a contrast must know for the same cell.

"disjoint": the genes are shared out, so that the two views have nothing in common but the cell; "random": two draws of
a share of them, independent of each other. <cls> leads both. Genes keep their order and their values. Draws are keyed
by (seed, epoch, cell, view).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.tokenize.scgpt_masking import choose_tokens

__all__ = ["GeneSamples", "two_views", "view_lengths"]

GeneSamples = Literal["random", "disjoint"]
# Keeps these draws apart from others of the same seed: "vie" and the view's number.
_PURPOSE = (0x76696530, 0x76696531)


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
