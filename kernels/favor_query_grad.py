"""The queries' gradient of FAVOR+ attention, and what d_context needs to know of every query.

The kernel makes out and norm again, then streams the features once more. A query's maximum passes its gradient on to
the feature it is at.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .favor_configs import tiles_for
from .favor_context import Summary
from .favor_features import Features, constants, load_features, tokens_by_features
from .favor_mix import mix, query_inputs, query_numbers
from .launch import launch
from .packed_tiles import cell_range, program_tile, strides
from .softmax_tiles import LOG2_E, load_row_facts, load_tile, store_tile
from .tiles import tile_list


def query_grad(
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
        constants(q.dtype, head_dim, sizes),
        sizes.options,
    )
    return shift, inverse, delta


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
