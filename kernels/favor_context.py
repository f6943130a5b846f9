"""What FAVOR+ attention keeps of a cell's keys and, in the backward, of its queries: one (F, D) matrix a head.

    context_f = sum_j k'_jf v_j,  total_f = sum_j k'_jf;    k'_j = exp(a_j - n_j - M) + eps
    d_context_f = sum_i q'_if / norm_i grad_out_i,  d_total_f = -sum_i q'_if / norm_i delta_i

Both are attention with features in the place of queries: a program holds a block of features and streams a chunk of
tokens; feature maps are made a tile at a time and forgotten. Keys are taken relative to each feature's own maximum,
which rises while they stream; a second kernel adds a cell's chunks in their order and brings them to the cell's M.
Chunks start at the cell's start, so nothing depends on the rest of the batch.

Both matrices are kept in the storage type for the products that follow, therefore scaled: the largest total (or a
bound of the largest gradient) is 1. In the 16-bit types the projection is two numbers of that type, high and rest: as
one, its rounding times the length of a query would be the largest error of all exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_configs import Tiles
from .launch import Options, block_dim, dot_dtype, dot_precision, launch, new_output
from .packed_tiles import cell_range, strides
from .softmax_tiles import LOG2_E, load_row_facts, load_tile
from .tiles import tile_list

_CHUNK = 1024  # tokens of a partial sum
_ROWS = 64
_HALVES = "_scfm_halves"
_LISTED = tl.constexpr(128)


@dataclass(frozen=True)
class Features:
    """The projection (F, D) as it is multiplied with, contiguous; ``rest`` counts only where it is split."""

    high: Tensor
    rest: Tensor
    split: bool

    @property
    def count(self) -> int:
        return len(self.high)


@dataclass(frozen=True)
class Summary:
    """A cell's and head's (F, D) matrix, scaled. F is cut into B blocks.

    matrix: (C, H, F, D) in the storage type; totals: (C, H, F); columns: (C, H, B, D), sums over the features of
    a block; scale: (C, H, 2) what was divided by, and of keys the sum of all (scaled) totals.
    """

    matrix: Tensor
    totals: Tensor
    columns: Tensor
    scale: Tensor


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


@cache
def merge_constants(num_features: int, head_dim: int, own: int) -> dict[str, object]:
    return {
        "HEAD_DIM": head_dim,
        "D": block_dim(head_dim),
        "F": block_dim(num_features),
        "OWN": own,
        "BLOCKS": triton.next_power_of_2(triton.cdiv(num_features, own)),
        "CHUNK": _CHUNK,
    }


@dataclass(frozen=True)
class _Partials:
    """Sums of one chunk a slot. tops: (S, H, F); totals: alike; matrix: (S, H, F, D); largest: (S, H, B)."""

    tops: Tensor
    totals: Tensor
    matrix: Tensor
    largest: Tensor


def _new_partials(x: Tensor, num_slots: int, num_features: int, num_blocks: int) -> _Partials:
    shape = (num_slots, x.shape[1], num_features)
    shapes = (shape, shape, (*shape, x.shape[2]), (*shape[:2], num_blocks))
    return _Partials(*(x.new_empty(s, dtype=torch.float32) for s in shapes))


def _new_summary(x: Tensor, num_cells: int, num_features: int, num_blocks: int) -> Summary:
    shape = (num_cells, x.shape[1])
    return Summary(
        new_output(x, (*shape, num_features, x.shape[2])),
        x.new_empty((*shape, num_features), dtype=torch.float32),
        x.new_empty((*shape, num_blocks, x.shape[2]), dtype=torch.float32),
        x.new_empty((*shape, 2), dtype=torch.float32),
    )


def summarize_keys(
    k: Tensor,
    v: Tensor,
    features: Features,
    cu_seqlens: Tensor,
    key_max: Tensor | None,
    eps: float,
    sizes: Tiles,
) -> tuple[Summary, Tensor]:
    """context and totals of every cell, and the maximum (C,) that its keys are taken relative to."""
    num_tokens, num_heads, head_dim = k.shape
    num_cells, num_blocks = cu_seqlens.numel() - 1, triton.cdiv(features.count, sizes.own)
    scale = head_dim**-0.25
    norms = k.new_empty((num_heads, num_tokens), dtype=torch.float32)
    launch(
        favor_norms_kernel,
        (triton.cdiv(num_tokens, _ROWS) * num_heads,),
        (k, norms, num_tokens, scale, num_heads, *strides(k)),
        {"HEAD_DIM": head_dim, "D": block_dim(head_dim), "ROWS": _ROWS},
        NORMS_OPTIONS,
    )
    chunks = tile_list(cu_seqlens, num_tokens, _CHUNK)
    sums = _new_partials(k, len(chunks), features.count, num_blocks)
    values = k.new_empty((len(chunks), num_heads, head_dim), dtype=torch.float32)
    numbers = (num_tokens, scale, num_heads, features.count, num_blocks)
    launch(
        favor_keys_kernel,
        (len(chunks) * num_heads * num_blocks,),
        (
            k,
            v,
            features.high,
            features.rest,
            norms,
            sums.tops,
            sums.totals,
            sums.matrix,
            values,
            sums.largest,
            chunks,
            cu_seqlens,
            *numbers,
            *strides(k, v),
        ),
        {**constants(k.dtype, head_dim, sizes), "CHUNK": _CHUNK},
        sizes.options,
    )
    given = key_max is not None
    key_max = k.new_empty(num_cells, dtype=torch.float32) if key_max is None else key_max
    summary = _new_summary(k, num_cells, features.count, num_blocks)
    launch(
        favor_merge_keys_kernel,
        (num_cells * num_heads * num_blocks,),
        (
            sums.tops,
            sums.totals,
            sums.matrix,
            values,
            sums.largest,
            key_max,
            summary.matrix,
            summary.totals,
            summary.columns,
            summary.scale,
            cu_seqlens,
            *numbers[1:],
            eps,
        ),
        {**merge_constants(features.count, head_dim, sizes.own), "GIVEN": given},
        MERGE_OPTIONS,
    )
    return summary, key_max


def summarize_queries(
    grad_out: Tensor,
    q: Tensor,
    features: Features,
    facts: tuple[Tensor, Tensor, Tensor],
    key_scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    sizes: Tiles,
) -> Summary:
    """d_context and d_totals of every cell; scale[..., 0] makes them gradients of the unscaled sums of keys.

    facts: (H, T) each, of every query: n + max a in base 2, 1 / norm and delta; key_scale: the keys' summary's.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_cells, num_blocks = cu_seqlens.numel() - 1, triton.cdiv(features.count, sizes.own)
    chunks = tile_list(cu_seqlens, num_tokens, _CHUNK)
    sums = _new_partials(q, len(chunks), features.count, num_blocks)
    numbers = (num_tokens, head_dim**-0.25, num_heads, features.count, num_blocks)
    launch(
        favor_queries_kernel,
        (len(chunks) * num_heads * num_blocks,),
        (
            q,
            grad_out,
            features.high,
            features.rest,
            *facts,
            sums.totals,
            sums.matrix,
            sums.largest,
            chunks,
            cu_seqlens,
            *numbers,
            eps,
            *strides(q, grad_out),
        ),
        {**constants(q.dtype, head_dim, sizes), "CHUNK": _CHUNK},
        sizes.options,
    )
    summary = _new_summary(q, num_cells, features.count, num_blocks)
    launch(
        favor_merge_queries_kernel,
        (num_cells * num_heads * num_blocks,),
        (
            sums.totals,
            sums.matrix,
            sums.largest,
            key_scale,
            summary.matrix,
            summary.totals,
            summary.columns,
            summary.scale,
            cu_seqlens,
            *numbers[2:],
        ),
        merge_constants(features.count, head_dim, sizes.own),
        MERGE_OPTIONS,
    )
    return summary


