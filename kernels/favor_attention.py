"""FAVOR+ attention on a GPU: queries against what was kept of their cell's keys (see favor_context.py).

    out_i = (q'_i . context) / (q'_i . total),   q'_if = exp(a_if - n_i - max_f a_if) + eps

is softmax attention with features in the place of keys, but for eps, whose share is the same for all queries of
a head: out_i = (exp(-n_i) A_i + eps sum_f context_f) / (exp(-n_i) l_i + eps sum_f total_f), where A_i and l_i are
the online softmax's sums. So features stream past a tile of queries once and feature maps never lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import favor_context as context
from .aot import Target
from .attention_configs import Tiles
from .favor_context import Features, Summary, half_norms, load_features
from .launch import Options, as_stored, launch, new_output, type_name
from .packed_tiles import cell_range, program_tile, rows_contiguous, strides
from .softmax_tiles import LOG2_E, load_row_facts, load_tile, store_tile
from .tiles import tile_list

_NO_FEATURE = tl.constexpr(2**30)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_max: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in q's dtype, and the maximum (C,) float32 that each cell's keys were taken relative to.

    q, k, v: (T, H, D), float32, bfloat16 or float16, any strides; projection: (F, D) float32, contiguous; cu_seqlens:
    int32 (C + 1,); key_max: the maxima to use, or None for each cell's own, -infinity where it is empty.
    """
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    sizes, features = tiles_for(q), context.split_projection(projection, q.dtype)
    keys, used = context.summarize_keys(k, v, features, cu_seqlens, key_max, eps, sizes.keys)
    out = new_output(q)
    tiles = tile_list(cu_seqlens, len(q), sizes.queries.own)
    launch(
        favor_forward_kernel,
        (len(tiles) * q.shape[1],),
        (q, out, *query_inputs(features, keys), tiles, cu_seqlens, *query_numbers(q, keys, eps), *strides(q)),
        context.constants(q.dtype, q.shape[2], sizes.queries),
        sizes.queries.options,
    )
    return as_stored(out, q), used.clone() if key_max is not None else used


def query_inputs(features: Features, keys: Summary) -> tuple[Tensor, ...]:
    return features.high, features.rest, keys.matrix, keys.totals, keys.columns, keys.scale


def query_numbers(q: Tensor, keys: Summary, eps: float) -> tuple[float, ...]:
    return q.shape[2] ** -0.25, eps, q.shape[1], keys.totals.shape[2], keys.columns.shape[2]


@dataclass(frozen=True)
class Sizes:
    """keys and queries_grad hold features and stream tokens; the others hold tokens and stream features."""

    keys: Tiles
    queries: Tiles
    query_grad: Tiles
    queries_grad: Tiles
    key_grads: Tiles


def _sizes(*rows: tuple[int, int, int, int]) -> Sizes:
    return Sizes(*(Tiles(own, streamed, Options(warps, stages)) for own, streamed, warps, stages in rows))


