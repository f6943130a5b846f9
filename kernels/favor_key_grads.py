"""Gradients of keys and values of FAVOR+ attention, from what the cell's queries come to.

Again attention with features in the place of keys: with p_jf = exp(a_jf - max_f a_jf), e_j = exp(max_f a_jf - n_j - M)
and t = p (v . d_context + d_total),

    dv_j = e_j sum_f p_jf d_context_f + eps sum_f d_context_f
    d_n_j = -e_j sum_f t_jf,   dk_j = c e_j sum_f t_jf W_f + c^2 d_n_j k_j

The cell's maximum receives sum_j d_n_j over all heads and passes it on to one a_k: of equals that of the lowest token,
then head, then feature. A second kernel adds it to dk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .favor_configs import tiles_for
from .favor_context import Summary
from .favor_features import Features, constants, half_norms, load_features, rising_maximum, tokens_by_features
from .favor_mix import load_columns, query_numbers
from .favor_partials import slot_of
from .launch import Options, block_dim, launch
from .packed_tiles import cell_range, program_tile, strides
from .softmax_tiles import LOG2_E, load_row_facts, load_tile, store_tile
from .tiles import tile_list

_LISTED = tl.constexpr(128)
_NOWHERE = tl.constexpr(2**62)
_NO_ROW = tl.constexpr(2**30)
MAX_OPTIONS = Options(num_warps=4, num_stages=1)


def key_grads(
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    features: Features,
    projection: Tensor,
    queries: Summary,
    cu_seqlens: Tensor,
    key_max: Tensor,
    given: bool,
    eps: float,
) -> Tensor:
    """Writes dk and dv; returns the gradient of the key maxima, (C,)."""
    num_tokens, num_heads, head_dim = k.shape
    sizes = tiles_for(k).key_grads
    tiles = tile_list(cu_seqlens, num_tokens, sizes.own)
    slots = (len(tiles), num_heads)
    amounts, tops = (k.new_empty(slots, dtype=torch.float32) for _ in range(2))
    tokens, places = (k.new_empty(slots, dtype=torch.int32) for _ in range(2))
    found = (amounts, tops, tokens, places)
    launch(
        favor_key_grads_kernel,
        (len(tiles) * num_heads,),
        (
            k,
            v,
            features.high,
            features.rest,
            queries.matrix,
            queries.totals,
            queries.columns,
            queries.scale,
            key_max,
            dk,
            dv,
            *found,
            tiles,
            cu_seqlens,
            *query_numbers(k, queries, eps),
            *strides(k, v),
        ),
        {**constants(k.dtype, head_dim, sizes), "TRACK": not given},
        sizes.options,
    )
    max_grad = torch.empty_like(key_max)
    launch(
        favor_key_max_kernel,
        (key_max.numel(),),
        (*found, projection, dk, max_grad, cu_seqlens, head_dim**-0.25, num_heads, features.count),
        {"HEAD_DIM": head_dim, "D": block_dim(head_dim), "OWN": sizes.own, "GIVEN": given},
        MAX_OPTIONS,
    )
    return max_grad


@triton.jit
def _key_grads_block(
    dk, dv, top, total, which, k, v, w_ptr, rest_ptr, d_matrix_ptr, d_totals_ptr, first, num_features, scale,
    STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    TRACK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    w, rest = load_features(
        w_ptr, rest_ptr, first, num_features, STREAMED, HEAD_DIM, k.shape[1], k.dtype, SPLIT, MASKED
    )
    a = tokens_by_features(k, w, rest, PRECISION, SPLIT)
    if MASKED:
        a = tl.where((tl.arange(0, STREAMED) < num_features - first)[None, :], a, float("-inf"))
    new_top, which = rising_maximum(a, top, which, first, TRACK)
    p = tl.exp2((a - new_top[:, None]) * (scale * LOG2_E))
    shrink = tl.exp2((top - new_top) * (scale * LOG2_E))
    d_matrix = load_tile(d_matrix_ptr, first, num_features, HEAD_DIM, STREAMED, HEAD_DIM, k.shape[1], MASKED)
    d_matrix = d_matrix.to(k.dtype)
    d_totals = load_row_facts(d_totals_ptr, first, num_features, 0.0, STREAMED, MASKED)
    t = p * (tl.dot(v, tl.trans(d_matrix), input_precision=PRECISION) + d_totals[None, :])
    dv = tl.dot(p.to(k.dtype), d_matrix, dv * shrink[:, None], input_precision=PRECISION)
    dk = tl.dot(t.to(k.dtype), w, dk * shrink[:, None], input_precision=PRECISION)
    return dk, dv, new_top, total * shrink + tl.sum(t, 1), which


@triton.jit
def favor_key_grads_kernel(
    k_ptr, v_ptr, w_ptr, rest_ptr, d_matrix_ptr, d_totals_ptr, d_columns_ptr, d_scale_ptr, key_max_ptr, dk_ptr,
    dv_ptr, amounts_ptr, tops_ptr, tokens_ptr, features_ptr, tiles_ptr, cu_seqlens_ptr, scale, eps, num_heads,
    num_features, num_blocks, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, TRACK: tl.constexpr,
):  # fmt: skip
    """dk without the maximum's share, dv; of the tile the sum of d_n's and its largest a, with token and feature."""
    cell, first, head = program_tile(tiles_ptr, num_heads)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    place = cell * num_heads + head
    k_ptr += begin * stride_kt + head * stride_kh
    v_ptr += begin * stride_vt + head * stride_vh
    k = load_tile(k_ptr, first, length, stride_kt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    v = load_tile(v_ptr, first, length, stride_vt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    dk = tl.zeros((OWN, D), tl.float32)
    dv = tl.zeros((OWN, D), tl.float32)
    top = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    which = tl.zeros((OWN,), tl.int32)
    d_matrix_ptr += place * num_features * HEAD_DIM
    d_totals_ptr += place * num_features
    whole = num_features // STREAMED * STREAMED
    for start in range(0, whole, STREAMED):
        dk, dv, top, total, which = _key_grads_block(
            dk, dv, top, total, which, k, v, w_ptr, rest_ptr, d_matrix_ptr, d_totals_ptr, start, num_features,
            scale, STREAMED, HEAD_DIM, PRECISION, SPLIT, TRACK, False,
        )  # fmt: skip
    if whole < num_features:
        dk, dv, top, total, which = _key_grads_block(
            dk, dv, top, total, which, k, v, w_ptr, rest_ptr, d_matrix_ptr, d_totals_ptr, whole, num_features,
            scale, STREAMED, HEAD_DIM, PRECISION, SPLIT, TRACK, True,
        )  # fmt: skip
    unit = tl.load(d_scale_ptr + 2 * place)
    e = tl.exp2((top * scale - half_norms(k, scale) - tl.load(key_max_ptr + cell)) * LOG2_E) * unit
    columns = load_columns(d_columns_ptr, place, num_blocks, HEAD_DIM, D) * (eps * unit)
    d_norms = -e * total
    row_stride = num_heads * HEAD_DIM
    stored = begin * row_stride + head * HEAD_DIM
    dv = e[:, None] * dv + columns[None, :]
    dk = scale * (e[:, None] * dk + (scale * d_norms)[:, None] * k.to(tl.float32))
    store_tile(dv_ptr + stored, dv, first, length, row_stride, HEAD_DIM)
    store_tile(dk_ptr + stored, dk, first, length, row_stride, HEAD_DIM)

    rows = first + tl.arange(0, OWN)
    slot = (slot_of(begin, cell, OWN) + first // OWN) * num_heads + head
    tl.store(amounts_ptr + slot, tl.sum(tl.where(rows < length, d_norms, 0.0), 0))
    if TRACK:
        top = tl.where(rows < length, top, float("-inf"))
        largest = tl.max(top, 0)
        row = tl.min(tl.where(top == largest, rows, _NO_ROW), 0)
        tl.store(tops_ptr + slot, largest)
        tl.store(tokens_ptr + slot, row)
        tl.store(features_ptr + slot, tl.min(tl.where(rows == row, which, _NO_ROW), 0))


@triton.jit
def favor_key_max_kernel(
    amounts_ptr, tops_ptr, tokens_ptr, features_ptr, projection_ptr, dk_ptr, max_grad_ptr, cu_seqlens_ptr, scale,
    num_heads, num_features, HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """One cell: the sum of what its tiles have for the maximum, added, unless that was given, where it came from."""
    cell = tl.program_id(0)
    begin, length = cell_range(cu_seqlens_ptr, cell)
    start = slot_of(begin, cell, OWN) * num_heads
    count = (length + OWN - 1) // OWN * num_heads
    amount = 0.0
    largest = float("-inf")
    for i in range(0, count, _LISTED):
        which = i + tl.arange(0, _LISTED)
        amount += tl.sum(tl.load(amounts_ptr + start + which, mask=which < count, other=0.0), 0)
        if not GIVEN:
            tops = tl.load(tops_ptr + start + which, mask=which < count, other=float("-inf"))
            largest = tl.maximum(largest, tl.max(tops, 0))
    tl.store(max_grad_ptr + cell, amount)
    if not GIVEN:
        place = tl.full((), _NOWHERE, tl.int64)  # a number whose order is that of (token, head, feature)
        for i in range(0, count, _LISTED):
            which = i + tl.arange(0, _LISTED)
            ok = which < count
            tops = tl.load(tops_ptr + start + which, mask=ok, other=float("-inf"))
            token = tl.load(tokens_ptr + start + which, mask=ok, other=0).to(tl.int64)
            feature = tl.load(features_ptr + start + which, mask=ok, other=0)
            candidate = (token * num_heads + which % num_heads) * num_features + feature
            place = tl.minimum(place, tl.min(tl.where(ok & (tops == largest), candidate, _NOWHERE), 0))
        dims = tl.arange(0, D)
        ok = (dims < HEAD_DIM) & (place + tl.zeros_like(dims) < _NOWHERE)  # none where every a is NaN
        w = tl.load(projection_ptr + place % num_features * HEAD_DIM + dims, mask=ok, other=0.0)
        row_ptrs = dk_ptr + (begin * num_heads + place // num_features) * HEAD_DIM + dims
        dk = tl.load(row_ptrs, mask=ok, other=0.0).to(tl.float32) + amount * scale * w
        tl.store(row_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=ok)