NORMS_OPTIONS = Options(num_warps=4, num_stages=1)
MERGE_OPTIONS = Options(num_warps=8, num_stages=1)


# ---- partial sums of a chunk ------------------------------------------------------------------------------------


@triton.jit
def half_norms(x, scale):
    """n = |c x|^2 / 2 of every row, c = ``scale``."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1) * (scale * scale * 0.5)


@triton.jit(do_not_specialize=["num_tokens"])
def favor_norms_kernel(
    k_ptr, norms_ptr, num_tokens, scale, num_heads, stride_kt, stride_kh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first = tl.program_id(0) // num_heads * ROWS
    k = load_tile(k_ptr + head * stride_kh, first, num_tokens, stride_kt, ROWS, HEAD_DIM, D, True)
    rows = first + tl.arange(0, ROWS)
    tl.store(norms_ptr + head * num_tokens + rows, half_norms(k, scale), mask=rows < num_tokens)


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
def _features_by_tokens(w, rest, x, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    if SPLIT:
        small = tl.dot(rest, tl.trans(x), input_precision=PRECISION)
        return tl.dot(w, tl.trans(x), small, input_precision=PRECISION)
    return tl.dot(w, tl.trans(x), input_precision=PRECISION)


@triton.jit
def _program_chunk(tiles_ptr, num_heads, num_blocks):
    """(cell, first token, head, block of features) of this program; a chunk's programs are neighbours."""
    block = tl.program_id(0) % num_blocks
    head = (tl.program_id(0) // num_blocks % num_heads).to(tl.int64)
    chunk = tl.program_id(0) // num_blocks // num_heads
    return tl.load(tiles_ptr + 2 * chunk), tl.load(tiles_ptr + 2 * chunk + 1), head, block


@triton.jit
def slot_of(begin, cell, BLOCK: tl.constexpr):
    """The place of a cell's first block among those of all cells: they follow each other, with gaps."""
    return begin // BLOCK + cell


@triton.jit
def _store_partial(totals_ptr, matrix_ptr, place, first, total, matrix, num_features, HEAD_DIM: tl.constexpr):
    rows = first + tl.arange(0, matrix.shape[0])
    dims = tl.arange(0, matrix.shape[1])
    row_ok = rows < num_features
    places = place * num_features + rows
    tl.store(totals_ptr + places, total, mask=row_ok)
    ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(matrix_ptr + places[:, None] * HEAD_DIM + dims[None, :], matrix, mask=ok)


@triton.jit
def _add_keys(
    acc, top, total, w, rest, k_ptr, v_ptr, norms_ptr, first, last, stride_k, stride_v, scale,
    STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    k = load_tile(k_ptr, first, last, stride_k, STREAMED, HEAD_DIM, w.shape[1], MASKED).to(w.dtype)
    a = _features_by_tokens(w, rest, k, PRECISION, SPLIT)
    if MASKED:
        a = tl.where((tl.arange(0, STREAMED) < last - first)[None, :], a, float("-inf"))
    new_top = tl.maximum(top, tl.max(a, 1))
    norms = load_row_facts(norms_ptr, first, last, 0.0, STREAMED, MASKED)
    p = tl.exp2((a - new_top[:, None]) * (scale * LOG2_E) - (norms * LOG2_E)[None, :]).to(w.dtype)
    shrink = tl.exp2((top - new_top) * (scale * LOG2_E))
    v = load_tile(v_ptr, first, last, stride_v, STREAMED, HEAD_DIM, w.shape[1], MASKED).to(w.dtype)
    acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total * shrink + tl.sum(p.to(tl.float32), 1)


@triton.jit(do_not_specialize=["num_tokens"])
def favor_keys_kernel(
    k_ptr, v_ptr, w_ptr, rest_ptr, norms_ptr, tops_ptr, totals_ptr, matrix_ptr, values_ptr, largest_ptr,
    tiles_ptr, cu_seqlens_ptr, num_tokens, scale, num_heads, num_features, num_blocks,
    stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of a chunk's keys, for a block of features: max a, sum exp(a - n - max a), the same times v, and sum v."""
    cell, first, head, block = _program_chunk(tiles_ptr, num_heads, num_blocks)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    last = tl.minimum(first + CHUNK, length)
    whole = first + (last - first) // STREAMED * STREAMED
    k_ptr += begin * stride_kt + head * stride_kh
    v_ptr += begin * stride_vt + head * stride_vh
    norms_ptr += head * num_tokens + begin
    w, rest = load_features(
        w_ptr, rest_ptr, block * OWN, num_features, OWN, HEAD_DIM, D, DOT_DTYPE, SPLIT, True
    )
    acc = tl.zeros((OWN, D), tl.float32)
    top = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    for start in range(first, whole, STREAMED):
        acc, top, total = _add_keys(
            acc, top, total, w, rest, k_ptr, v_ptr, norms_ptr, start, last, stride_kt, stride_vt, scale,
            STREAMED, HEAD_DIM, PRECISION, SPLIT, False,
        )  # fmt: skip
    if whole < last:
        acc, top, total = _add_keys(
            acc, top, total, w, rest, k_ptr, v_ptr, norms_ptr, whole, last, stride_kt, stride_vt, scale,
            STREAMED, HEAD_DIM, PRECISION, SPLIT, True,
        )  # fmt: skip
    place = (slot_of(begin, cell, CHUNK) + first // CHUNK) * num_heads + head
    rows = block * OWN + tl.arange(0, OWN)
    _store_partial(totals_ptr, matrix_ptr, place, block * OWN, total, acc, num_features, HEAD_DIM)
    tl.store(tops_ptr + place * num_features + rows, top, mask=rows < num_features)
    largest = tl.max(tl.where(rows < num_features, top, float("-inf")), 0)
    tl.store(largest_ptr + place * num_blocks + block, largest)
    if block == 0:
        dims = tl.arange(0, D)
        values = tl.zeros((STREAMED, D), tl.float32)
        for start in range(first, last, STREAMED):
            values += load_tile(v_ptr, start, last, stride_vt, STREAMED, HEAD_DIM, D, True).to(tl.float32)
        tl.store(values_ptr + place * HEAD_DIM + dims, tl.sum(values, 0), mask=dims < HEAD_DIM)


@triton.jit
def _add_queries(
    acc, total, w, rest, q_ptr, grad_out_ptr, shift_ptr, inverse_ptr, delta_ptr, first, last, stride_q,
    stride_g, scale, eps, STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    q = load_tile(q_ptr, first, last, stride_q, STREAMED, HEAD_DIM, w.shape[1], MASKED).to(w.dtype)
    a = _features_by_tokens(w, rest, q, PRECISION, SPLIT)
    shift = load_row_facts(shift_ptr, first, last, 0.0, STREAMED, MASKED)
    inverse = load_row_facts(inverse_ptr, first, last, 0.0, STREAMED, MASKED)  # 0 stands for no query
    p = (tl.exp2(a * (scale * LOG2_E) - shift[None, :]) + eps) * inverse[None, :]
    p = p.to(w.dtype)
    grad_out = load_tile(grad_out_ptr, first, last, stride_g, STREAMED, HEAD_DIM, w.shape[1], MASKED)
    delta = load_row_facts(delta_ptr, first, last, 0.0, STREAMED, MASKED)
    acc = tl.dot(p, grad_out.to(w.dtype), acc, input_precision=PRECISION)
    return acc, total - tl.sum(p.to(tl.float32) * delta[None, :], 1)


@triton.jit(do_not_specialize=["num_tokens"])
def favor_queries_kernel(
    q_ptr, grad_out_ptr, w_ptr, rest_ptr, shift_ptr, inverse_ptr, delta_ptr, totals_ptr, matrix_ptr,
    largest_ptr, tiles_ptr, cu_seqlens_ptr, num_tokens, scale, num_heads, num_features, num_blocks, eps,
    stride_qt, stride_qh, stride_gt, stride_gh,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """d_context and d_totals of a chunk's queries, for a block of features, and the largest |d_context|."""
    cell, first, head, block = _program_chunk(tiles_ptr, num_heads, num_blocks)
    if cell < 0:
        return
    begin, length = cell_range(cu_seqlens_ptr, cell)
    last = tl.minimum(first + CHUNK, length)
    whole = first + (last - first) // STREAMED * STREAMED
    q_ptr += begin * stride_qt + head * stride_qh
    grad_out_ptr += begin * stride_gt + head * stride_gh
    facts = head * num_tokens + begin
    shift_ptr += facts
    inverse_ptr += facts
    delta_ptr += facts
    w, rest = load_features(
        w_ptr, rest_ptr, block * OWN, num_features, OWN, HEAD_DIM, D, DOT_DTYPE, SPLIT, True
    )
    acc = tl.zeros((OWN, D), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    for start in range(first, whole, STREAMED):
        acc, total = _add_queries(
            acc, total, w, rest, q_ptr, grad_out_ptr, shift_ptr, inverse_ptr, delta_ptr, start, last,
            stride_qt, stride_gt, scale, eps, STREAMED, HEAD_DIM, PRECISION, SPLIT, False,
        )  # fmt: skip
    if whole < last:
        acc, total = _add_queries(
            acc, total, w, rest, q_ptr, grad_out_ptr, shift_ptr, inverse_ptr, delta_ptr, whole, last,
            stride_qt, stride_gt, scale, eps, STREAMED, HEAD_DIM, PRECISION, SPLIT, True,
        )  # fmt: skip
    place = (slot_of(begin, cell, CHUNK) + first // CHUNK) * num_heads + head
    rows = block * OWN + tl.arange(0, OWN)
    _store_partial(totals_ptr, matrix_ptr, place, block * OWN, total, acc, num_features, HEAD_DIM)
    largest = tl.max(tl.where(rows < num_features, tl.max(tl.abs(acc), 1), 0.0), 0)
    tl.store(largest_ptr + place * num_blocks + block, largest)


# ---- a cell's chunks together -----------------------------------------------------------------------------------


@triton.jit
def _program_cell(num_heads, num_blocks):
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(0) // num_blocks % num_heads
    return tl.program_id(0) // num_blocks // num_heads, head, block


@triton.jit
def _store_block(matrix_ptr, columns_ptr, matrix, where, block, num_features, num_blocks,
                 HEAD_DIM: tl.constexpr, OWN: tl.constexpr):  # fmt: skip
    """The rows of a summary's matrix that this program has, zeros beyond the last feature, and their sum."""
    dims = tl.arange(0, matrix.shape[1])
    rows = block * OWN + tl.arange(0, OWN)
    ok = (rows < num_features)[:, None] & (dims < HEAD_DIM)[None, :]
    ptrs = matrix_ptr + (where * num_features + rows)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(ptrs, matrix.to(matrix_ptr.dtype.element_ty), mask=ok)
    column_sums = tl.sum(tl.where(ok, matrix, 0.0), 0)
    tl.store(columns_ptr + (where * num_blocks + block) * HEAD_DIM + dims, column_sums, mask=dims < HEAD_DIM)


@triton.jit
def favor_merge_keys_kernel(
    tops_ptr, sums_ptr, partials_ptr, values_ptr, largest_ptr, key_max_ptr, matrix_ptr, totals_ptr, columns_ptr,
    scale_ptr, cu_seqlens_ptr, scale, num_heads, num_features, num_blocks, eps,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, F: tl.constexpr, OWN: tl.constexpr, BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """One block of features of one head of a cell. Every program finds the cell's maximum and the head's totals."""
    cell, head, block = _program_cell(num_heads, num_blocks)
    begin, length = cell_range(cu_seqlens_ptr, cell)
    num_chunks = (length + CHUNK - 1) // CHUNK
    slot = slot_of(begin, cell, CHUNK)
    if GIVEN:
        key_max = tl.load(key_max_ptr + cell)
    else:
        key_max = float("-inf")
        listed = num_chunks * num_heads * num_blocks
        for start in range(0, listed, _LISTED):
            which = start + tl.arange(0, _LISTED)
            ptrs = largest_ptr + slot * num_heads * num_blocks + which
            key_max = tl.maximum(key_max, tl.max(tl.load(ptrs, mask=which < listed, other=float("-inf")), 0))
        key_max = key_max * scale
        if head + block == 0:
            tl.store(key_max_ptr + cell, key_max)
    if length == 0:
        return
    where = (cell * num_heads + head).to(tl.int64)
    f = tl.arange(0, F)
    f_ok = f < num_features
    totals = tl.zeros((F,), tl.float32)
    for chunk in range(num_chunks):
        ptrs = ((slot + chunk) * num_heads + head) * num_features + f
        top = tl.load(tops_ptr + ptrs, mask=f_ok, other=0.0)
        totals += tl.load(sums_ptr + ptrs, mask=f_ok, other=0.0) * tl.exp2((top * scale - key_max) * LOG2_E)
    totals = tl.where(f_ok, totals + eps * length, 0.0)
    largest = tl.max(totals, 0)
    if block == 0:
        tl.store(totals_ptr + where * num_features + f, totals / largest, mask=f_ok)
        tl.store(scale_ptr + 2 * where, largest)
        tl.store(scale_ptr + 2 * where + 1, tl.sum(totals / largest, 0))
    rows = block * OWN + tl.arange(0, OWN)
    dims = tl.arange(0, D)
    dim_ok = dims < HEAD_DIM
    ok = (rows < num_features)[:, None] & dim_ok[None, :]
    matrix = tl.zeros((OWN, D), tl.float32)
    values = tl.zeros((D,), tl.float32)
    for chunk in range(num_chunks):
        place = (slot + chunk) * num_heads + head
        top = tl.load(tops_ptr + place * num_features + rows, mask=rows < num_features, other=0.0)
        ptrs = partials_ptr + (place * num_features + rows)[:, None] * HEAD_DIM + dims[None, :]
        factor = tl.exp2((top * scale - key_max) * LOG2_E)
        matrix += tl.load(ptrs, mask=ok, other=0.0) * factor[:, None]
        values += tl.load(values_ptr + place * HEAD_DIM + dims, mask=dim_ok, other=0.0)
    matrix = (matrix + eps * values[None, :]) / largest
    _store_block(matrix_ptr, columns_ptr, matrix, where, block, num_features, num_blocks, HEAD_DIM, OWN)


@triton.jit
def favor_merge_queries_kernel(
    sums_ptr, partials_ptr, largest_ptr, key_scale_ptr, matrix_ptr, totals_ptr, columns_ptr, scale_ptr,
    cu_seqlens_ptr, num_heads, num_features, num_blocks,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, F: tl.constexpr, OWN: tl.constexpr, BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One block of features of one head of a cell, divided by the sum of the chunks' largest elements."""
    cell, head, block = _program_cell(num_heads, num_blocks)
    begin, length = cell_range(cu_seqlens_ptr, cell)
    if length == 0:
        return
    num_chunks = (length + CHUNK - 1) // CHUNK
    slot = slot_of(begin, cell, CHUNK)
    where = (cell * num_heads + head).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    rows = block * OWN + tl.arange(0, OWN)
    dims = tl.arange(0, D)
    row_ok = rows < num_features
    ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
    matrix = tl.zeros((OWN, D), tl.float32)
    totals = tl.zeros((OWN,), tl.float32)
    bound = 0.0
    for chunk in range(num_chunks):
        place = (slot + chunk) * num_heads + head
        largest = tl.load(largest_ptr + place * num_blocks + blocks, mask=blocks < num_blocks, other=0.0)
        bound += tl.max(largest, 0)
        places = place * num_features + rows
        totals += tl.load(sums_ptr + places, mask=row_ok, other=0.0)
        matrix += tl.load(partials_ptr + places[:, None] * HEAD_DIM + dims[None, :], mask=ok, other=0.0)
    bound = tl.where(bound == 0.0, 1.0, bound)
    tl.store(totals_ptr + where * num_features + rows, totals / bound, mask=row_ok)
    if block == 0:
        tl.store(scale_ptr + 2 * where, bound / tl.load(key_scale_ptr + 2 * where))
    _store_block(
        matrix_ptr, columns_ptr, matrix / bound, where, block, num_features, num_blocks, HEAD_DIM, OWN
    )
