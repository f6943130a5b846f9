"""Gradient of an embedding table: the rows of dx added up by id, in the order of the tokens, without atomics.

Ids are sorted (stably) once; an id's tokens are then a range of that order. Frequent ids (the one row of a type
table, a <cls>, a value bin) would leave one program adding alone for long, so ranges of more than CHUNK tokens are
cut into chunks from their own start, whose sums are added in order afterwards. What is added to what depends on the
id's own tokens only. Nothing waits for the device: the number of chunks is bounded by the shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Target
from .launch import Options, launch

_CHUNK = 128  # tokens whose rows one program adds
_ROWS, _COLUMNS = 16, 128  # that are loaded at a time
_OPTIONS = Options(num_warps=4, num_stages=2)


def table_gradient(dx: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """float32 (num_rows, M): row v is the sum of dx[t] over ids[t] == v. dx: (T, M), row-contiguous; ids: (T,).

    Ids outside the table are left out.
    """
    num_tokens, size = dx.shape
    grad = dx.new_empty((num_rows, size), dtype=torch.float32)
    sorted_ids, order = torch.sort(ids.to(torch.int32), stable=True)
    rows = torch.arange(num_rows + 1, dtype=torch.int32, device=dx.device)
    offsets = torch.searchsorted(sorted_ids, rows, out_int32=True)
    counts = offsets.diff()
    chunks = torch.where(counts > _CHUNK, (counts + (_CHUNK - 1)) // _CHUNK, 0)
    ends = torch.cumsum(chunks, 0, dtype=torch.int32)
    # ceil(n / CHUNK) <= 2 n / CHUNK for the n > CHUNK that are cut.
    slots = torch.arange(2 * num_tokens // _CHUNK, dtype=torch.int32, device=dx.device)
    slot_rows = torch.searchsorted(ends, slots, right=True, out_int32=True)  # num_rows where a slot is unused
    partials = dx.new_empty((len(slots), size), dtype=torch.float32)
    constants = {"SIZE": size, "CHUNK": _CHUNK, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    num_blocks = triton.cdiv(size, _COLUMNS)
    common = (dx, order, offsets, ends)
    launch(
        chunk_sums_kernel,
        (len(slots) * num_blocks,),
        (*common, slot_rows, partials, num_rows),
        constants,
        _OPTIONS,
    )
    launch(row_sums_kernel, (num_rows * num_blocks,), (*common, partials, grad), constants, _OPTIONS)
    return grad


@triton.jit
def _sum_of_tokens(
    dx_ptr, order_ptr, begin, end, columns, column_ok, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The rows of dx that places begin to end of the order name, added ROWS at a time."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, end, ROWS):
        places = first + tl.arange(0, ROWS)
        ok = places < end
        tokens = tl.load(order_ptr + places, mask=ok, other=0).to(tl.int64)
        rows = dx_ptr + tokens[:, None] * SIZE + columns[None, :]
        total += tl.sum(tl.load(rows, mask=ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32), 0)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def chunk_sums_kernel(
    dx_ptr, order_ptr, offsets_ptr, ends_ptr, slot_rows_ptr, partials_ptr, num_rows,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One chunk of a frequent id, some columns: partials[slot] = its rows' sum."""
    num_blocks = tl.cdiv(SIZE, COLUMNS)
    slot = tl.program_id(0) // num_blocks
    row = tl.load(slot_rows_ptr + slot)
    if row >= num_rows:
        return
    columns = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    last = tl.load(offsets_ptr + row + 1)
    own = tl.load(offsets_ptr + row)
    chunk = slot - (tl.load(ends_ptr + row) - (last - own + CHUNK - 1) // CHUNK)
    begin = own + chunk * CHUNK
    total = _sum_of_tokens(
        dx_ptr, order_ptr, begin, tl.minimum(begin + CHUNK, last), columns, columns < SIZE, SIZE, ROWS, COLUMNS
    )  # fmt: skip
    tl.store(partials_ptr + slot.to(tl.int64) * SIZE + columns, total, mask=columns < SIZE)


@triton.jit
def row_sums_kernel(
    dx_ptr, order_ptr, offsets_ptr, ends_ptr, partials_ptr, grad_ptr,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One id, some columns: the sum of its tokens' rows, or of its chunks' sums."""
    num_blocks = tl.cdiv(SIZE, COLUMNS)
    row = tl.program_id(0) // num_blocks
    columns = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = columns < SIZE
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    if end - begin <= CHUNK:
        total = _sum_of_tokens(dx_ptr, order_ptr, begin, end, columns, column_ok, SIZE, ROWS, COLUMNS)
    else:
        total = tl.zeros((COLUMNS,), tl.float32)
        last = tl.load(ends_ptr + row)
        for first in range(last - (end - begin + CHUNK - 1) // CHUNK, last, ROWS):
            slots = first + tl.arange(0, ROWS)
            sums = partials_ptr + slots.to(tl.int64)[:, None] * SIZE + columns[None, :]
            ok = (slots < last)[:, None] & column_ok[None, :]
            total += tl.sum(tl.load(sums, mask=ok, other=0.0), 0)
    tl.store(grad_ptr + row.to(tl.int64) * SIZE + columns, total, mask=column_ok)


def aot_targets() -> list[Target]:
    constants = {"SIZE": 768, "CHUNK": _CHUNK, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    common = {"dx_ptr": "*fp32:16", "order_ptr": "*i64:16", "offsets_ptr": "*i32:16", "ends_ptr": "*i32:16"}
    common |= {"partials_ptr": "*fp32:16"}
    chunks = common | {"slot_rows_ptr": "*i32:16", "num_rows": "i32"}
    rows = common | {"grad_ptr": "*fp32:16"}
    return [
        Target("table_grads_chunks 768", chunk_sums_kernel, chunks, constants, _OPTIONS, multiplies=False),
        Target("table_grads_rows 768", row_sums_kernel, rows, constants, _OPTIONS, multiplies=False),
    ]
