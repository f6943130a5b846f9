"""Sums of FAVOR+ features over one chunk of a cell's tokens: of keys with their values, of queries with gradients.

A program holds a block of features and streams the chunk past it: attention with features in the place of queries.
Feature maps are made a tile at a time and forgotten. Keys are taken relative to each feature's own maximum, which
rises while they stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .favor_features import features_by_tokens, half_norms, load_features
from .launch import Options
from .packed_tiles import cell_range
from .softmax_tiles import LOG2_E, load_row_facts, load_tile

NORMS_OPTIONS = Options(num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["num_tokens"])
def favor_norms_kernel(
    k_ptr, norms_ptr, num_tokens, scale, num_heads, stride_kt, stride_kh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first = tl.program_id(0) // num_heads * ROWS
    k = load_tile(k_ptr + head * stride_kh, first, num_tokens, stride_kt, ROWS, HEAD_DIM, D, True)
    rows = first + tl.arange(0, ROWS)
    tl.store(norms_ptr + head * num_tokens + rows, half_norms(k, scale), mask=rows < num_tokens)


@triton.jit
def _program_chunk(tiles_ptr, num_heads, num_blocks):
    """(cell, first token, head, block of features) of this program; a chunk's programs are neighbours."""
    block = tl.program_id(0) % num_blocks
    head = (tl.program_id(0) // num_blocks % num_heads).to(tl.int64)
    chunk = tl.program_id(0) // num_blocks // num_heads
    return tl.load(tiles_ptr + 2 * chunk), tl.load(tiles_ptr + 2 * chunk + 1), head, block


@triton.jit
def slot_of(begin, cell, BLOCK: tl.constexpr):
    """The place of a cell's first block among those of all cells: they follow each other, with gaps."""
    return begin // BLOCK + cell


@triton.jit
def _store_partial(
    totals_ptr, partials_ptr, place, first, total, matrix, num_features, HEAD_DIM: tl.constexpr
):
    rows = first + tl.arange(0, matrix.shape[0])
    dims = tl.arange(0, matrix.shape[1])
    row_ok = rows < num_features
    places = place * num_features + rows
    tl.store(totals_ptr + places, total, mask=row_ok)
    ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(partials_ptr + places[:, None] * HEAD_DIM + dims[None, :], matrix, mask=ok)


# ---- keys -------------------------------------------------------------------------------------------------------


@triton.jit
def _add_keys(
    acc, top, total, w, rest, k_ptr, v_ptr, norms_ptr, first, last, stride_k, stride_v, scale,
    STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    k = load_tile(k_ptr, first, last, stride_k, STREAMED, HEAD_DIM, w.shape[1], MASKED).to(w.dtype)
    a = features_by_tokens(w, rest, k, PRECISION, SPLIT)
    if MASKED:
        a = tl.where((tl.arange(0, STREAMED) < last - first)[None, :], a, float("-inf"))
    new_top = tl.maximum(top, tl.max(a, 1))
    norms = load_row_facts(norms_ptr, first, last, 0.0, STREAMED, MASKED)
    p = tl.exp2((a - new_top[:, None]) * (scale * LOG2_E) - (norms * LOG2_E)[None, :]).to(w.dtype)
    shrink = tl.exp2((top - new_top) * (scale * LOG2_E))
    v = load_tile(v_ptr, first, last, stride_v, STREAMED, HEAD_DIM, w.shape[1], MASKED).to(w.dtype)
    acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total * shrink + tl.sum(p.to(tl.float32), 1)


@triton.jit(do_not_specialize=["num_tokens"])
def favor_keys_kernel(
    k_ptr, v_ptr, w_ptr, rest_ptr, norms_ptr, tops_ptr, totals_ptr, partials_ptr, values_ptr, largest_ptr,
    tiles_ptr, cu_seqlens_ptr, num_tokens, scale, num_heads, num_features, num_blocks,
    stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of a chunk's keys, for a block of features: max a, sum exp(a - n - max a), the same times v, and sum v."""
    cell, first, head, block = _program_chunk(tiles_ptr, num_heads, num_blocks)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    last = tl.minimum(first + CHUNK, length)
    whole = first + (last - first) // STREAMED * STREAMED
    k_ptr += begin * stride_kt + head * stride_kh
    v_ptr += begin * stride_vt + head * stride_vh
    norms_ptr += head * num_tokens + begin
    w, rest = load_features(
        w_ptr, rest_ptr, block * OWN, num_features, OWN, HEAD_DIM, D, DOT_DTYPE, SPLIT, True
    )
    acc = tl.zeros((OWN, D), tl.float32)
    top = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    for start in range(first, whole, STREAMED):
        acc, top, total = _add_keys(
            acc, top, total, w, rest, k_ptr, v_ptr, norms_ptr, start, last, stride_kt, stride_vt, scale,
            STREAMED, HEAD_DIM, PRECISION, SPLIT, False,
        )  # fmt: skip
    if whole < last:
        acc, top, total = _add_keys(
            acc, top, total, w, rest, k_ptr, v_ptr, norms_ptr, whole, last, stride_kt, stride_vt, scale,
            STREAMED, HEAD_DIM, PRECISION, SPLIT, True,
        )  # fmt: skip
    place = (slot_of(begin, cell, CHUNK) + first // CHUNK) * num_heads + head
    rows = block * OWN + tl.arange(0, OWN)
    _store_partial(totals_ptr, partials_ptr, place, block * OWN, total, acc, num_features, HEAD_DIM)
    tl.store(tops_ptr + place * num_features + rows, top, mask=rows < num_features)
    largest = tl.max(tl.where(rows < num_features, top, float("-inf")), 0)
    tl.store(largest_ptr + place * num_blocks + block, largest)
    if block == 0:
        dims = tl.arange(0, D)
        values = tl.zeros((STREAMED, D), tl.float32)
        for start in range(first, last, STREAMED):
            values += load_tile(v_ptr, start, last, stride_vt, STREAMED, HEAD_DIM, D, True).to(tl.float32)
        tl.store(values_ptr + place * HEAD_DIM + dims, tl.sum(values, 0), mask=dims < HEAD_DIM)


# ---- queries ----------------------------------------------------------------------------------------------------


@triton.jit
def _add_queries(
    acc, total, w, rest, q_ptr, grad_out_ptr, shift_ptr, inverse_ptr, delta_ptr, first, last, stride_q,
    stride_g, scale, eps, STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    q = load_tile(q_ptr, first, last, stride_q, STREAMED, HEAD_DIM, w.shape[1], MASKED).to(w.dtype)
    a = features_by_tokens(w, rest, q, PRECISION, SPLIT)
    shift = load_row_facts(shift_ptr, first, last, 0.0, STREAMED, MASKED)
    inverse = load_row_facts(inverse_ptr, first, last, 0.0, STREAMED, MASKED)  # 0 stands for no query
    p = (tl.exp2(a * (scale * LOG2_E) - shift[None, :]) + eps) * inverse[None, :]
    p = p.to(w.dtype)
    grad_out = load_tile(grad_out_ptr, first, last, stride_g, STREAMED, HEAD_DIM, w.shape[1], MASKED)
    delta = load_row_facts(delta_ptr, first, last, 0.0, STREAMED, MASKED)
    acc = tl.dot(p, grad_out.to(w.dtype), acc, input_precision=PRECISION)
    return acc, total - tl.sum(p.to(tl.float32) * delta[None, :], 1)


@triton.jit(do_not_specialize=["num_tokens"])
def favor_queries_kernel(
    q_ptr, grad_out_ptr, w_ptr, rest_ptr, shift_ptr, inverse_ptr, delta_ptr, totals_ptr, partials_ptr,
    largest_ptr, tiles_ptr, cu_seqlens_ptr, num_tokens, scale, num_heads, num_features, num_blocks, eps,
    stride_qt, stride_qh, stride_gt, stride_gh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """d_context and d_totals of a chunk's queries, for a block of features, and the largest |d_context|."""
    cell, first, head, block = _program_chunk(tiles_ptr, num_heads, num_blocks)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    last = tl.minimum(first + CHUNK, length)
    whole = first + (last - first) // STREAMED * STREAMED
    q_ptr += begin * stride_qt + head * stride_qh
    grad_out_ptr += begin * stride_gt + head * stride_gh
    facts = head * num_tokens + begin
    shift_ptr += facts
    inverse_ptr += facts
    delta_ptr += facts
    w, rest = load_features(
        w_ptr, rest_ptr, block * OWN, num_features, OWN, HEAD_DIM, D, DOT_DTYPE, SPLIT, True
    )
    acc = tl.zeros((OWN, D), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    for start in range(first, whole, STREAMED):
        acc, total = _add_queries(
            acc, total, w, rest, q_ptr, grad_out_ptr, shift_ptr, inverse_ptr, delta_ptr, start, last,
            stride_qt, stride_gt, scale, eps, STREAMED, HEAD_DIM, PRECISION, SPLIT, False,
        )  # fmt: skip
    if whole < last:
        acc, total = _add_queries(
            acc, total, w, rest, q_ptr, grad_out_ptr, shift_ptr, inverse_ptr, delta_ptr, whole, last,
            stride_qt, stride_gt, scale, eps, STREAMED, HEAD_DIM, PRECISION, SPLIT, True,
        )  # fmt: skip
    place = (slot_of(begin, cell, CHUNK) + first // CHUNK) * num_heads + head
    rows = block * OWN + tl.arange(0, OWN)
    _store_partial(totals_ptr, partials_ptr, place, block * OWN, total, acc, num_features, HEAD_DIM)
    largest = tl.max(tl.where(rows < num_features, tl.max(tl.abs(acc), 1), 0.0), 0)
    tl.store(largest_ptr + place * num_blocks + block, largest)
