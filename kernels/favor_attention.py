"""FAVOR+ attention on a GPU, forward and backward, every feature map made when it is needed instead of kept.

Forward: what a cell's keys come to (favor_context.py), then its queries against that (favor_mix.py). Backward: the
same for the queries' gradient (favor_query_grad.py), whose facts give what the cell's queries come to; from that the
keys' gradients (favor_key_grads.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import favor_context, favor_key_grads, favor_merges, favor_partials, favor_query_grad
from .aot import Target
from .attention_configs import Tiles
from .favor_configs import HALF_PRECISION, tiles_for
from .favor_context import summarize_keys, summarize_queries
from .favor_features import constants, split_projection
from .favor_key_grads import key_grads
from .favor_mix import mix, query_inputs, query_numbers
from .favor_query_grad import query_grad
from .launch import Options, as_stored, block_dim, launch, new_output, type_name
from .packed_tiles import cell_range, program_tile, rows_contiguous, strides
from .softmax_tiles import load_tile, store_tile
from .tiles import tile_list


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
    sizes, features = tiles_for(q), split_projection(projection, q.dtype)
    keys, used = summarize_keys(k, v, features, cu_seqlens, key_max, eps, sizes.keys)
    out = new_output(q)
    tiles = tile_list(cu_seqlens, len(q), sizes.queries.own)
    launch(
        favor_forward_kernel,
        (len(tiles) * q.shape[1],),
        (q, out, *query_inputs(features, keys), tiles, cu_seqlens, *query_numbers(q, keys, eps), *strides(q)),
        constants(q.dtype, q.shape[2], sizes.queries),
        sizes.queries.options,
    )
    return as_stored(out, q), used.clone() if key_max is not None else used


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
    sizes, features = tiles_for(q), split_projection(projection, q.dtype)
    keys, _ = summarize_keys(k, v, features, cu_seqlens, key_max, eps, sizes.keys)
    dq = new_output(q)
    facts = query_grad(grad_out, q, dq, features, keys, cu_seqlens, eps)
    queries = summarize_queries(grad_out, q, features, facts, keys.scale, cu_seqlens, eps, sizes.queries_grad)
    dk, dv = new_output(k), new_output(v)
    max_grad = key_grads(k, v, dk, dv, features, projection, queries, cu_seqlens, key_max, given, eps)
    return as_stored(dq, q), as_stored(dk, k), as_stored(dv, v), max_grad


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


# ---- ahead of time ----------------------------------------------------------------------------------------------


def aot_targets() -> list[Target]:
    """float16 compiles as bfloat16 does; full float32 has no matrix instructions to look for."""
    return [
        *_targets(64, (80, 90, 100)),
        *_targets(64, (86,), rare=True),
        *(target for head_dim in (128, 256) for target in _targets(head_dim, (80, 90, 100), rare=True)),
    ]


def _targets(head_dim: int, architectures: tuple[int, ...], *, rare: bool = False) -> list[Target]:
    """scBERT's 266 features."""
    sizes = next(sizes for largest, sizes in HALF_PRECISION.items() if head_dim <= largest)
    plain = {"HEAD_DIM": head_dim, "D": block_dim(head_dim)}
    merged = favor_merges.merge_constants(266, head_dim, sizes.keys.own, favor_context.CHUNK)
    tiled = (
        (favor_partials.favor_keys_kernel, sizes.keys),
        (favor_forward_kernel, sizes.queries),
        (favor_query_grad.favor_query_grad_kernel, sizes.query_grad),
        (favor_partials.favor_queries_kernel, sizes.queries_grad),
        (favor_key_grads.favor_key_grads_kernel, sizes.key_grads),
    )
    others = (
        (
            favor_partials.favor_norms_kernel,
            plain | {"ROWS": favor_context.ROWS},
            favor_partials.NORMS_OPTIONS,
        ),
        (favor_merges.favor_merge_keys_kernel, merged, favor_merges.MERGE_OPTIONS),
        (favor_merges.favor_merge_queries_kernel, merged, favor_merges.MERGE_OPTIONS),
        (
            favor_key_grads.favor_key_max_kernel,
            plain | {"OWN": sizes.key_grads.own},
            favor_key_grads.MAX_OPTIONS,
        ),
    )
    return [
        *(target(kernel, tiles, head_dim, architectures, rare) for kernel, tiles in tiled),
        *(_plain_target(*other, head_dim, architectures, rare) for other in others),
    ]


_TYPES = dict.fromkeys(("tiles_ptr", "cu_seqlens_ptr", "tokens_ptr", "features_ptr"), "*i32:16")
_TYPES |= dict.fromkeys(("scale", "eps"), "fp32")
_TYPES |= dict.fromkeys(("num_heads", "num_features", "num_blocks", "num_tokens"), "i32")
_STORED = ("q_ptr", "k_ptr", "v_ptr", "grad_out_ptr", "w_ptr", "rest_ptr", "matrix_ptr", "d_matrix_ptr")
_TYPES |= dict.fromkeys((*_STORED, "out_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), "*bf16:16")


def target(
    kernel: Callable[..., object], sizes: Tiles, head_dim: int, architectures: tuple[int, ...], rare: bool
) -> Target:
    held = constants(torch.bfloat16, head_dim, sizes)
    return _plain_target(kernel, held, sizes.options, head_dim, architectures, rare, f" {sizes}")


def _plain_target(
    kernel: Callable[..., object],
    held: dict[str, object],
    options: Options,
    head_dim: int,
    architectures: tuple[int, ...],
    rare: bool,
    tiles: str = "",
) -> Target:
    parameters = kernel.arg_names  # type: ignore[attr-defined]
    extra = {"CHUNK": favor_context.CHUNK, "GIVEN": False, "TRACK": True}
    held = held | {name: value for name, value in extra.items() if name in parameters}
    types = {n: _TYPES.get(n, "*fp32:16" if n.endswith("_ptr") else "i32:16") for n in parameters}
    return Target(
        name=f"{kernel.__name__.removesuffix('_kernel')} D={head_dim} {type_name(torch.bfloat16)}{tiles}",
        kernel=kernel,
        signature={n: kind for n, kind in types.items() if n not in held},
        constants=held,
        options=options,
        multiplies=bool(tiles),
        architectures=architectures,
        rare=rare,
        may_spill=rare,
    )
