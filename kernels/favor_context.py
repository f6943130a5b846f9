"""What FAVOR+ attention keeps of a cell's keys and, in the backward, of its queries: one (F, D) matrix a head.

    context_f = sum_j k'_jf v_j,  total_f = sum_j k'_jf;    k'_j = exp(a_j - n_j - M) + eps
    d_context_f = sum_i q'_if / norm_i grad_out_i,  d_total_f = -sum_i q'_if / norm_i delta_i

Both are attention with features in the place of queries: a program holds a block of features and streams a chunk of
tokens; feature maps are made a tile at a time and forgotten. Keys are taken relative to each feature's own maximum,
which rises while they stream; a second kernel adds a cell's chunks in their order and brings them to the cell's M.
Chunks start at the cell's start, so nothing depends on the rest of the batch.

Both matrices are kept in the storage type for the products that follow, therefore scaled: the largest total (or a
bound of the largest gradient) is 1. The kernels are in favor_partials.py and favor_merges.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .attention_configs import Tiles
from .favor_features import Features, constants
from .favor_merges import MERGE_OPTIONS, favor_merge_keys_kernel, favor_merge_queries_kernel, merge_constants
from .favor_partials import NORMS_OPTIONS, favor_keys_kernel, favor_norms_kernel, favor_queries_kernel
from .launch import block_dim, launch, new_output
from .packed_tiles import strides
from .tiles import tile_list

CHUNK = 1024  # tokens of a partial sum
ROWS = 64


@dataclass(frozen=True)
class Summary:
    """A cell's and head's (F, D) matrix, scaled. F is cut into B blocks.

    matrix: (C, H, F, D) in the storage type; totals: (C, H, F); columns: (C, H, B, D), sums over the features of
    a block; scale: (C, H, 2) what was divided by, and of keys the sum of all (scaled) totals.
    """

    matrix: Tensor
    totals: Tensor
    columns: Tensor
    scale: Tensor


def summarize_keys(
    k: Tensor,
    v: Tensor,
    features: Features,
    cu_seqlens: Tensor,
    key_max: Tensor | None,
    eps: float,
    sizes: Tiles,
) -> tuple[Summary, Tensor]:
    """context and totals of every cell, and the maximum (C,) that its keys are taken relative to."""
    num_tokens, num_heads, head_dim = k.shape
    num_cells, num_blocks = cu_seqlens.numel() - 1, triton.cdiv(features.count, sizes.own)
    scale = head_dim**-0.25
    norms = k.new_empty((num_heads, num_tokens), dtype=torch.float32)
    launch(
        favor_norms_kernel,
        (triton.cdiv(num_tokens, ROWS) * num_heads,),
        (k, norms, num_tokens, scale, num_heads, *strides(k)),
        {"HEAD_DIM": head_dim, "D": block_dim(head_dim), "ROWS": ROWS},
        NORMS_OPTIONS,
    )
    chunks = tile_list(cu_seqlens, num_tokens, CHUNK)
    sums = _new_partials(k, len(chunks), features.count, num_blocks)
    values = k.new_empty((len(chunks), num_heads, head_dim), dtype=torch.float32)
    numbers = (num_tokens, scale, num_heads, features.count, num_blocks)
    launch(
        favor_keys_kernel,
        (len(chunks) * num_heads * num_blocks,),
        (
            k,
            v,
            features.high,
            features.rest,
            norms,
            sums.tops,
            sums.totals,
            sums.matrix,
            values,
            sums.largest,
            chunks,
            cu_seqlens,
            *numbers,
            *strides(k, v),
        ),
        {**constants(k.dtype, head_dim, sizes), "CHUNK": CHUNK},
        sizes.options,
    )
    given = key_max is not None
    key_max = k.new_empty(num_cells, dtype=torch.float32) if key_max is None else key_max
    summary = _new_summary(k, num_cells, features.count, num_blocks)
    launch(
        favor_merge_keys_kernel,
        (num_cells * num_heads * num_blocks,),
        (
            sums.tops,
            sums.totals,
            sums.matrix,
            values,
            sums.largest,
            key_max,
            summary.matrix,
            summary.totals,
            summary.columns,
            summary.scale,
            cu_seqlens,
            *numbers[1:],
            eps,
        ),
        {**merge_constants(features.count, head_dim, sizes.own, CHUNK), "GIVEN": given},
        MERGE_OPTIONS,
    )
    return summary, key_max


def summarize_queries(
    grad_out: Tensor,
    q: Tensor,
    features: Features,
    facts: tuple[Tensor, Tensor, Tensor],
    key_scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    sizes: Tiles,
) -> Summary:
    """d_context and d_totals of every cell; scale[..., 0] makes them gradients of the unscaled sums of keys.

    facts: (H, T) each, of every query: n + max a in base 2, 1 / norm and delta; key_scale: the keys' summary's.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_cells, num_blocks = cu_seqlens.numel() - 1, triton.cdiv(features.count, sizes.own)
    chunks = tile_list(cu_seqlens, num_tokens, CHUNK)
    sums = _new_partials(q, len(chunks), features.count, num_blocks)
    numbers = (num_tokens, head_dim**-0.25, num_heads, features.count, num_blocks)
    launch(
        favor_queries_kernel,
        (len(chunks) * num_heads * num_blocks,),
        (
            q,
            grad_out,
            features.high,
            features.rest,
            *facts,
            sums.totals,
            sums.matrix,
            sums.largest,
            chunks,
            cu_seqlens,
            *numbers,
            eps,
            *strides(q, grad_out),
        ),
        {**constants(q.dtype, head_dim, sizes), "CHUNK": CHUNK},
        sizes.options,
    )
    summary = _new_summary(q, num_cells, features.count, num_blocks)
    launch(
        favor_merge_queries_kernel,
        (num_cells * num_heads * num_blocks,),
        (
            sums.totals,
            sums.matrix,
            sums.largest,
            key_scale,
            summary.matrix,
            summary.totals,
            summary.columns,
            summary.scale,
            cu_seqlens,
            *numbers[2:],
        ),
        merge_constants(features.count, head_dim, sizes.own, CHUNK),
        MERGE_OPTIONS,
    )
    return summary


@dataclass(frozen=True)
class _Partials:
    """Sums of one chunk a slot. tops: (S, H, F); totals: alike; matrix: (S, H, F, D); largest: (S, H, B)."""

    tops: Tensor
    totals: Tensor
    matrix: Tensor
    largest: Tensor


def _new_partials(x: Tensor, num_slots: int, num_features: int, num_blocks: int) -> _Partials:
    shape = (num_slots, x.shape[1], num_features)
    shapes = (shape, shape, (*shape, x.shape[2]), (*shape[:2], num_blocks))
    return _Partials(*(x.new_empty(s, dtype=torch.float32) for s in shapes))


def _new_summary(x: Tensor, num_cells: int, num_features: int, num_blocks: int) -> Summary:
    shape = (num_cells, x.shape[1])
    return Summary(
        new_output(x, (*shape, num_features, x.shape[2])),
        x.new_empty((*shape, num_features), dtype=torch.float32),
        x.new_empty((*shape, num_blocks, x.shape[2]), dtype=torch.float32),
        x.new_empty((*shape, 2), dtype=torch.float32),
    )
