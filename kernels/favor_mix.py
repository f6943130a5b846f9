"""Queries of FAVOR+ attention against the summary of their cell's keys, while features stream past.

    out_i = (q'_i . context) / (q'_i . total),   q'_if = exp(a_if - n_i - max_f a_if) + eps

is softmax attention with features in the place of keys, but for eps, whose share is the same for all queries of
a head: out_i = (exp(-n_i) A_i + eps sum_f context_f) / (exp(-n_i) l_i + eps sum_f total_f), where A_i and l_i are
the online softmax's sums. So features stream past a tile of queries once and feature maps never lie in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .favor_context import Summary
from .favor_features import Features, half_norms, load_features, rising_maximum, tokens_by_features
from .softmax_tiles import LOG2_E, load_row_facts, load_tile


def query_inputs(features: Features, keys: Summary) -> tuple[Tensor, ...]:
    return features.high, features.rest, keys.matrix, keys.totals, keys.columns, keys.scale


def query_numbers(q: Tensor, keys: Summary, eps: float) -> tuple[float, ...]:
    return q.shape[2] ** -0.25, eps, q.shape[1], keys.totals.shape[2], keys.columns.shape[2]


# ---- on the device ----------------------------------------------------------------------------------------------


@triton.jit
def _mix_block(
    acc, top, total, which, q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, first, num_features, scale,
    STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    TRACK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    w, rest = load_features(
        w_ptr, rest_ptr, first, num_features, STREAMED, HEAD_DIM, q.shape[1], q.dtype, SPLIT, MASKED
    )
    a = tokens_by_features(q, w, rest, PRECISION, SPLIT)
    if MASKED:
        a = tl.where((tl.arange(0, STREAMED) < num_features - first)[None, :], a, float("-inf"))
    new_top, which = rising_maximum(a, top, which, first, TRACK)
    p = tl.exp2((a - new_top[:, None]) * (scale * LOG2_E)).to(q.dtype)
    shrink = tl.exp2((top - new_top) * (scale * LOG2_E))
    matrix = load_tile(matrix_ptr, first, num_features, HEAD_DIM, STREAMED, HEAD_DIM, q.shape[1], MASKED)
    totals = load_row_facts(totals_ptr, first, num_features, 0.0, STREAMED, MASKED)
    acc = tl.dot(p, matrix.to(q.dtype), acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total * shrink + tl.sum(p.to(tl.float32) * totals[None, :], 1), which


@triton.jit
def mix(
    q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, columns_ptr, scale_ptr, place, scale, eps, num_features,
    num_blocks, STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    TRACK: tl.constexpr,
):  # fmt: skip
    """(out, norm, max a, its feature, n) of the queries ``q`` (M, D); ``place`` is that of the cell and head."""
    D: tl.constexpr = q.shape[1]
    acc = tl.zeros(q.shape, tl.float32)
    top = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    which = tl.zeros((q.shape[0],), tl.int32)
    matrix_ptr += place * num_features * HEAD_DIM
    totals_ptr += place * num_features
    whole = num_features // STREAMED * STREAMED
    for first in range(0, whole, STREAMED):
        acc, top, total, which = _mix_block(
            acc, top, total, which, q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, first, num_features, scale,
            STREAMED, HEAD_DIM, PRECISION, SPLIT, TRACK, False,
        )  # fmt: skip
    if whole < num_features:
        acc, top, total, which = _mix_block(
            acc, top, total, which, q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, whole, num_features, scale,
            STREAMED, HEAD_DIM, PRECISION, SPLIT, TRACK, True,
        )  # fmt: skip
    columns = load_columns(columns_ptr, place, num_blocks, HEAD_DIM, D)
    norms = half_norms(q, scale)
    share = tl.exp2(-norms * LOG2_E)
    norm = share * total + eps * tl.load(scale_ptr + 2 * place + 1)
    out = (share[:, None] * acc + eps * columns[None, :]) / norm[:, None]
    return out, norm, top, which, norms


@triton.jit
def load_columns(columns_ptr, place, num_blocks, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """(D,): the sum of a summary's matrix over all features, from those of its blocks."""
    dims = tl.arange(0, D)
    columns = tl.zeros((D,), tl.float32)
    for block in range(num_blocks):
        ptrs = columns_ptr + (place * num_blocks + block) * HEAD_DIM + dims
        columns += tl.load(ptrs, mask=dims < HEAD_DIM, other=0.0)
    return columns
