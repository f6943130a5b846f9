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
from .graph_blocks import TILE, BlockPlan, TileLists, block_plan, num_tile_parts
from .launch import Options, as_stored, launch, new_output, type_name
from .packed_tiles import constants, positive_scale, rows_contiguous, store_queries, strides
from .softmax_tiles import LOG2_E, finish, load_row_facts, load_tile, probabilities, store_tile

__all__ = ["backward", "block_plan", "forward"]

BLOCK = tl.constexpr(TILE)


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
    _launch(graph_forward_kernel, q, plan.keys, (q, k, v, out, lse), rest, _sizes(q)[0])
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
    _, query_grad_sizes, key_grads_sizes = _sizes(q)
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


# (largest head_dim, forward, gradient of queries, gradients of keys and values); own and streamed divide 64.
_Row = tuple[int, Tiles, Tiles, Tiles]


def _tiles(own: int, streamed: int, num_warps: int, num_stages: int) -> Tiles:
    return Tiles(own, streamed, Options(num_warps, num_stages))


_HALF_PRECISION: list[_Row] = [
    (64, _tiles(64, 64, 4, 3), _tiles(64, 64, 4, 3), _tiles(64, 32, 4, 3)),
    (128, _tiles(64, 32, 8, 2), _tiles(64, 32, 8, 2), _tiles(64, 32, 8, 2)),
    (256, _tiles(64, 32, 8, 2), _tiles(32, 32, 8, 1), _tiles(32, 32, 8, 1)),
]
_FULL_PRECISION: list[_Row] = [
    (64, _tiles(32, 32, 4, 1), _tiles(32, 16, 4, 1), _tiles(32, 16, 4, 1)),
    (256, _tiles(16, 16, 4, 1), _tiles(16, 16, 4, 1), _tiles(16, 16, 4, 1)),
]


def _sizes(q: Tensor) -> tuple[Tiles, Tiles, Tiles]:
    rows = _FULL_PRECISION if q.element_size() == 4 else _HALF_PRECISION
    return next(row for row in rows if q.shape[2] <= row[0])[1:]


# ---- what a program has and streams -----------------------------------------------------------------------------


@triton.jit
def _program_tile(tiles_ptr, num_heads, OWN: tl.constexpr):
    """(first token, 64 bits; number of tokens; the part's first token in the tile; head; block ranges).

    Blocks first_block..masked_from hold whole words only, masked_from..end the rest.
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    part = tl.program_id(0) // num_heads
    tile_ptr = tiles_ptr + part // (BLOCK // OWN) * 5
    first_block = tl.load(tile_ptr + 2)
    masked_from = first_block + tl.load(tile_ptr + 3)
    end = first_block + tl.load(tile_ptr + 4)
    offset = part % (BLOCK // OWN) * OWN
    return (
        tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1), offset, head, first_block, masked_from, end,
    )  # fmt: skip


@triton.jit
def _gather(ptr, entries, stride, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """(N, D): the rows of the listed tokens; zeros beyond HEAD_DIM."""
    dims = tl.arange(0, D)
    ptrs = ptr + entries.to(tl.int64)[:, None] * stride + dims[None, :]
    if HEAD_DIM < D:
        return tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _is_pair(words, own):
    """(M, N) or (N, M), as the words and the tile's tokens are laid out: whether the bit is set."""
    return ((words >> own) & 1) != 0


# ---- forward ----------------------------------------------------------------------------------------------------


