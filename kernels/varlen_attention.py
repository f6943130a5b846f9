"""Attention inside each packed cell: forward, and a backward in two kernels, without atomics.

A program computes one tile of queries (or, for the gradients of keys and values, of keys) of one head; the tile list
says which. Neighbouring programs are the heads of one tile and then the tiles of one cell, so that the keys and
values of a cell stay in the L2 cache. Every result depends on its own cell only: tiles start at the cell's start.

Source: FlashAttention-2 (Dao, 2023), algorithms 1 and 2, with the queries' gradient in a kernel of its own.
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
from .softmax_tiles import attend, finish, key_grads, load_row_facts, load_tile, query_grad, store_tile
from .tiles import tile_list


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out (Tq, H, D) in q's dtype and the natural log-sum-exp (Tq, H) float32.

    q: (Tq, H, D), k and v: (Tk, H, D), float32, bfloat16 or float16, any strides; offsets: int32 (C + 1,).
    """
    if scale <= 0:
        q, _, scale = positive_scale(q, scale)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    num_tokens, num_heads, head_dim = q.shape
    out = new_output(q)
    lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32)
    sizes = forward_tiles(architecture(q.device), head_dim, q.element_size() * 8)
    tiles = tile_list(cu_seqlens_q, num_tokens, sizes.own, work=cu_seqlens_k)
    launch(
        varlen_forward_kernel,
        (len(tiles) * num_heads,),
        (q, k, v, out, lse, tiles, cu_seqlens_q, cu_seqlens_k, scale, num_heads, *strides(q, k, v)),
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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the shapes and dtypes of q, k, v; out and lse are the forward's."""
    if scale <= 0:
        q, sign, scale = positive_scale(q, scale)
        dq, dk, dv = backward(grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale)
        return sign * dq, dk, dv
    grad_out, q, k, v = (rows_contiguous(x) for x in (grad_out, q, k, v))
    num_heads, head_dim = q.shape[1:]
    dq, dk, dv = (new_output(x) for x in (q, k, v))
    lse, delta = row_facts.backward_rows(out, grad_out, lse)
    common = (grad_out, q, k, v, lse, delta)
    rest = (cu_seqlens_q, cu_seqlens_k, len(q), scale, num_heads, *strides(grad_out, q, k, v))
    kind = (architecture(q.device), head_dim, q.element_size() * 8)

    sizes = key_grads_tiles(*kind)
    tiles = tile_list(cu_seqlens_k, len(k), sizes.own, work=cu_seqlens_q)
    grid = (len(tiles) * num_heads,)
    held = constants(q.dtype, head_dim, sizes)
    launch(varlen_key_grads_kernel, grid, (*common, dk, dv, tiles, *rest), held, sizes.options)

    sizes = query_grad_tiles(*kind)
    tiles = tile_list(cu_seqlens_q, len(q), sizes.own, work=cu_seqlens_k)
    grid = (len(tiles) * num_heads,)
    held = constants(q.dtype, head_dim, sizes)
    launch(varlen_query_grad_kernel, grid, (*common, dq, tiles, *rest), held, sizes.options)
    return as_stored(dq, q), as_stored(dk, k), as_stored(dv, v)


@triton.jit
def varlen_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, scale, num_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    cell, first, head = program_tile(tiles_ptr, num_heads)
    if cell < 0:
        return
    begin_q, num_q = cell_range(cu_seqlens_q_ptr, cell)
    begin_k, num_k = cell_range(cu_seqlens_k_ptr, cell)
    q_ptr += begin_q * stride_qt + head * stride_qh
    k_ptr += begin_k * stride_kt + head * stride_kh
    v_ptr += begin_k * stride_vt + head * stride_vh
    q = load_tile(q_ptr, first, num_q, stride_qt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    acc = tl.zeros((OWN, D), tl.float32)
    row_max = tl.full((OWN,), float("-inf"), tl.float32)
    row_sum = tl.zeros((OWN,), tl.float32)
    acc, row_max, row_sum = attend(
        acc,
        row_max,
        row_sum,
        q,
        k_ptr,
        v_ptr,
        num_k,
        stride_kt,
        stride_vt,
        scale,
        STREAMED,
        HEAD_DIM,
        PRECISION,
    )
    out, lse = finish(acc, row_max, row_sum)
    store_queries(out_ptr, lse_ptr, out, lse, begin_q, first, num_q, head, num_heads, HEAD_DIM)


@triton.jit(do_not_specialize=["num_queries"])
def varlen_key_grads_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr, cu_seqlens_q_ptr,
    cu_seqlens_k_ptr, num_queries, scale, num_heads,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    cell, first, head = program_tile(tiles_ptr, num_heads)
    if cell < 0:
        return
    begin_q, num_q = cell_range(cu_seqlens_q_ptr, cell)
    begin_k, num_k = cell_range(cu_seqlens_k_ptr, cell)
    k_ptr += begin_k * stride_kt + head * stride_kh
    v_ptr += begin_k * stride_vt + head * stride_vh
    k = load_tile(k_ptr, first, num_k, stride_kt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    v = load_tile(v_ptr, first, num_k, stride_vt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    q_ptr += begin_q * stride_qt + head * stride_qh
    grad_out_ptr += begin_q * stride_gt + head * stride_gh
    facts = head * num_queries + begin_q
    dk, dv = key_grads(
        k, v, q_ptr, grad_out_ptr, lse_ptr + facts, delta_ptr + facts, num_q, stride_qt, stride_gt,
        scale, STREAMED, HEAD_DIM, PRECISION,
    )  # fmt: skip
    row_stride = num_heads * HEAD_DIM
    place = begin_k * row_stride + head * HEAD_DIM
    store_tile(dk_ptr + place, dk * scale, first, num_k, row_stride, HEAD_DIM)
    store_tile(dv_ptr + place, dv, first, num_k, row_stride, HEAD_DIM)


@triton.jit(do_not_specialize=["num_queries"])
def varlen_query_grad_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr, cu_seqlens_q_ptr,
    cu_seqlens_k_ptr, num_queries, scale, num_heads,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    cell, first, head = program_tile(tiles_ptr, num_heads)
    if cell < 0:
        return
    begin_q, num_q = cell_range(cu_seqlens_q_ptr, cell)
    begin_k, num_k = cell_range(cu_seqlens_k_ptr, cell)
    q_ptr += begin_q * stride_qt + head * stride_qh
    grad_out_ptr += begin_q * stride_gt + head * stride_gh
    q = load_tile(q_ptr, first, num_q, stride_qt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    grad_out = load_tile(grad_out_ptr, first, num_q, stride_gt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    facts = head * num_queries + begin_q
    lse = load_row_facts(lse_ptr + facts, first, num_q, float("inf"), OWN, True)
    delta = load_row_facts(delta_ptr + facts, first, num_q, 0.0, OWN, True)
    k_ptr += begin_k * stride_kt + head * stride_kh
    v_ptr += begin_k * stride_vt + head * stride_vh
    dq = query_grad(
        tl.zeros((OWN, D), tl.float32), q, grad_out, lse, delta, k_ptr, v_ptr, num_k, stride_kt, stride_vt,
        scale, STREAMED, HEAD_DIM, PRECISION,
    )  # fmt: skip
    row_stride = num_heads * HEAD_DIM
    store_tile(
        dq_ptr + begin_q * row_stride + head * HEAD_DIM, dq * scale, first, num_q, row_stride, HEAD_DIM
    )


def aot_targets() -> list[Target]:
    """float16 compiles as bfloat16 does; full float32 has no matrix instructions to look for."""
    return [
        *row_facts.aot_targets(),
        *_targets(64, (80, 90, 100)),
        *(found for dim in (128, 256) for found in _targets(dim, (80, 86, 90, 100), rare=True)),
        *_targets(64, (86,), rare=True),
    ]


def _targets(head_dim: int, architectures: tuple[int, ...], *, rare: bool = False) -> list[Target]:
    return [
        target(
            f"varlen_{name}", kernel, chosen(arch, head_dim, 16), torch.bfloat16, head_dim, arch, rare=rare
        )
        for arch in architectures
        for name, kernel, chosen in (
            ("forward", varlen_forward_kernel, forward_tiles),
            ("key_grads", varlen_key_grads_kernel, key_grads_tiles),
            ("query_grad", varlen_query_grad_kernel, query_grad_tiles),
        )
    ]
