"""Cells for generative pretraining: some genes are known with their values, the others' values are to be generated.

Each cell becomes <cls>, its known genes, then the unknown ones, which is the order that
scfm.ops.generative_attention takes; the values of unknown tokens are the targets. The original pads the two sides
apart to lengths that are fixed for the batch; packed, there is nothing to fix, and a cell's split depends on nothing
but (seed, epoch, cell id). Source: the data collator of scGPT's dev-temp branch, data_style "both".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.tokenize.scgpt_masking import choose_tokens

__all__ = ["GenerativeCells", "split_as_upstream", "split_for_generation"]

# Keeps these draws apart from others of the same seed: "gene" and "rati".
_SPLIT = 0x67656E65
_RATIO = 0x72617469


@dataclass(frozen=True)
class GenerativeCells:
    """packed: each cell's known tokens first; num_known: int32 (C,), <cls> included."""

    packed: PackedCells
    num_known: Tensor


def split_for_generation(
    packed: PackedCells, mask_ratio: float | Sequence[float], *, seed: int, epoch: int = 0
) -> GenerativeCells:
    """int(mask_ratio * genes) of each cell's genes become unknown, at random.

    packed: cells that begin with <cls> and are already cut to length, with values. mask_ratio: one for all cells, or
    several of which each cell draws one (the original draws one a batch). Raises InvalidArgumentError.
    """
    ratios = _ratios(packed, mask_ratio)
    drawn = np.zeros(packed.num_cells, dtype=np.int64)
    if len(ratios) > 1:
        drawn = _choice_per_cell(packed.cell_ids, len(ratios), seed=seed, epoch=epoch)
    num_genes = packed.lengths.numpy() - 1
    num_unknown = (num_genes * np.asarray(ratios)[drawn]).astype(np.int32)
    unknown = choose_tokens(packed, num_unknown, num_spared=1, seed=seed, epoch=epoch, purpose=_SPLIT)
    cell_of = np.repeat(np.arange(packed.num_cells), packed.lengths.numpy())
    # Stable: within its side a token keeps its place.
    order = torch.from_numpy(np.argsort(2 * cell_of + unknown.numpy(), kind="stable"))
    num_known = packed.lengths - torch.from_numpy(num_unknown)
    return GenerativeCells(_reordered(packed, order, packed.lengths), num_known)


def split_as_upstream(
    packed: PackedCells, mask_ratio: float | Sequence[float], *, max_tokens: int
) -> GenerativeCells:
    """The original's split, draw for draw from the global generators (numpy: the ratio; torch: the genes).

    packed: whole cells that begin with <cls>, with bins. The two sides of a cell are cut to lengths that the batch
    shares; where the unknown side is cut, its first gene always stays.
    """
    ratios = _ratios(packed, mask_ratio)
    # The original's generator, so the legacy one.
    ratio = float(np.random.choice(ratios)) if len(ratios) > 1 else ratios[0]  # noqa: NPY002
    longest = min(max_tokens, int(packed.lengths.max()) if packed.num_cells else 0)
    most_unknown = int((longest - 1) * ratio)
    most_known = longest - most_unknown
    places, lengths, num_known = [], [], []
    starts = packed.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(starts):
        num_genes = stop - start - 1
        shuffled = torch.randperm(num_genes) + start + 1
        first = int(num_genes * ratio)
        known = _cut(torch.cat([torch.tensor([start]), shuffled[first:]]), most_known)
        unknown = _cut(shuffled[:first], most_unknown)
        places += [known, unknown]
        lengths.append(len(known) + len(unknown))
        num_known.append(len(known))
    order = torch.cat(places) if places else torch.empty(0, dtype=torch.int64)
    return GenerativeCells(
        _reordered(packed, order, torch.tensor(lengths, dtype=torch.int64)),
        torch.tensor(num_known, dtype=torch.int32),
    )


def _cut(places: Tensor, most: int) -> Tensor:
    if len(places) <= most:
        return places
    return torch.cat([places[:1], places[1:][torch.randperm(len(places) - 1)[: most - 1]]])


def _ratios(packed: PackedCells, mask_ratio: float | Sequence[float]) -> list[float]:
    ratios = [float(one) for one in (mask_ratio if isinstance(mask_ratio, Sequence) else [mask_ratio])]
    if not ratios or not all(0.0 <= ratio < 1.0 for ratio in ratios):
        raise InvalidArgumentError(f"{mask_ratio}; expected numbers from 0 and below 1", where="mask_ratio")
    if packed.values is None:
        raise InvalidArgumentError("has no values to generate", where="packed")
    empty = (packed.lengths == 0).nonzero().flatten()
    if len(empty):
        raise InvalidArgumentError(f"cell {int(empty[0])} has no token; expected <cls> first", where="packed")
    return ratios


def _choice_per_cell(cell_ids: Tensor, num_choices: int, *, seed: int, epoch: int) -> np.ndarray:
    """int64 (C,): one of 0 .. num_choices - 1 for each cell, equally likely."""
    num_cells = len(cell_ids)
    choices = PackedCells(
        token_ids=torch.zeros(num_cells * num_choices, dtype=torch.int32),
        values=None,
        cu_seqlens=torch.arange(num_cells + 1, dtype=torch.int32) * num_choices,
        cell_ids=cell_ids,
    )
    one = np.ones(num_cells, dtype=np.int32)
    chosen = choose_tokens(choices, one, num_spared=0, seed=seed, epoch=epoch, purpose=_RATIO)
    drawn: np.ndarray = np.flatnonzero(chosen.numpy()) % num_choices
    return drawn


def _reordered(packed: PackedCells, order: Tensor, lengths: Tensor) -> PackedCells:
    return PackedCells(
        token_ids=packed.token_ids[order],
        values=None if packed.values is None else packed.values[order],
        cu_seqlens=torch.nn.functional.pad(torch.cumsum(lengths.to(torch.int64), 0), (1, 0)).to(torch.int32),
        cell_ids=packed.cell_ids,
    )
