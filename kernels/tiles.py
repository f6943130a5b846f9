"""The tile list of a packed batch: which (cell, block of its tokens) each program computes.

A grid of (cells x blocks of the longest cell) would be mostly idle programs; here a program reads its cell and its
first token from a list with one entry a block that exists. The list is built on the device, without waiting for it
(so it works inside a CUDA graph, with offsets that change between replays), and therefore has the length that any
batch of so many tokens and cells can need: unused entries at its end hold cell -1. Cells with most work
a tile come first, so that no long tile starts last; a tile's result does not depend on its place.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Target
from .launch import Options, launch

_CELLS = 128  # compared at a time with a program's own cell
_OPTIONS = Options(num_warps=1, num_stages=1)
_CACHE = "_scfm_tiles"
_MAX_KEPT = 16  # lists of one batch: a few block sizes, of one content; more are of contents that passed


def tile_list(
    cu_seqlens: Tensor,
    num_tokens: int,
    block: int,
    *,
    counts: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """int32 (N, 2): (cell, first token relative to the cell's) of every tile, then (-1, 0); N from the shapes only.

    cu_seqlens: int32 (C + 1,), the offsets of the tokens that are cut into tiles, num_tokens of them at most.
    counts: int32 (C,) if only the first so many tokens of a cell are cut. work: int32 offsets (C + 1,) or counts (C,)
    by whose lengths the cells are sorted; default: the lengths that are cut.

    The list is kept on ``cu_seqlens`` until that, ``counts`` or ``work`` is changed in place; not for another stream,
    not during the capture of a CUDA graph, whose memory must not leak out of it, and not for tensors made in
    inference mode, which do not tell whether they were changed.
    """
    work = None if work is cu_seqlens and counts is None else work
    key = _key(cu_seqlens, counts, work, num_tokens, block)
    if key is None:
        return _build(cu_seqlens, num_tokens, block, counts, work)
    kept = cu_seqlens.__dict__.setdefault(_CACHE, {})
    found = kept.get(key)
    if found is None or not _are(found[1], (counts, work)):
        if len(kept) >= _MAX_KEPT:
            kept.clear()
        # Weak, or two offsets that are sorted by each other would keep each other alive.
        others = tuple(None if x is None else weakref.ref(x) for x in (counts, work))
        found = kept[key] = (_build(cu_seqlens, num_tokens, block, counts, work), others)
    tiles: Tensor = found[0]
    return tiles


def _are(references: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether these are the very tensors, not others that got their ids."""
    return all(r is None if x is None else r() is x for r, x in zip(references, tensors, strict=True))


def _key(
    cu_seqlens: Tensor, counts: Tensor | None, work: Tensor | None, num_tokens: int, block: int
) -> tuple[object, ...] | None:
    tensors = [x for x in (cu_seqlens, counts, work) if x is not None]
    if any(x.is_inference() for x in tensors):
        return None
    stream = 0
    if cu_seqlens.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(cu_seqlens.device).cuda_stream
    others = tuple(None if x is None else (id(x), x._version) for x in (counts, work))
    return cu_seqlens._version, others, num_tokens, block, stream


def _build(
    cu_seqlens: Tensor, num_tokens: int, block: int, counts: Tensor | None, work: Tensor | None
) -> Tensor:
    num_cells = cu_seqlens.numel() - 1
    tiles = cu_seqlens.new_empty((num_tokens // block + num_cells, 2), dtype=torch.int32)
    lengths = cu_seqlens if counts is None else counts
    work = lengths if work is None else work
    launch(
        tile_list_kernel,
        (num_cells,),
        (lengths, work, tiles, num_cells, len(tiles)),
        {
            "LENGTHS_ARE_COUNTS": lengths.numel() == num_cells,
            "WORK_IS_COUNTS": work.numel() == num_cells,
            "BLOCK": block,
            "CELLS": _CELLS,
        },
        _OPTIONS,
    )
    return tiles


@triton.jit
def _lengths(ptr, cells, ok, ARE_COUNTS: tl.constexpr):
    if ARE_COUNTS:
        return tl.load(ptr + cells, mask=ok, other=0)
    return tl.load(ptr + cells + 1, mask=ok, other=0) - tl.load(ptr + cells, mask=ok, other=0)


@triton.jit(do_not_specialize=["num_cells", "num_slots"])
def tile_list_kernel(
    lengths_ptr,
    work_ptr,
    tiles_ptr,
    num_cells,
    num_slots,
    LENGTHS_ARE_COUNTS: tl.constexpr,
    WORK_IS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CELLS: tl.constexpr,
):
    """One cell a program: its tiles go behind those of every cell with more work, or as much and an earlier place.

    Counting those cells instead of sorting costs C^2 comparisons, microseconds for the cells of a batch, and is one
    launch without atomics. Each program also clears its share of the unused slots.
    """
    cell = tl.program_id(0)
    own_work = tl.sum(_lengths(work_ptr, cell + tl.arange(0, 1), tl.arange(0, 1) == 0, WORK_IS_COUNTS), 0)
    own_length = tl.sum(
        _lengths(lengths_ptr, cell + tl.arange(0, 1), tl.arange(0, 1) == 0, LENGTHS_ARE_COUNTS), 0
    )
    before = 0
    total = 0
    for first in range(0, num_cells, CELLS):
        cells = first + tl.arange(0, CELLS)
        ok = cells < num_cells
        work = _lengths(work_ptr, cells, ok, WORK_IS_COUNTS)
        num_tiles = (_lengths(lengths_ptr, cells, ok, LENGTHS_ARE_COUNTS) + BLOCK - 1) // BLOCK
        earlier = (work > own_work) | ((work == own_work) & (cells < cell))
        before += tl.sum(tl.where(earlier, num_tiles, 0), 0)
        total += tl.sum(num_tiles, 0)
    for first in range(0, (own_length + BLOCK - 1) // BLOCK, CELLS):
        tile = first + tl.arange(0, CELLS)
        ok = tile < (own_length + BLOCK - 1) // BLOCK
        tl.store(tiles_ptr + 2 * (before + tile), tl.zeros_like(tile) + cell, mask=ok)
        tl.store(tiles_ptr + 2 * (before + tile) + 1, tile * BLOCK, mask=ok)
    for first in range(total + cell, num_slots, num_cells * CELLS):
        slot = first + tl.arange(0, CELLS) * num_cells
        ok = slot < num_slots
        tl.store(tiles_ptr + 2 * slot, tl.zeros_like(slot) - 1, mask=ok)
        tl.store(tiles_ptr + 2 * slot + 1, tl.zeros_like(slot), mask=ok)


def aot_targets() -> list[Target]:
    return [
        Target(
            name="tile_list",
            kernel=tile_list_kernel,
            signature={
                "lengths_ptr": "*i32:16",
                "work_ptr": "*i32:16",
                "tiles_ptr": "*i32:16",
                "num_cells": "i32",
                "num_slots": "i32",
            },
            constants={"LENGTHS_ARE_COUNTS": False, "WORK_IS_COUNTS": False, "BLOCK": 128, "CELLS": _CELLS},
            options=_OPTIONS,
            multiplies=False,
        )
    ]
