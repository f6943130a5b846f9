"""Sparse gene attention on a GPU: softmax attention of tiles of 64 tokens with the tokens that they see, gathered.

A program holds a tile of queries (for the gradients of keys and values, of keys) of one head and streams the rows of
its list (see graph_blocks.py), 64 at most at a time: first those that all of the tile sees, without any mask, then
the rest, whose pairs are a bit each. Scores are made, used and forgotten; the backward makes them again from the
log-sum-exp. Every sum has one owner and one order: no atomics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import row_facts
from .aot import Target
from .attention_configs import Tiles
from .graph_blocks import BlockPlan, TileLists, block_plan, num_tile_parts
from .graph_grads import graph_key_grads_kernel, graph_query_grad_kernel
from .graph_tiles import BLOCK, HALF_PRECISION, gather, is_pair, program_tile, sizes_for
from .launch import as_stored, launch, new_output
from .packed_tiles import constants, positive_scale, rows_contiguous, store_queries, strides, target
from .softmax_tiles import LOG2_E, finish, load_tile

__all__ = ["backward", "block_plan", "forward"]


def forward(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in q's dtype and the natural log-sum-exp (T, H) float32; zeros, -infinity where nothing is seen.

    q, k, v: (T, H, D), float32, bfloat16 or float16, any strides; plan: ``block_plan`` of the same tokens.
    """
    if scale <= 0:
        q, _, scale = positive_scale(q, scale)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    num_tokens, num_heads, _ = q.shape
    out = new_output(q)
    lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32)
    rest = (scale, num_heads, *strides(q, k, v))
    _launch(graph_forward_kernel, q, plan.keys, (q, k, v, out, lse), rest, sizes_for(q)[0])
    return as_stored(out, q), lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the shapes and dtypes of q, k, v; out and lse are the forward's."""
    if scale <= 0:
        q, sign, scale = positive_scale(q, scale)
        dq, dk, dv = backward(grad_out, q, k, v, out, lse, plan, scale)
        return sign * dq, dk, dv
    grad_out, q, k, v = (rows_contiguous(x) for x in (grad_out, q, k, v))
    dq, dk, dv = (new_output(x) for x in (q, k, v))
    lse, delta = row_facts.backward_rows(out, grad_out, lse)
    common = (grad_out, q, k, v, lse, delta)
    rest = (len(q), scale, q.shape[1], *strides(grad_out, q, k, v))
    _, query_grad_sizes, key_grads_sizes = sizes_for(q)
    _launch(graph_key_grads_kernel, q, plan.queries, (*common, dk, dv), rest, key_grads_sizes)
    _launch(graph_query_grad_kernel, q, plan.keys, (*common, dq), rest, query_grad_sizes)
    return as_stored(dq, q), as_stored(dk, k), as_stored(dv, v)


def _launch(
    kernel: Callable[..., object],
    q: Tensor,
    lists: TileLists,
    tensors: tuple[Tensor, ...],
    rest: tuple[object, ...],
    sizes: Tiles,
) -> None:
    grid = (len(lists.tiles) * num_tile_parts(sizes.own) * q.shape[1],)
    arguments = (*tensors, lists.tiles, lists.entries, lists.words, *rest)
    launch(kernel, grid, arguments, constants(q.dtype, q.shape[2], sizes), sizes.options)


@triton.jit
def _attend_listed(
    acc, row_max, row_sum, q, k_ptr, v_ptr, entries_ptr, words_ptr, start, own, stride_k, stride_v, scale,
    STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    entries = tl.load(entries_ptr + start + tl.arange(0, STREAMED))
    k = gather(k_ptr, entries, stride_k, HEAD_DIM, q.shape[1]).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        words = tl.load(words_ptr + start + tl.arange(0, STREAMED))
        scores = tl.where(is_pair(words[None, :], own[:, None]), scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * (scale * LOG2_E))
    shift = new_max
    if MASKED:  # a token may have seen nothing yet
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores * (scale * LOG2_E) - shift[:, None])
    shrink = tl.exp2(row_max - shift)
    v = gather(v_ptr, entries, stride_v, HEAD_DIM, q.shape[1]).to(q.dtype)
    acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit
def graph_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, entries_ptr, words_ptr, scale, num_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    begin, num_own, first, head, first_block, masked_from, end = program_tile(tiles_ptr, num_heads, OWN)
    if first >= num_own:
        return
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    q = load_tile(
        q_ptr + begin * stride_qt + head * stride_qh, first, num_own, stride_qt, OWN, HEAD_DIM, D, True
    ).to(DOT_DTYPE)
    own = (first + tl.arange(0, OWN)).to(tl.int64)
    acc = tl.zeros((OWN, D), tl.float32)
    row_max = tl.full((OWN,), float("-inf"), tl.float32)
    row_sum = tl.zeros((OWN,), tl.float32)
    for start in range(first_block * BLOCK, masked_from * BLOCK, STREAMED):
        acc, row_max, row_sum = _attend_listed(
            acc, row_max, row_sum, q, k_ptr, v_ptr, entries_ptr, words_ptr, start, own, stride_kt, stride_vt,
            scale, STREAMED, HEAD_DIM, PRECISION, False,
        )  # fmt: skip
    for start in range(masked_from * BLOCK, end * BLOCK, STREAMED):
        acc, row_max, row_sum = _attend_listed(
            acc, row_max, row_sum, q, k_ptr, v_ptr, entries_ptr, words_ptr, start, own, stride_kt, stride_vt,
            scale, STREAMED, HEAD_DIM, PRECISION, True,
        )  # fmt: skip
    out, lse = finish(acc, row_max, row_sum)
    store_queries(out_ptr, lse_ptr, out, lse, begin, first, num_own, head, num_heads, HEAD_DIM)


# ---- ahead of time ----------------------------------------------------------------------------------------------


def aot_targets() -> list[Target]:
    """float16 compiles as bfloat16 does; full float32 has no matrix instructions to look for."""
    kernels = (graph_forward_kernel, graph_query_grad_kernel, graph_key_grads_kernel)
    return [
        target(
            kernel.__name__.removesuffix("_kernel"),
            kernel,
            sizes,
            torch.bfloat16,
            head_dim,
            arch,
            rare=rare,
            may_spill=arch == 86,
        )
        for head_dim, architectures, rare in (
            (64, (80, 90, 100), False),
            (64, (86,), True),
            (128, (80, 86, 90, 100), True),
            (256, (80, 86, 90, 100), True),
        )
        for arch in architectures
        for kernel, sizes in zip(
            kernels, next(r for r in HALF_PRECISION if head_dim <= r[0])[1:], strict=True
        )
    ]
