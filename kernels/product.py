"""Matrix products inside and between kernels: one inner loop, in the order of the inner dimension, without split-K.

Each element is one sum in one order whatever the other rows are. Only the inner dimension is masked, where its size
is no multiple of the block; results of rows past the end are never stored, so what those rows hold does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Target
from .launch import Options, dot_dtype, dot_precision, launch


@dataclass(frozen=True, eq=False)
class Tiles:
    """A program's rows and columns of the result, and what it multiplies at a time."""

    rows: int
    columns: int
    inner: int
    options: Options

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "INNER": self.inner,
            "DOT_DTYPE": dot_dtype(dtype),
            "PRECISION": dot_precision(dtype),
        }


# 96 KiB of shared memory, which every GPU from compute capability 8.0 on has.
_HALF_PRECISION = Tiles(128, 128, 64, Options(num_warps=8, num_stages=3))
# Products of full float32 precision run outside the tensor cores and hold their operands in registers.
_FULL_PRECISION = Tiles(64, 64, 16, Options(num_warps=8, num_stages=2))


def tiles(dtype: torch.dtype) -> Tiles:
    return _FULL_PRECISION if dtype == torch.float32 else _HALF_PRECISION


def padded_rows(num_rows: int, dtype: torch.dtype) -> int:
    """The rows that memory for so many rows of a product's first factor needs."""
    return triton.cdiv(num_rows, tiles(dtype).rows) * tiles(dtype).rows


def write_product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b. a: (N, K), b: (K, M), any strides; out: (N, M), row-contiguous, of any float type.

    The memory of a goes on to whole tiles of rows, as padded_rows() says: a mask along rows that are contiguous
    would cost the 16-byte loads.
    """
    (num_rows, num_inner), num_columns = a.shape, b.shape[1]
    shape = tiles(b.dtype)
    launch(
        product_kernel,
        (triton.cdiv(num_rows, shape.rows) * triton.cdiv(num_columns, shape.columns),),
        (a, b, out, num_rows, num_columns, num_inner, *a.stride(), *b.stride(), out.stride(0)),
        {**shape.constants(b.dtype), "ADD": add, "EVEN": num_inner % shape.inner == 0},
        shape.options,
    )


@triton.jit
def accumulate(
    acc, a_ptrs, b_ptrs, step_a, step_b, num_inner, b_ok,
    MASK_B: tl.constexpr, EVEN: tl.constexpr, INNER: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a b, float32, over num_inner places in blocks of INNER, by which the pointers advance in step_a, step_b.

    EVEN: num_inner is a multiple of INNER. MASK_B: b's columns are read where b_ok only.
    """
    inner = tl.arange(0, INNER)
    for first in range(0, num_inner, INNER):
        if EVEN:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(inner < num_inner - first)[None, :], other=0.0)
        if MASK_B:
            b = tl.load(b_ptrs, mask=(inner < num_inner - first)[:, None] & b_ok, other=0.0)
        elif EVEN:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=(inner < num_inner - first)[:, None], other=0.0)
        acc = tl.dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), acc, input_precision=PRECISION)
        a_ptrs += step_a
        b_ptrs += step_b
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_inner"])
def product_kernel(
    a_ptr, b_ptr, out_ptr, num_rows, num_columns, num_inner, stride_am, stride_ak, stride_bk, stride_bn, stride_om,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Neighbouring programs are the column blocks of one block of rows, which they then find in the L2 cache."""
    num_blocks = tl.cdiv(num_columns, COLUMNS)
    first_row = tl.program_id(0) // num_blocks * ROWS
    first_column = tl.program_id(0) % num_blocks * COLUMNS
    a_ptr += first_row.to(tl.int64) * stride_am
    b_ptr += first_column.to(tl.int64) * stride_bn
    out_ptr += first_row.to(tl.int64) * stride_om + first_column
    rows, columns, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    column_ok = (first_column + columns < num_columns)[None, :]
    ok = (rows < num_rows - first_row)[:, None] & column_ok
    out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :]
    if ADD:
        acc = tl.load(out_ptrs, mask=ok, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = accumulate(
        acc,
        a_ptr + rows[:, None] * stride_am + inner[None, :] * stride_ak,
        b_ptr + inner[:, None] * stride_bk + columns[None, :] * stride_bn,
        INNER * stride_ak, INNER * stride_bk, num_inner, column_ok, True, EVEN, INNER, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=ok)


def aot_targets() -> list[Target]:
    """The two products of the masked head's backward: into hidden (added up), into weight (a transposed)."""
    shape = tiles(torch.bfloat16)
    constants = shape.constants(torch.bfloat16) | {"DOT_DTYPE": tl.bfloat16, "PRECISION": "ieee"}
    signature = {"a_ptr": "*bf16:16", "b_ptr": "*bf16:16"}
    signature |= {"num_rows": "i32", "num_columns": "i32:16", "num_inner": "i32"}
    signature |= dict.fromkeys(("stride_bk", "stride_om"), "i32:16")
    by_rows = signature | {"out_ptr": "*fp32:16", "stride_am": "i32:16"}
    by_columns = signature | {"out_ptr": "*bf16:16", "stride_ak": "i32:16"}
    unit = {"stride_bn": 1, "ADD": True, "EVEN": True}
    return [
        Target(
            "product += 128x128", product_kernel, by_rows, constants | unit | {"stride_ak": 1}, shape.options
        ),
        Target(
            "product transposed 128x128",
            product_kernel,
            by_columns,
            constants | unit | {"stride_am": 1, "ADD": False, "EVEN": False},
            shape.options,
        ),
    ]
