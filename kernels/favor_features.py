"""Random features of a tile of tokens: the projection in two halves, exponents, and the largest of a row.

In the 16-bit types the projection is two numbers of that type, high and rest: as one, its rounding times the length of
a query would be the largest error of all exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_configs import Tiles
from .launch import block_dim, dot_dtype, dot_precision
from .softmax_tiles import load_tile

_HALVES = "_scfm_halves"
_NO_FEATURE = tl.constexpr(2**30)


@dataclass(frozen=True)
class Features:
    """The projection (F, D) as it is multiplied with, contiguous; ``rest`` counts only where it is split."""

    high: Tensor
    rest: Tensor
    split: bool

    @property
    def count(self) -> int:
        return len(self.high)


def split_projection(projection: Tensor, dtype: torch.dtype) -> Features:
    """The halves of a contiguous float32 projection for tensors of ``dtype``; kept on it until it is changed.

    Not kept where that cannot be told (tensors of inference mode) or would hold memory of a CUDA graph's capture.
    """
    if dot_dtype(dtype) == tl.float32:
        return Features(projection, projection, False)
    if projection.is_inference() or (projection.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _split(projection, dtype)
    key = projection._version, dtype
    kept: tuple[object, Features] | None = projection.__dict__.get(_HALVES)
    if kept is None or kept[0] != key:
        kept = key, _split(projection, dtype)
        if projection.is_cuda:  # once a model: from now on any stream may read them
            torch.cuda.current_stream(projection.device).synchronize()
        setattr(projection, _HALVES, kept)
    return kept[1]


def _split(projection: Tensor, dtype: torch.dtype) -> Features:
    high = projection.to(dtype)
    return Features(high, (projection - high.float()).to(dtype), True)


def constants(dtype: torch.dtype, head_dim: int, sizes: Tiles) -> dict[str, object]:
    """The kernels' constexpr parameters; not to be changed."""
    return _constants(dtype, head_dim, sizes, dot_precision(dtype))


@cache
def _constants(dtype: torch.dtype, head_dim: int, sizes: Tiles, precision: str) -> dict[str, object]:
    dot = dot_dtype(dtype)
    return {
        "HEAD_DIM": head_dim,
        "D": block_dim(head_dim),
        "OWN": sizes.own,
        "STREAMED": sizes.streamed,
        "DOT_DTYPE": dot,
        "PRECISION": precision,
        "SPLIT": dot != tl.float32,
    }


# ---- of a tile --------------------------------------------------------------------------------------------------


@triton.jit
def half_norms(x, scale):
    """n = |c x|^2 / 2 of every row, c = ``scale``."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1) * (scale * scale * 0.5)


@triton.jit
def load_features(w_ptr, rest_ptr, first, last, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
                  DOT_DTYPE: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """(BLOCK, D) of the projection from feature ``first`` on: high and, where it is split, rest."""
    w = load_tile(w_ptr, first, last, HEAD_DIM, BLOCK, HEAD_DIM, D, MASKED).to(DOT_DTYPE)
    rest = w
    if SPLIT:
        rest = load_tile(rest_ptr, first, last, HEAD_DIM, BLOCK, HEAD_DIM, D, MASKED).to(DOT_DTYPE)
    return w, rest


@triton.jit
def features_by_tokens(w, rest, x, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    if SPLIT:
        small = tl.dot(rest, tl.trans(x), input_precision=PRECISION)
        return tl.dot(w, tl.trans(x), small, input_precision=PRECISION)
    return tl.dot(w, tl.trans(x), input_precision=PRECISION)


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
