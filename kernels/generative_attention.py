"""Attention with scGPT's mask for generation: keys are the known tokens of a cell, and an unknown query's own.

Known tokens come first in a cell, so a program streams over the first ``num_known`` keys as if they were the cell; an
unknown query starts from its own score and value instead of from nothing. Nothing unknown x unknown is formed. In the
backward the gradients of an unknown key and value come from their own query alone: the kernel of the queries'
gradient, which has them at hand, writes them; the kernel of the keys visits known keys only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import row_facts
from .aot import Target
from .attention_configs import forward_tiles, key_grads_tiles, query_grad_tiles
from .launch import architecture, as_stored, launch, new_output
from .packed_tiles import (
    cell_range,
    constants,
    positive_scale,
    program_tile,
    rows_contiguous,
    store_queries,
    strides,
    target,
)
from .softmax_tiles import (
    LOG2_E,
    attend,
    finish,
    key_grads,
    load_row_facts,
    load_tile,
    probabilities,
    query_grad,
    store_tile,
)
from .tiles import tile_list


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, num_known: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in q's dtype and the natural log-sum-exp (T, H) float32.

    q, k, v: (T, H, D) float32, bfloat16 or float16, any strides; cu_seqlens: int32 (C + 1,); num_known: int32 (C,).
    """
    if scale <= 0:
        q, _, scale = positive_scale(q, scale)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    num_tokens, num_heads, head_dim = q.shape
    out = new_output(q)
    lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32)
    sizes = forward_tiles(architecture(q.device), head_dim, q.element_size() * 8)
    tiles = tile_list(cu_seqlens, num_tokens, sizes.own, work=num_known)
    launch(
        generative_forward_kernel,
        (len(tiles) * num_heads,),
        (q, k, v, out, lse, tiles, cu_seqlens, num_known, scale, num_heads, *strides(q, k, v)),
        constants(q.dtype, head_dim, sizes),
        sizes.options,
    )
    return as_stored(out, q), lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    num_known: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the shapes and dtypes of q, k, v; out and lse are the forward's."""
    if scale <= 0:
        q, sign, scale = positive_scale(q, scale)
        dq, dk, dv = backward(grad_out, q, k, v, out, lse, cu_seqlens, num_known, scale)
        return sign * dq, dk, dv
    grad_out, q, k, v = (rows_contiguous(x) for x in (grad_out, q, k, v))
    num_tokens, num_heads, head_dim = q.shape
    dq, dk, dv = (new_output(x) for x in (q, k, v))
    lse, delta = row_facts.backward_rows(out, grad_out, lse)
    given = (grad_out, q, k, v, lse, delta)
    rest = (cu_seqlens, num_known, num_tokens, scale, num_heads, *strides(grad_out, q, k, v))
    kind = (architecture(q.device), head_dim, q.element_size() * 8)

    sizes = key_grads_tiles(*kind)
    tiles = tile_list(cu_seqlens, num_tokens, sizes.own, counts=num_known, work=cu_seqlens)
    held = constants(q.dtype, head_dim, sizes)
    grid = (len(tiles) * num_heads,)
    launch(generative_key_grads_kernel, grid, (*given, dk, dv, tiles, *rest), held, sizes.options)

    sizes = query_grad_tiles(*kind)
    tiles = tile_list(cu_seqlens, num_tokens, sizes.own, work=num_known)
    held = constants(q.dtype, head_dim, sizes)
    grid = (len(tiles) * num_heads,)
    launch(generative_query_grad_kernel, grid, (*given, dq, dk, dv, tiles, *rest), held, sizes.options)
    return as_stored(dq, q), as_stored(dk, k), as_stored(dv, v)


@triton.jit
def generative_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, cu_seqlens_ptr, num_known_ptr, scale, num_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    cell, first, head = program_tile(tiles_ptr, num_heads)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    num_known = tl.load(num_known_ptr + cell)
    q_ptr += begin * stride_qt + head * stride_qh
    k_ptr += begin * stride_kt + head * stride_kh
    v_ptr += begin * stride_vt + head * stride_vh
    q = load_tile(q_ptr, first, length, stride_qt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    acc = tl.zeros((OWN, D), tl.float32)
    row_max = tl.full((OWN,), float("-inf"), tl.float32)
    row_sum = tl.zeros((OWN,), tl.float32)
    if first + OWN > num_known:
        unknown = first + tl.arange(0, OWN) >= num_known
        k_own = load_tile(k_ptr, first, length, stride_kt, OWN, HEAD_DIM, D, True).to(tl.float32)
        v_own = load_tile(v_ptr, first, length, stride_vt, OWN, HEAD_DIM, D, True).to(tl.float32)
        own = tl.sum(q.to(tl.float32) * k_own, 1)
        acc = tl.where(unknown[:, None], v_own, acc)
        row_max = tl.where(unknown, own * (scale * LOG2_E), row_max)
        row_sum = tl.where(unknown, 1.0, row_sum)
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, num_known, stride_kt, stride_vt, scale, STREAMED, HEAD_DIM,
        PRECISION,
    )  # fmt: skip
    out, lse = finish(acc, row_max, row_sum)
    store_queries(out_ptr, lse_ptr, out, lse, begin, first, length, head, num_heads, HEAD_DIM)


