"""The gradients of FAVOR+ attention, every feature map made once more instead of kept.

Queries come first: their kernel makes out and norm again, then dq and the facts that d_context needs of each query.
Keys follow from d_context, again as attention with features in the place of keys: with p_jf = exp(a_jf - max_f a_jf),
e_j = exp(max_f a_jf - n_j - M) and t = p (v . d_context + d_total),

    dv_j = e_j sum_f p_jf d_context_f + eps sum_f d_context_f
    d_n_j = -e_j sum_f t_jf,   dk_j = c e_j sum_f t_jf W_f + c^2 d_n_j k_j

Both maxima pass a gradient on: a query's to the feature it is at, and the cell's, which receives sum_j d_n_j over all
heads, to one a_k: of equals that of the lowest token, then head, then feature. A last kernel adds it to dk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import favor_context as context
from .favor_attention import load_columns as _load_columns
from .favor_attention import mix, query_inputs, query_numbers, rising_maximum, tiles_for, tokens_by_features
from .favor_context import Features, Summary, half_norms, load_features, slot_of
from .launch import Options, as_stored, block_dim, launch, new_output
from .packed_tiles import cell_range, program_tile, rows_contiguous, strides
from .softmax_tiles import LOG2_E, load_row_facts, load_tile, store_tile
from .tiles import tile_list

_LISTED = tl.constexpr(128)
_NOWHERE = tl.constexpr(2**62)
_NO_ROW = tl.constexpr(2**30)
_MAX_OPTIONS = Options(num_warps=4, num_stages=1)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_max: Tensor,
    given: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v, and the gradient (C,) of the key maxima.

    key_max: the forward's; given: it was an input, so its gradient is not in dk. Else as favor_attention.forward.
    """
    grad_out, q, k, v = (rows_contiguous(x) for x in (grad_out, q, k, v))
    sizes, features = tiles_for(q), context.split_projection(projection, q.dtype)
    keys, _ = context.summarize_keys(k, v, features, cu_seqlens, key_max, eps, sizes.keys)
    dq = new_output(q)
    facts = _query_grad(grad_out, q, dq, features, keys, cu_seqlens, eps)
    queries = context.summarize_queries(
        grad_out, q, features, facts, keys.scale, cu_seqlens, eps, sizes.queries_grad
    )
    dk, dv = new_output(k), new_output(v)
    max_grad = _key_grads(k, v, dk, dv, features, projection, queries, cu_seqlens, key_max, given, eps)
    return as_stored(dq, q), as_stored(dk, k), as_stored(dv, v), max_grad


