"""What the attention kernels over packed cells share: which tile a program has, what a launch passes, types for
compiling ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Target
from .attention_configs import Tiles
from .launch import block_dim, dot_dtype, dot_precision, type_name
from .softmax_tiles import store_tile


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, int, float]:
    """(sign * q, sign, a scale above 0) with the same scores: the kernels take row maxima before they scale."""
    sign = -1 if scale < 0 else 0
    return sign * q, sign, -scale or 1.0


def rows_contiguous(x: Tensor) -> Tensor:
    """What the kernels can read: neighbouring dimensions of a head side by side, tokens and heads anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Token and head stride of each."""
    return [x.stride(dim) for x in tensors for dim in (0, 1)]


def constants(dtype: torch.dtype, head_dim: int, sizes: Tiles) -> dict[str, object]:
    """The kernels' constexpr parameters; not to be changed."""
    return _constants(dtype, head_dim, sizes, dot_precision(dtype))


@cache
def _constants(dtype: torch.dtype, head_dim: int, sizes: Tiles, precision: str) -> dict[str, object]:
    return {
        "HEAD_DIM": head_dim,
        "D": block_dim(head_dim),
        "OWN": sizes.own,
        "STREAMED": sizes.streamed,
        "DOT_DTYPE": dot_dtype(dtype),
        "PRECISION": precision,
    }


@triton.jit
def program_tile(tiles_ptr, num_heads):
    """(cell, first token, head) of this program; the heads of a tile are neighbours."""
    tile = tl.program_id(0) // num_heads
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    return tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1), head


@triton.jit
def cell_range(cu_seqlens_ptr, cell):
    """(first token of the cell, 64 bits; number of its tokens)."""
    begin = tl.load(cu_seqlens_ptr + cell)
    return begin.to(tl.int64), tl.load(cu_seqlens_ptr + cell + 1) - begin


@triton.jit
def store_queries(out_ptr, lse_ptr, out, lse, begin, first, last, head, num_heads, HEAD_DIM: tl.constexpr):
    """A tile of a contiguous (T, H, D) output and its log-sum-exp, (T, H), in natural units."""
    row_stride = num_heads * HEAD_DIM
    store_tile(out_ptr + begin * row_stride + head * HEAD_DIM, out, first, last, row_stride, HEAD_DIM)
    rows = first + tl.arange(0, out.shape[0])
    tl.store(lse_ptr + (begin + rows) * num_heads + head, lse, mask=rows < last)


def target(
    name: str,
    kernel: Callable[..., object],
    sizes: Tiles,
    dtype: torch.dtype,
    head_dim: int,
    architecture: int,
    *,
    rare: bool = False,
    may_spill: bool = False,
) -> Target:
    """An attention kernel as it is launched on packed, aligned tensors; parameter names tell the types."""
    held = constants(dtype, head_dim, sizes)
    names = [n for n in kernel.arg_names if n not in held]  # type: ignore[attr-defined]
    storage = type_name(dtype)
    return Target(
        name=f"{name} D={head_dim} {storage} {sizes}",
        kernel=kernel,
        signature={n: _TYPES.get(n, f"*{storage}:16" if n.endswith("_ptr") else "i32:16") for n in names},
        constants=held,
        options=sizes.options,
        multiplies=dtype != torch.float32,
        architectures=(architecture,),
        rare=rare,
        may_spill=may_spill,
    )


_TYPES = {
    **dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32:16"),
    **dict.fromkeys(
        (
            "tiles_ptr",
            "cu_seqlens_ptr",
            "cu_seqlens_q_ptr",
            "cu_seqlens_k_ptr",
            "num_known_ptr",
            "entries_ptr",
        ),
        "*i32:16",
    ),
    **dict.fromkeys(("num_heads", "num_queries", "num_tokens"), "i32"),
    "words_ptr": "*i64:16",
    "scale": "fp32",
}