@triton.jit
def _attend_listed(
    acc, row_max, row_sum, q, k_ptr, v_ptr, entries_ptr, words_ptr, start, own, stride_k, stride_v, scale,
    STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    entries = tl.load(entries_ptr + start + tl.arange(0, STREAMED))
    k = _gather(k_ptr, entries, stride_k, HEAD_DIM, q.shape[1]).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        words = tl.load(words_ptr + start + tl.arange(0, STREAMED))
        scores = tl.where(_is_pair(words[None, :], own[:, None]), scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = new_max * (scale * LOG2_E)
    if MASKED:  # a token may have seen nothing yet
        shift = tl.where(new_max == float("-inf"), 0.0, shift)
    p = tl.exp2(scores * (scale * LOG2_E) - shift[:, None])
    shrink = tl.exp2(row_max * (scale * LOG2_E) - shift)
    v = _gather(v_ptr, entries, stride_v, HEAD_DIM, q.shape[1]).to(q.dtype)
    acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit
def graph_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, entries_ptr, words_ptr, scale, num_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    begin, num_own, first, head, first_block, masked_from, end = _program_tile(tiles_ptr, num_heads, OWN)
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
    out, lse = finish(acc, row_max, row_sum, scale)
    store_queries(out_ptr, lse_ptr, out, lse, begin, first, num_own, head, num_heads, HEAD_DIM)


# ---- backward ---------------------------------------------------------------------------------------------------


@triton.jit
def _query_grad_listed(
    dq, q, grad_out, lse, delta, k_ptr, v_ptr, entries_ptr, words_ptr, start, own, stride_k, stride_v, scale,
    STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    entries = tl.load(entries_ptr + start + tl.arange(0, STREAMED))
    k = _gather(k_ptr, entries, stride_k, HEAD_DIM, q.shape[1]).to(q.dtype)
    v = _gather(v_ptr, entries, stride_v, HEAD_DIM, q.shape[1]).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = probabilities(scores, lse[:, None], scale, q.dtype == tl.float32)
    if MASKED:
        words = tl.load(words_ptr + start + tl.arange(0, STREAMED))
        p = tl.where(_is_pair(words[None, :], own[:, None]), p, 0.0)
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
    begin, num_own, first, head, first_block, masked_from, end = _program_tile(tiles_ptr, num_heads, OWN)
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
    q = _gather(q_ptr, entries, stride_q, HEAD_DIM, k.shape[1]).to(k.dtype)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = probabilities(scores, tl.load(lse_ptr + entries)[None, :], scale, k.dtype == tl.float32)
    if MASKED:
        words = tl.load(words_ptr + start + tl.arange(0, STREAMED))
        p = tl.where(_is_pair(words[None, :], own[:, None]), p, 0.0)
    grad_out = _gather(grad_out_ptr, entries, stride_g, HEAD_DIM, k.shape[1]).to(k.dtype)
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
    begin, num_own, first, head, first_block, masked_from, end = _program_tile(tiles_ptr, num_heads, OWN)
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


# ---- ahead of time ----------------------------------------------------------------------------------------------


def aot_targets() -> list[Target]:
    """float16 compiles as bfloat16 does; full float32 has no matrix instructions to look for."""
    kernels = (graph_forward_kernel, graph_query_grad_kernel, graph_key_grads_kernel)
    return [
        _target(kernel, head_dim, sizes, architectures)
        for head_dim, architectures in ((64, (80, 86, 90, 100)), (128, (86, 90, 100)), (256, (86, 90, 100)))
        for kernel, sizes in zip(
            kernels, next(r for r in _HALF_PRECISION if head_dim <= r[0])[1:], strict=True
        )
    ]


_TYPES = dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32:16")
_TYPES |= dict.fromkeys(("tiles_ptr", "entries_ptr"), "*i32:16")
_TYPES |= {"words_ptr": "*i64:16", "scale": "fp32", "num_heads": "i32", "num_tokens": "i32"}


def _target(
    kernel: Callable[..., object], head_dim: int, sizes: Tiles, architectures: tuple[int, ...]
) -> Target:
    held = constants(torch.bfloat16, head_dim, sizes)
    names = [n for n in kernel.arg_names if n not in held]  # type: ignore[attr-defined]
    storage = f"*{type_name(torch.bfloat16)}:16"
    return Target(
        name=f"{kernel.__name__.removesuffix('_kernel')} D={head_dim} bf16 {sizes}",
        kernel=kernel,
        signature={n: _TYPES.get(n, storage if n.endswith("_ptr") else "i32:16") for n in names},
        constants=held,
        options=sizes.options,
        architectures=architectures,
    )