def _query_grad(
    grad_out: Tensor,
    q: Tensor,
    dq: Tensor,
    features: Features,
    keys: Summary,
    cu_seqlens: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dq; returns (H, T) each: n + max a in base 2, 1 / norm, delta = rowsum(out * grad_out)."""
    num_tokens, num_heads, head_dim = q.shape
    shift, inverse, delta = (q.new_empty((num_heads, num_tokens), dtype=torch.float32) for _ in range(3))
    sizes = tiles_for(q).query_grad
    tiles = tile_list(cu_seqlens, num_tokens, sizes.own)
    outputs = (dq, shift, inverse, delta, tiles, cu_seqlens, num_tokens)
    launch(
        favor_query_grad_kernel,
        (len(tiles) * num_heads,),
        (
            grad_out,
            q,
            *query_inputs(features, keys),
            *outputs,
            *query_numbers(q, keys, eps),
            *strides(grad_out, q),
        ),
        context.constants(q.dtype, head_dim, sizes),
        sizes.options,
    )
    return shift, inverse, delta


def _key_grads(
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
        {**context.constants(k.dtype, head_dim, sizes), "TRACK": not given},
        sizes.options,
    )
    max_grad = torch.empty_like(key_max)
    launch(
        favor_key_max_kernel,
        (key_max.numel(),),
        (*found, projection, dk, max_grad, cu_seqlens, head_dim**-0.25, num_heads, features.count),
        {"HEAD_DIM": head_dim, "D": block_dim(head_dim), "OWN": sizes.own, "GIVEN": given},
        _MAX_OPTIONS,
    )
    return max_grad


# ---- queries ----------------------------------------------------------------------------------------------------


@triton.jit
def _query_grad_block(
    dq, total, q, grad_out, delta, top, which, w_ptr, rest_ptr, matrix_ptr, totals_ptr, first, num_features,
    scale, STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    w, rest = load_features(
        w_ptr, rest_ptr, first, num_features, STREAMED, HEAD_DIM, q.shape[1], q.dtype, SPLIT, MASKED
    )
    features = first + tl.arange(0, STREAMED)
    p = tl.exp2((tokens_by_features(q, w, rest, PRECISION, SPLIT) - top[:, None]) * (scale * LOG2_E))
    if MASKED:
        p = tl.where((features < num_features)[None, :], p, 0.0)
    matrix = load_tile(matrix_ptr, first, num_features, HEAD_DIM, STREAMED, HEAD_DIM, q.shape[1], MASKED)
    totals = load_row_facts(totals_ptr, first, num_features, 0.0, STREAMED, MASKED)
    along = tl.dot(grad_out, tl.trans(matrix.to(q.dtype)), input_precision=PRECISION)
    t = p * (along - delta[:, None] * totals[None, :])
    total += tl.sum(t, 1)
    # The feature of the maximum is left out: its own gradient and the maximum's nearly cancel (see the kernel).
    t = tl.where(features[None, :] == which[:, None], 0.0, t)
    return tl.dot(t.to(q.dtype), w, dq, input_precision=PRECISION), total, tl.sum(t, 1)


@triton.jit(do_not_specialize=["num_tokens"])
def favor_query_grad_kernel(
    grad_out_ptr, q_ptr, w_ptr, rest_ptr, matrix_ptr, totals_ptr, columns_ptr, scale_ptr, dq_ptr, shift_ptr,
    inverse_ptr, delta_ptr, tiles_ptr, cu_seqlens_ptr, num_tokens, scale, eps, num_heads, num_features,
    num_blocks, stride_gt, stride_gh, stride_qt, stride_qh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    cell, first, head = program_tile(tiles_ptr, num_heads)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    q_ptr += begin * stride_qt + head * stride_qh
    grad_out_ptr += begin * stride_gt + head * stride_gh
    place = cell * num_heads + head
    q = load_tile(q_ptr, first, length, stride_qt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    grad_out = load_tile(grad_out_ptr, first, length, stride_gt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    out, norm, top, which, norms = mix(
        q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, columns_ptr, scale_ptr, place, scale, eps, num_features,
        num_blocks, STREAMED, HEAD_DIM, PRECISION, SPLIT, True,
    )  # fmt: skip
    delta = tl.sum(out * grad_out.to(tl.float32), 1)
    rows = first + tl.arange(0, OWN)
    facts = head * num_tokens + begin + rows
    tl.store(shift_ptr + facts, (norms + top * scale) * LOG2_E, mask=rows < length)
    tl.store(inverse_ptr + facts, 1.0 / norm, mask=rows < length)
    tl.store(delta_ptr + facts, delta, mask=rows < length)

    matrix_ptr += place * num_features * HEAD_DIM
    totals_ptr += place * num_features
    dq = tl.zeros((OWN, D), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    others = tl.zeros((OWN,), tl.float32)
    whole = num_features // STREAMED * STREAMED
    for start in range(0, whole, STREAMED):
        dq, total, more = _query_grad_block(
            dq, total, q, grad_out, delta, top, which, w_ptr, rest_ptr, matrix_ptr, totals_ptr, start,
            num_features, scale, STREAMED, HEAD_DIM, PRECISION, SPLIT, False,
        )  # fmt: skip
        others += more
    if whole < num_features:
        dq, total, more = _query_grad_block(
            dq, total, q, grad_out, delta, top, which, w_ptr, rest_ptr, matrix_ptr, totals_ptr, whole,
            num_features, scale, STREAMED, HEAD_DIM, PRECISION, SPLIT, True,
        )  # fmt: skip
        others += more
    # a's gradient is t but at the maximum, where it is t less the sum of all: less the sum of the others.
    dims = tl.arange(0, D)
    ok = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    at_top = tl.load(w_ptr + which[:, None] * HEAD_DIM + dims[None, :], mask=ok, other=0.0).to(tl.float32)
    if SPLIT:
        at_top += tl.load(rest_ptr + which[:, None] * HEAD_DIM + dims[None, :], mask=ok, other=0.0).to(
            tl.float32
        )
    dq -= others[:, None] * at_top + (total * scale)[:, None] * q.to(tl.float32)
    dq *= (tl.exp2(-norms * LOG2_E) / norm * scale)[:, None]
    row_stride = num_heads * HEAD_DIM
    store_tile(dq_ptr + begin * row_stride + head * HEAD_DIM, dq, first, length, row_stride, HEAD_DIM)


# ---- keys -------------------------------------------------------------------------------------------------------


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
    columns = _load_columns(d_columns_ptr, place, num_blocks, HEAD_DIM, D) * (eps * unit)
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
    amounts_ptr, tops_ptr, tokens_ptr, features_ptr, w_ptr, dk_ptr, max_grad_ptr, cu_seqlens_ptr, scale,
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
        w = tl.load(w_ptr + place % num_features * HEAD_DIM + dims, mask=ok, other=0.0)
        row_ptrs = dk_ptr + (begin * num_heads + place // num_features) * HEAD_DIM + dims
        dk = tl.load(row_ptrs, mask=ok, other=0.0).to(tl.float32) + amount * scale * w
        tl.store(row_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=ok)
