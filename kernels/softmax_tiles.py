"""Softmax attention of one tile with a range of tokens: the streaming loops that attention kernels are made of.

Scores are made a tile at a time, used and forgotten (the online softmax of FlashAttention). Exponentials are in base
2, the scale folded into the same multiplication. Each loop runs over whole tiles without any mask arithmetic and
ends with at most one partial tile that has it. The backward makes the probabilities again from ``lse``, the natural
log-sum-exp of every query, and needs ``delta = rowsum(out * grad_out)``.

Legend: M queries and N keys a tile, D head_dim padded to a power of two. Pointers are at the cell's first token and at
the head; ``first`` and ``last`` are tokens relative to it, so products with strides are made in 64 bits for
a tile's first row only.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    ptr, first, last, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(BLOCK, D) rows from ``first`` on; where MASKED, zeros from row ``last`` on; zeros beyond HEAD_DIM."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    ptrs = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    if MASKED:
        return tl.load(ptrs, mask=(rows < last - first)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM < D:
        return tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_tile(ptr, tile, first, last, stride, HEAD_DIM: tl.constexpr):
    """Rows first..last of a float32 tile, in the storage type of ``ptr``."""
    rows = tl.arange(0, tile.shape[0])
    dims = tl.arange(0, tile.shape[1])
    ptrs = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    ok = (rows < last - first)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=ok)


# ---- forward ----------------------------------------------------------------------------------------------------


@triton.jit
def _attend_tile(
    acc, row_max, row_sum, q, k_ptr, v_ptr, first, last, stride_k, stride_v, scale,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    k = load_tile(k_ptr, first, last, stride_k, BLOCK_N, HEAD_DIM, q.shape[1], MASKED).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where((tl.arange(0, BLOCK_N) < last - first)[None, :], scores, float("-inf"))
    # The maximum is kept as it is subtracted, rounded: with a product in each difference, fused multiply-adds would
    # make the factor of an unchanged maximum miss 1, by as much in every turn.
    new_max = tl.maximum(row_max, tl.max(scores, 1) * (scale * LOG2_E))
    p = tl.exp2(scores * (scale * LOG2_E) - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    v = load_tile(v_ptr, first, last, stride_v, BLOCK_N, HEAD_DIM, q.shape[1], MASKED).to(q.dtype)
    acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit
def attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, last, stride_k, stride_v, scale, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc, row_max, row_sum) of the queries ``q`` (M, D) after the keys 0..last of the cell.

    Start with zeros, -infinity and zeros, or with a key that is apart. scale > 0. Out is acc / row_sum; row_max is
    of scores * scale in base 2.
    """
    whole = last // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, q, k_ptr, v_ptr, first, last, stride_k, stride_v, scale, BLOCK_N,
            HEAD_DIM, PRECISION, False,
        )  # fmt: skip
    if whole < last:
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, q, k_ptr, v_ptr, whole, last, stride_k, stride_v, scale, BLOCK_N,
            HEAD_DIM, PRECISION, True,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def finish(acc, row_max, row_sum):
    """(out, lse) of the queries; zeros and -infinity where there was no key."""
    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    return acc / total[:, None], tl.where(row_sum == 0.0, float("-inf"), row_max * LN_2 + tl.log(total))


# ---- backward ---------------------------------------------------------------------------------------------------


@triton.jit
def load_row_facts(ptr, first, last, other, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    rows = first + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(ptr + rows, mask=rows < last, other=other)
    return tl.load(ptr + rows)


@triton.jit
def probabilities(scores, lse, scale, FULL_PRECISION: tl.constexpr):
    """exp(scale * scores - lse), once more as in the forward.

    For float32 the difference is made before it is scaled to base 2, or the rounding of lse * log2(e) would be the
    largest error of the gradients; for the 16-bit types that multiplication is saved.
    """
    if FULL_PRECISION:
        return tl.exp2((scores * scale - lse) * LOG2_E)
    return tl.exp2(scores * (scale * LOG2_E) - lse * LOG2_E)


@triton.jit
def _query_grad_tile(
    dq, q, grad_out, lse, delta, k_ptr, v_ptr, first, last, stride_k, stride_v, scale,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    k = load_tile(k_ptr, first, last, stride_k, BLOCK_N, HEAD_DIM, q.shape[1], MASKED).to(q.dtype)
    v = load_tile(v_ptr, first, last, stride_v, BLOCK_N, HEAD_DIM, q.shape[1], MASKED).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = probabilities(scores, lse[:, None], scale, q.dtype == tl.float32)
    if MASKED:
        p = tl.where((tl.arange(0, BLOCK_N) < last - first)[None, :], p, 0.0)
    ds = p * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def query_grad(
    dq, q, grad_out, lse, delta, k_ptr, v_ptr, last, stride_k, stride_v, scale, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (M, D) / scale after the keys 0..last of the cell, added to the one given. Unused queries: lse = infinity."""
    whole = last // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        dq = _query_grad_tile(
            dq, q, grad_out, lse, delta, k_ptr, v_ptr, first, last, stride_k, stride_v, scale, BLOCK_N,
            HEAD_DIM, PRECISION, False,
        )  # fmt: skip
    if whole < last:
        dq = _query_grad_tile(
            dq, q, grad_out, lse, delta, k_ptr, v_ptr, whole, last, stride_k, stride_v, scale, BLOCK_N,
            HEAD_DIM, PRECISION, True,
        )  # fmt: skip
    return dq


@triton.jit
def _key_grads_tile(
    dk, dv, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, first, last, stride_q, stride_g, scale,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # Everything is computed transposed, (N, M), so that both gradients are products without a transposed result.
    # Queries beyond the last have lse = infinity, thus probability 0: no other mask is needed.
    q = load_tile(q_ptr, first, last, stride_q, BLOCK_M, HEAD_DIM, k.shape[1], MASKED).to(k.dtype)
    lse = load_row_facts(lse_ptr, first, last, float("inf"), BLOCK_M, MASKED)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = probabilities(scores, lse[None, :], scale, k.dtype == tl.float32)
    grad_out = load_tile(grad_out_ptr, first, last, stride_g, BLOCK_M, HEAD_DIM, k.shape[1], MASKED).to(
        k.dtype
    )
    dv = tl.dot(p.to(k.dtype), grad_out, dv, input_precision=PRECISION)
    delta = load_row_facts(delta_ptr, first, last, 0.0, BLOCK_M, MASKED)
    ds = p * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(k.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def key_grads(
    k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, last, stride_q, stride_g, scale,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(dk / scale, dv) of the keys ``k`` (N, D) and their values from the queries 0..last of the cell."""
    dk = tl.zeros(k.shape, tl.float32)
    dv = tl.zeros(k.shape, tl.float32)
    whole = last // BLOCK_M * BLOCK_M
    for first in range(0, whole, BLOCK_M):
        dk, dv = _key_grads_tile(
            dk, dv, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, first, last, stride_q, stride_g,
            scale, BLOCK_M, HEAD_DIM, PRECISION, False,
        )  # fmt: skip
    if whole < last:
        dk, dv = _key_grads_tile(
            dk, dv, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, whole, last, stride_q, stride_g,
            scale, BLOCK_M, HEAD_DIM, PRECISION, True,
        )  # fmt: skip
    return dk, dv
