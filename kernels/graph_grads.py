"""Kernels of sparse attention's backward: a tile's gradients from the gathered rows of its list.

Queries stream those that they see; keys and values those that see them. The probabilities are made again from the
log-sum-exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .graph_tiles import BLOCK, gather, is_pair, program_tile
from .softmax_tiles import load_row_facts, load_tile, probabilities, store_tile


@triton.jit
def _query_grad_listed(
    dq, q, grad_out, lse, delta, k_ptr, v_ptr, entries_ptr, words_ptr, start, own, stride_k, stride_v, scale,
    STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    entries = tl.load(entries_ptr + start + tl.arange(0, STREAMED))
    k = gather(k_ptr, entries, stride_k, HEAD_DIM, q.shape[1]).to(q.dtype)
    v = gather(v_ptr, entries, stride_v, HEAD_DIM, q.shape[1]).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = probabilities(scores, lse[:, None], scale, q.dtype == tl.float32)
    if MASKED:
        words = tl.load(words_ptr + start + tl.arange(0, STREAMED))
        p = tl.where(is_pair(words[None, :], own[:, None]), p, 0.0)
    ds = p * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_tokens"])
def graph_query_grad_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr, entries_ptr, words_ptr,
    num_tokens, scale, num_heads,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    begin, num_own, first, head, first_block, masked_from, end = program_tile(tiles_ptr, num_heads, OWN)
    if first >= num_own:
        return
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    q_ptr += begin * stride_qt + head * stride_qh
    grad_out_ptr += begin * stride_gt + head * stride_gh
    q = load_tile(q_ptr, first, num_own, stride_qt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    grad_out = load_tile(grad_out_ptr, first, num_own, stride_gt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    facts = head * num_tokens + begin
    lse = load_row_facts(lse_ptr + facts, first, num_own, float("inf"), OWN, True)
    delta = load_row_facts(delta_ptr + facts, first, num_own, 0.0, OWN, True)
    own = (first + tl.arange(0, OWN)).to(tl.int64)
    dq = tl.zeros((OWN, D), tl.float32)
    for start in range(first_block * BLOCK, masked_from * BLOCK, STREAMED):
        dq = _query_grad_listed(
            dq, q, grad_out, lse, delta, k_ptr, v_ptr, entries_ptr, words_ptr, start, own, stride_kt, stride_vt,
            scale, STREAMED, HEAD_DIM, PRECISION, False,
        )  # fmt: skip
    for start in range(masked_from * BLOCK, end * BLOCK, STREAMED):
        dq = _query_grad_listed(
            dq, q, grad_out, lse, delta, k_ptr, v_ptr, entries_ptr, words_ptr, start, own, stride_kt, stride_vt,
            scale, STREAMED, HEAD_DIM, PRECISION, True,
        )  # fmt: skip
    row_stride = num_heads * HEAD_DIM
    store_tile(
        dq_ptr + begin * row_stride + head * HEAD_DIM, dq * scale, first, num_own, row_stride, HEAD_DIM
    )


@triton.jit
def _key_grads_listed(
    dk, dv, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, entries_ptr, words_ptr, start, own, stride_q,
    stride_g, scale, STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    # Everything transposed, (keys, queries), so that both gradients are products without a transposed result.
    entries = tl.load(entries_ptr + start + tl.arange(0, STREAMED))
    q = gather(q_ptr, entries, stride_q, HEAD_DIM, k.shape[1]).to(k.dtype)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = probabilities(scores, tl.load(lse_ptr + entries)[None, :], scale, k.dtype == tl.float32)
    if MASKED:
        words = tl.load(words_ptr + start + tl.arange(0, STREAMED))
        p = tl.where(is_pair(words[None, :], own[:, None]), p, 0.0)
    grad_out = gather(grad_out_ptr, entries, stride_g, HEAD_DIM, k.shape[1]).to(k.dtype)
    dv = tl.dot(p.to(k.dtype), grad_out, dv, input_precision=PRECISION)
    delta = tl.load(delta_ptr + entries)
    ds = p * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(k.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=["num_tokens"])
def graph_key_grads_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr, entries_ptr, words_ptr,
    num_tokens, scale, num_heads,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    begin, num_own, first, head, first_block, masked_from, end = program_tile(tiles_ptr, num_heads, OWN)
    if first >= num_own:
        return
    k = load_tile(
        k_ptr + begin * stride_kt + head * stride_kh, first, num_own, stride_kt, OWN, HEAD_DIM, D, True
    ).to(DOT_DTYPE)
    v = load_tile(
        v_ptr + begin * stride_vt + head * stride_vh, first, num_own, stride_vt, OWN, HEAD_DIM, D, True
    ).to(DOT_DTYPE)
    q_ptr += head * stride_qh
    grad_out_ptr += head * stride_gh
    lse_ptr += head * num_tokens
    delta_ptr += head * num_tokens
    own = (first + tl.arange(0, OWN)).to(tl.int64)
    dk = tl.zeros((OWN, D), tl.float32)
    dv = tl.zeros((OWN, D), tl.float32)
    for start in range(first_block * BLOCK, masked_from * BLOCK, STREAMED):
        dk, dv = _key_grads_listed(
            dk, dv, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, entries_ptr, words_ptr, start, own, stride_qt,
            stride_gt, scale, STREAMED, HEAD_DIM, PRECISION, False,
        )  # fmt: skip
    for start in range(masked_from * BLOCK, end * BLOCK, STREAMED):
        dk, dv = _key_grads_listed(
            dk, dv, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, entries_ptr, words_ptr, start, own, stride_qt,
            stride_gt, scale, STREAMED, HEAD_DIM, PRECISION, True,
        )  # fmt: skip
    row_stride = num_heads * HEAD_DIM
    place = begin * row_stride + head * HEAD_DIM
    store_tile(dk_ptr + place, dk * scale, first, num_own, row_stride, HEAD_DIM)
    store_tile(dv_ptr + place, dv, first, num_own, row_stride, HEAD_DIM)