@triton.jit(do_not_specialize=["num_queries"])
def generative_key_grads_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr, cu_seqlens_ptr, num_known_ptr,
    num_queries, scale, num_heads,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Known keys: every query of the cell sees them."""
    cell, first, head = program_tile(tiles_ptr, num_heads)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    num_known = tl.load(num_known_ptr + cell)
    k_ptr += begin * stride_kt + head * stride_kh
    v_ptr += begin * stride_vt + head * stride_vh
    k = load_tile(k_ptr, first, num_known, stride_kt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    v = load_tile(v_ptr, first, num_known, stride_vt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    q_ptr += begin * stride_qt + head * stride_qh
    grad_out_ptr += begin * stride_gt + head * stride_gh
    facts = head * num_queries + begin
    dk, dv = key_grads(
        k, v, q_ptr, grad_out_ptr, lse_ptr + facts, delta_ptr + facts, length, stride_qt, stride_gt,
        scale, STREAMED, HEAD_DIM, PRECISION,
    )  # fmt: skip
    row_stride = num_heads * HEAD_DIM
    place = begin * row_stride + head * HEAD_DIM
    store_tile(dk_ptr + place, dk * scale, first, num_known, row_stride, HEAD_DIM)
    store_tile(dv_ptr + place, dv, first, num_known, row_stride, HEAD_DIM)


@triton.jit(do_not_specialize=["num_queries"])
def generative_query_grad_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, tiles_ptr, cu_seqlens_ptr,
    num_known_ptr, num_queries, scale, num_heads,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every query, and the keys and values of the unknown ones."""
    cell, first, head = program_tile(tiles_ptr, num_heads)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    num_known = tl.load(num_known_ptr + cell)
    q_ptr += begin * stride_qt + head * stride_qh
    grad_out_ptr += begin * stride_gt + head * stride_gh
    k_ptr += begin * stride_kt + head * stride_kh
    v_ptr += begin * stride_vt + head * stride_vh
    q = load_tile(q_ptr, first, length, stride_qt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    grad_out = load_tile(grad_out_ptr, first, length, stride_gt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    facts = head * num_queries + begin
    lse = load_row_facts(lse_ptr + facts, first, length, float("inf"), OWN, True)
    delta = load_row_facts(delta_ptr + facts, first, length, 0.0, OWN, True)
    row_stride = num_heads * HEAD_DIM
    place = begin * row_stride + head * HEAD_DIM
    dq = tl.zeros((OWN, D), tl.float32)
    if first + OWN > num_known:
        dq = _own_key_grads(
            q, grad_out, lse, delta, k_ptr, v_ptr, dk_ptr + place, dv_ptr + place, first, num_known, length,
            stride_kt, stride_vt, row_stride, scale, HEAD_DIM,
        )  # fmt: skip
    dq = query_grad(
        dq, q, grad_out, lse, delta, k_ptr, v_ptr, num_known, stride_kt, stride_vt, scale,
        STREAMED, HEAD_DIM, PRECISION,
    )  # fmt: skip
    store_tile(dq_ptr + place, dq * scale, first, length, row_stride, HEAD_DIM)


@triton.jit
def _own_key_grads(
    q, grad_out, lse, delta, k_ptr, v_ptr, dk_ptr, dv_ptr, first, num_known, length, stride_k, stride_v, stride_out,
    scale, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dq / scale of the unknown queries' own keys; writes dk and dv of those."""
    k = load_tile(k_ptr, first, length, stride_k, q.shape[0], HEAD_DIM, q.shape[1], True).to(tl.float32)
    v = load_tile(v_ptr, first, length, stride_v, q.shape[0], HEAD_DIM, q.shape[1], True).to(tl.float32)
    unknown = first + tl.arange(0, q.shape[0]) >= num_known
    p = probabilities(tl.sum(q.to(tl.float32) * k, 1), lse, scale, True)
    p = tl.where(unknown, p, 0.0)
    ds = p * (tl.sum(grad_out.to(tl.float32) * v, 1) - delta)
    dk = ds[:, None] * q.to(tl.float32) * scale
    dv = p[:, None] * grad_out.to(tl.float32)
    _store_unknown(dk_ptr, dk, first, num_known, length, stride_out, HEAD_DIM)
    _store_unknown(dv_ptr, dv, first, num_known, length, stride_out, HEAD_DIM)
    return ds[:, None] * k


@triton.jit
def _store_unknown(ptr, tile, first, num_known, length, stride, HEAD_DIM: tl.constexpr):
    rows = tl.arange(0, tile.shape[0])
    dims = tl.arange(0, tile.shape[1])
    ptrs = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    ok = ((first + rows >= num_known) & (first + rows < length))[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=ok)


def aot_targets() -> list[Target]:
    return [
        target(f"generative_{name}", kernel, chosen(arch, 64, 16), torch.bfloat16, 64, arch)
        for arch in (80, 90, 100)
        for name, kernel, chosen in (
            ("forward", generative_forward_kernel, forward_tiles),
            ("key_grads", generative_key_grads_kernel, key_grads_tiles),
            ("query_grad", generative_query_grad_kernel, query_grad_tiles),
        )
    ]
