"""A cell's chunks together: their partial sums added in order, brought to one maximum and scaled.

A program has one block of features of one head of one cell, and adds that cell's chunks from the first to the last.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from .favor_partials import slot_of
from .launch import Options, block_dim
from .packed_tiles import cell_range
from .softmax_tiles import LOG2_E

MERGE_OPTIONS = Options(num_warps=8, num_stages=1)
_LISTED = tl.constexpr(128)


@cache
def merge_constants(num_features: int, head_dim: int, own: int, chunk: int) -> dict[str, object]:
    return {
        "HEAD_DIM": head_dim,
        "D": block_dim(head_dim),
        "F": block_dim(num_features),
        "OWN": own,
        "BLOCKS": triton.next_power_of_2(triton.cdiv(num_features, own)),
        "CHUNK": chunk,
    }


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