_HALF_PRECISION = {
    64: _sizes((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    128: _sizes((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1), (64, 32, 8, 2), (32, 32, 4, 1)),
    256: _sizes((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
}
_FULL_PRECISION = {
    64: _sizes((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
    256: _sizes(*5 * [(16, 16, 4, 1)]),
}


def tiles_for(q: Tensor) -> Sizes:
    table = _FULL_PRECISION if q.element_size() == 4 else _HALF_PRECISION
    return next(sizes for head_dim, sizes in table.items() if q.shape[2] <= head_dim)


# ---- queries against the context --------------------------------------------------------------------------------


@triton.jit
def tokens_by_features(x, w, rest, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    if SPLIT:
        small = tl.dot(x, tl.trans(rest), input_precision=PRECISION)
        return tl.dot(x, tl.trans(w), small, input_precision=PRECISION)
    return tl.dot(x, tl.trans(w), input_precision=PRECISION)


@triton.jit
def rising_maximum(a, top, which, first, TRACK: tl.constexpr):
    """(the maxima of a row so far, the feature each is at, of equals the lowest; only where TRACK)."""
    tile_top = tl.max(a, 1)
    if TRACK:
        features = first + tl.arange(0, a.shape[1])
        here = tl.min(tl.where(a == tile_top[:, None], features[None, :], _NO_FEATURE), 1)
        which = tl.where(tile_top > top, here, which)
    return tl.maximum(top, tile_top), which


@triton.jit
def _mix_block(
    acc, top, total, which, q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, first, num_features, scale,
    STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    TRACK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    w, rest = load_features(
        w_ptr, rest_ptr, first, num_features, STREAMED, HEAD_DIM, q.shape[1], q.dtype, SPLIT, MASKED
    )
    a = tokens_by_features(q, w, rest, PRECISION, SPLIT)
    if MASKED:
        a = tl.where((tl.arange(0, STREAMED) < num_features - first)[None, :], a, float("-inf"))
    new_top, which = rising_maximum(a, top, which, first, TRACK)
    p = tl.exp2((a - new_top[:, None]) * (scale * LOG2_E)).to(q.dtype)
    shrink = tl.exp2((top - new_top) * (scale * LOG2_E))
    matrix = load_tile(matrix_ptr, first, num_features, HEAD_DIM, STREAMED, HEAD_DIM, q.shape[1], MASKED)
    totals = load_row_facts(totals_ptr, first, num_features, 0.0, STREAMED, MASKED)
    acc = tl.dot(p, matrix.to(q.dtype), acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total * shrink + tl.sum(p.to(tl.float32) * totals[None, :], 1), which


@triton.jit
def mix(
    q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, columns_ptr, scale_ptr, place, scale, eps, num_features,
    num_blocks, STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    TRACK: tl.constexpr,
):  # fmt: skip
    """(out, norm, max a, its feature, n) of the queries ``q`` (M, D); ``place`` is that of the cell and head."""
    D: tl.constexpr = q.shape[1]
    acc = tl.zeros(q.shape, tl.float32)
    top = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    which = tl.zeros((q.shape[0],), tl.int32)
    matrix_ptr += place * num_features * HEAD_DIM
    totals_ptr += place * num_features
    whole = num_features // STREAMED * STREAMED
    for first in range(0, whole, STREAMED):
        acc, top, total, which = _mix_block(
            acc, top, total, which, q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, first, num_features, scale,
            STREAMED, HEAD_DIM, PRECISION, SPLIT, TRACK, False,
        )  # fmt: skip
    if whole < num_features:
        acc, top, total, which = _mix_block(
            acc, top, total, which, q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, whole, num_features, scale,
            STREAMED, HEAD_DIM, PRECISION, SPLIT, TRACK, True,
        )  # fmt: skip
    columns = load_columns(columns_ptr, place, num_blocks, HEAD_DIM, D)
    norms = half_norms(q, scale)
    share = tl.exp2(-norms * LOG2_E)
    norm = share * total + eps * tl.load(scale_ptr + 2 * place + 1)
    out = (share[:, None] * acc + eps * columns[None, :]) / norm[:, None]
    return out, norm, top, which, norms


@triton.jit
def load_columns(columns_ptr, place, num_blocks, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """(D,): the sum of a summary's matrix over all features, from those of its blocks."""
    dims = tl.arange(0, D)
    columns = tl.zeros((D,), tl.float32)
    for block in range(num_blocks):
        ptrs = columns_ptr + (place * num_blocks + block) * HEAD_DIM + dims
        columns += tl.load(ptrs, mask=dims < HEAD_DIM, other=0.0)
    return columns


@triton.jit
def favor_forward_kernel(
    q_ptr, out_ptr, w_ptr, rest_ptr, matrix_ptr, totals_ptr, columns_ptr, scale_ptr, tiles_ptr, cu_seqlens_ptr,
    scale, eps, num_heads, num_features, num_blocks, stride_qt, stride_qh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    cell, first, head = program_tile(tiles_ptr, num_heads)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    q_ptr += begin * stride_qt + head * stride_qh
    q = load_tile(q_ptr, first, length, stride_qt, OWN, HEAD_DIM, D, True).to(DOT_DTYPE)
    out, _, _, _, _ = mix(
        q, w_ptr, rest_ptr, matrix_ptr, totals_ptr, columns_ptr, scale_ptr, cell * num_heads + head, scale,
        eps, num_features, num_blocks, STREAMED, HEAD_DIM, PRECISION, SPLIT, False,
    )  # fmt: skip
    row_stride = num_heads * HEAD_DIM
    store_tile(out_ptr + begin * row_stride + head * HEAD_DIM, out, first, length, row_stride, HEAD_DIM)


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
    """See favor_backward.backward, which builds on this module."""
    from . import favor_backward

    return favor_backward.backward(grad_out, q, k, v, projection, cu_seqlens, key_max, given, eps)


# ---- ahead of time ----------------------------------------------------------------------------------------------


def aot_targets() -> list[Target]:
    """float16 compiles as bfloat16 does; full float32 has no matrix instructions to look for."""
    from . import favor_backward as back

    found = []
    for head_dim, architectures in ((64, (80, 86, 90, 100)), (128, (80, 90, 100)), (256, (80, 90, 100))):
        sizes = next(sizes for largest, sizes in _HALF_PRECISION.items() if head_dim <= largest)
        for kernel, tiles in (
            (context.favor_keys_kernel, sizes.keys),
            (favor_forward_kernel, sizes.queries),
            (back.favor_query_grad_kernel, sizes.query_grad),
            (context.favor_queries_kernel, sizes.queries_grad),
            (back.favor_key_grads_kernel, sizes.key_grads),
        ):
            found.append(target(kernel, head_dim, tiles, architectures))
        for kernel in (context.favor_merge_keys_kernel, context.favor_merge_queries_kernel):
            held = context.merge_constants(266, head_dim, sizes.keys.own)
            found.append(_plain_target(kernel, head_dim, held, context.MERGE_OPTIONS, architectures))
    return found


_TYPES = dict.fromkeys(("tiles_ptr", "cu_seqlens_ptr", "tokens_ptr", "features_ptr"), "*i32:16")
_TYPES |= dict.fromkeys(("scale", "eps"), "fp32")
_TYPES |= dict.fromkeys(("num_heads", "num_features", "num_blocks", "num_tokens"), "i32")
_STORED = ("q_ptr", "k_ptr", "v_ptr", "grad_out_ptr", "w_ptr", "rest_ptr", "matrix_ptr", "d_matrix_ptr")
_TYPES |= dict.fromkeys((*_STORED, "out_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), "*bf16:16")


def target(
    kernel: Callable[..., object], head_dim: int, sizes: Tiles, architectures: tuple[int, ...]
) -> Target:
    held = context.constants(torch.bfloat16, head_dim, sizes)
    return _plain_target(kernel, head_dim, held, sizes.options, architectures, f" {sizes}")


def _plain_target(
    kernel: Callable[..., object],
    head_dim: int,
    held: dict[str, object],
    options: Options,
    architectures: tuple[int, ...],
    tiles: str = "",
) -> Target:
    parameters = kernel.arg_names  # type: ignore[attr-defined]
    extra = {"CHUNK": context._CHUNK, "GIVEN": False, "TRACK": True}
    held = held | {name: value for name, value in extra.items() if name in parameters}
    types = {n: _TYPES.get(n, "*fp32:16" if n.endswith("_ptr") else "i32:16") for n in parameters}
    if not tiles:  # the merges read what the partial sums wrote, in float32
        types |= dict.fromkeys(("sums_ptr", "partials_ptr"), "*fp32:16")
    return Target(
        name=f"{kernel.__name__.removesuffix('_kernel')} D={head_dim} {type_name(torch.bfloat16)}{tiles}",
        kernel=kernel,
        signature={n: kind for n, kind in types.items() if n not in held},
        constants=held,
        options=options,
        multiplies=bool(tiles),
        architectures=architectures,
    )
