"""Summed embeddings and their LayerNorm in one pass, and the gradients without atomics.

A program computes a few tokens, whole rows: what is read is one row of each table, what is written is the result.
The backward makes the sum again, and its gradient dx once; rows of dx that belong to one id are then added in the
order of its tokens (see table_grads.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import table_grads
from .aot import Target
from .launch import Options, as_stored, launch, new_output

MAX_TABLES = 4  # in one launch; the sum of further ones goes in as an addend
_ELEMENTS = 2048  # of a program's rows together: 16 a thread of 4 warps
_TOKENS_PER_PARTIAL = 64  # whose weight and bias gradients one program adds up


def forward(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (T, M) in the tables' dtype; mean and 1 / sqrt(var + eps) of every token, float32 (T,), zeros without norm.

    ids: int32 or int64 (T,) each; tables: (V_n, M); addend: (T, M) or None; weight, bias: (M,), or None both for the
    plain sum. A token whose id is outside its table becomes NaN; nothing outside a table is read.
    """
    ids, tables, addend = _at_most_four(ids, tables, addend)
    shape = len(ids[0]), tables[0].shape[1]
    out = new_output(tables[0], shape)
    if weight is None:
        mean, rstd = (torch.zeros(shape[0], dtype=torch.float32, device=out.device) for _ in range(2))
    else:
        mean, rstd = (out.new_empty(shape[0], dtype=torch.float32) for _ in range(2))
    _launch_forward(ids, tables, addend, weight, bias, eps, out, mean, rstd)
    return as_stored(out, tables[0]), mean, rstd


def backward(
    grad_out: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[list[Tensor], Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the tables, and of addend, weight and bias where those are given: float32.

    mean and rstd are the forward's. The same inputs give the same bits every time.
    """
    dx, d_weight, d_bias = grad_out.contiguous(), None, None
    if weight is not None:
        dx, d_weight, d_bias = _through_norm(dx, *_at_most_four(ids, tables, addend), weight, mean, rstd)
    grads = [
        table_grads.table_gradient(dx, index, len(table)) for index, table in zip(ids, tables, strict=True)
    ]
    # Without a norm dx is the caller's own tensor, which an operator must not hand back.
    d_addend = None if addend is None else dx.to(torch.float32, copy=weight is None)
    return grads, d_addend, d_weight, d_bias


def _through_norm(
    grad_out: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the summed embeddings (T, M), of weight and of bias, float32."""
    num_tokens, size = grad_out.shape
    num_partials = triton.cdiv(num_tokens, _TOKENS_PER_PARTIAL)
    dx = grad_out.new_empty(grad_out.shape, dtype=torch.float32)
    d_weight, d_bias = (grad_out.new_empty((num_partials, size), dtype=torch.float32) for _ in range(2))
    constants, options = _shape_of_programs(size, len(tables), addend is not None)
    launch(
        embed_norm_backward_kernel,
        (num_partials,),
        (
            grad_out,
            *_inputs(ids, tables, addend),
            weight.contiguous(),
            mean,
            rstd,
            dx,
            d_weight,
            d_bias,
            num_tokens,
        ),
        {**constants, "TOKENS": _TOKENS_PER_PARTIAL},
        options,
    )
    return dx, d_weight.sum(0), d_bias.sum(0)


def _launch_forward(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *outputs: Tensor,
) -> None:
    num_tokens, size = outputs[0].shape
    constants, options = _shape_of_programs(size, len(tables), addend is not None)
    launch(
        embed_norm_forward_kernel,
        (triton.cdiv(num_tokens, constants["ROWS"]),),
        (
            *_inputs(ids, tables, addend),
            *(tables[0] if x is None else x.contiguous() for x in (weight, bias)),
            *outputs,
            num_tokens,
            eps,
        ),
        {**constants, "NORM": weight is not None},
        options,
    )


def _at_most_four(
    ids: Sequence[Tensor], tables: Sequence[Tensor], addend: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
    """Fold the tables behind the fourth into the addend, in float32."""
    while len(tables) > MAX_TABLES:
        total = tables[0].new_empty((len(ids[0]), tables[0].shape[1]), dtype=torch.float32)
        unused = total.new_empty(0)
        last = ids[-MAX_TABLES:], tables[-MAX_TABLES:]
        _launch_forward(*last, addend, None, None, 0.0, total, unused, unused)
        ids, tables, addend = ids[:-MAX_TABLES], tables[:-MAX_TABLES], total
    return ids, tables, addend


def _inputs(ids: Sequence[Tensor], tables: Sequence[Tensor], addend: Tensor | None) -> list[Tensor | int]:
    """The kernels' leading arguments: MAX_TABLES of ids, of tables and of their sizes; then the addend."""
    unused = MAX_TABLES - len(tables)
    every_id = [x.contiguous() for x in ids] + [ids[0]] * unused
    every_table = [x.contiguous() for x in tables] + [tables[0]] * unused
    return [
        *every_id,
        *every_table,
        *(len(x) for x in every_table),
        tables[0] if addend is None else addend.contiguous(),
    ]


@cache
def _shape_of_programs(size: int, num_tables: int, has_addend: bool) -> tuple[dict[str, Any], Options]:
    """The kernels' constexpr parameters, not to be changed, and their options."""
    columns = triton.next_power_of_2(max(size, 1))
    rows = max(_ELEMENTS // columns, 1)
    constants = {
        "SIZE": size,
        "COLUMNS": columns,
        "ROWS": min(rows, 16),
        "NUM_TABLES": num_tables,
        "HAS_ADDEND": has_addend,
    }
    return constants, Options(num_warps=min(max(columns // 512, 4), 16), num_stages=1)


@triton.jit
def _row_of(table_ptr, ids_ptr, num_rows, tokens, token_ok, columns, ok, SIZE: tl.constexpr):
    index = tl.load(ids_ptr + tokens, mask=token_ok, other=0).to(tl.int64)
    inside = (index >= 0) & (index < num_rows)
    rows = table_ptr + index[:, None] * SIZE + columns[None, :]
    return tl.load(rows, mask=ok & inside[:, None], other=float("nan")).to(tl.float32)


@triton.jit
def _summed(
    ids_0_ptr, ids_1_ptr, ids_2_ptr, ids_3_ptr, table_0_ptr, table_1_ptr, table_2_ptr, table_3_ptr,
    rows_0, rows_1, rows_2, rows_3, addend_ptr, tokens, token_ok, columns, ok,
    SIZE: tl.constexpr, NUM_TABLES: tl.constexpr, HAS_ADDEND: tl.constexpr,
):  # fmt: skip
    """x, float32 (ROWS, COLUMNS); NaN outside of ``ok``."""
    x = _row_of(table_0_ptr, ids_0_ptr, rows_0, tokens, token_ok, columns, ok, SIZE)
    if NUM_TABLES > 1:
        x += _row_of(table_1_ptr, ids_1_ptr, rows_1, tokens, token_ok, columns, ok, SIZE)
    if NUM_TABLES > 2:
        x += _row_of(table_2_ptr, ids_2_ptr, rows_2, tokens, token_ok, columns, ok, SIZE)
    if NUM_TABLES > 3:
        x += _row_of(table_3_ptr, ids_3_ptr, rows_3, tokens, token_ok, columns, ok, SIZE)
    if HAS_ADDEND:
        x += tl.load(addend_ptr + tokens[:, None] * SIZE + columns[None, :], mask=ok, other=0.0).to(
            tl.float32
        )
    return x


@triton.jit(do_not_specialize=["num_tokens", "rows_0", "rows_1", "rows_2", "rows_3"])
def embed_norm_forward_kernel(
    ids_0_ptr, ids_1_ptr, ids_2_ptr, ids_3_ptr, table_0_ptr, table_1_ptr, table_2_ptr, table_3_ptr,
    rows_0, rows_1, rows_2, rows_3, addend_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr, num_tokens, eps,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, NUM_TABLES: tl.constexpr,
    HAS_ADDEND: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    token_ok, column_ok = tokens < num_tokens, columns < SIZE
    ok = token_ok[:, None] & column_ok[None, :]
    x = _summed(
        ids_0_ptr, ids_1_ptr, ids_2_ptr, ids_3_ptr, table_0_ptr, table_1_ptr, table_2_ptr, table_3_ptr,
        rows_0, rows_1, rows_2, rows_3, addend_ptr, tokens, token_ok, columns, ok, SIZE, NUM_TABLES, HAS_ADDEND,
    )  # fmt: skip
    if NORM:
        mean = tl.sum(tl.where(ok, x, 0.0), 1) / SIZE
        centred = tl.where(ok, x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / SIZE + eps)
        weight = tl.load(weight_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)
        x = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(mean_ptr + tokens, mean, mask=token_ok)
        tl.store(rstd_ptr + tokens, rstd, mask=token_ok)
    out_ptrs = out_ptr + tokens[:, None] * SIZE + columns[None, :]
    tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_tokens", "rows_0", "rows_1", "rows_2", "rows_3"])
def embed_norm_backward_kernel(
    grad_out_ptr,
    ids_0_ptr, ids_1_ptr, ids_2_ptr, ids_3_ptr, table_0_ptr, table_1_ptr, table_2_ptr, table_3_ptr,
    rows_0, rows_1, rows_2, rows_3, addend_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, d_weight_ptr, d_bias_ptr,
    num_tokens,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, NUM_TABLES: tl.constexpr,
    HAS_ADDEND: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens a program, ROWS at a time: dx of each, and their share of the weight and bias gradients."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    columns = tl.arange(0, COLUMNS)
    column_ok = columns < SIZE
    weight = tl.load(weight_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)
    d_weight = tl.zeros((COLUMNS,), tl.float32)
    d_bias = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, TOKENS, ROWS):
        tokens = first + start + tl.arange(0, ROWS)
        token_ok = tokens < num_tokens
        ok = token_ok[:, None] & column_ok[None, :]
        x = _summed(
            ids_0_ptr, ids_1_ptr, ids_2_ptr, ids_3_ptr, table_0_ptr, table_1_ptr, table_2_ptr, table_3_ptr,
            rows_0, rows_1, rows_2, rows_3, addend_ptr, tokens, token_ok, columns, ok, SIZE, NUM_TABLES, HAS_ADDEND,
        )  # fmt: skip
        mean = tl.load(mean_ptr + tokens, mask=token_ok, other=0.0)
        rstd = tl.load(rstd_ptr + tokens, mask=token_ok, other=0.0)
        place = tokens[:, None] * SIZE + columns[None, :]
        upstream = tl.load(grad_out_ptr + place, mask=ok, other=0.0).to(tl.float32)
        normed = tl.where(ok, (x - mean[:, None]) * rstd[:, None], 0.0)
        d_weight += tl.sum(upstream * normed, 0)
        d_bias += tl.sum(upstream, 0)
        dy = upstream * weight[None, :]
        along = tl.sum(dy * normed, 1) / SIZE
        dx = (dy - (tl.sum(dy, 1) / SIZE)[:, None] - normed * along[:, None]) * rstd[:, None]
        tl.store(dx_ptr + place, dx, mask=ok)
    partial = tl.program_id(0).to(tl.int64) * SIZE + columns
    tl.store(d_weight_ptr + partial, d_weight, mask=column_ok)
    tl.store(d_bias_ptr + partial, d_bias, mask=column_ok)


def aot_targets() -> list[Target]:
    """Geneformer's three tables of 768, and scGPT's two of 512 with an addend."""
    return table_grads.aot_targets() + [
        _target(name, kernel, size, num_tables, has_addend)
        for name, kernel in (("forward", embed_norm_forward_kernel), ("backward", embed_norm_backward_kernel))
        for size, num_tables, has_addend in ((768, 3, False), (512, 2, True))
    ]


def _target(name: str, kernel: Callable[..., Any], size: int, num_tables: int, has_addend: bool) -> Target:
    constants, options = _shape_of_programs(size, num_tables, has_addend)
    floats = ["mean_ptr", "rstd_ptr"]
    rows = ["addend_ptr", "weight_ptr", *(f"table_{n}_ptr" for n in range(MAX_TABLES))]
    if name == "forward":
        constants = constants | {"NORM": True}
        rows += ["bias_ptr", "out_ptr"]
    else:
        constants = constants | {"TOKENS": _TOKENS_PER_PARTIAL}
        rows.append("grad_out_ptr")
        floats += ["dx_ptr", "d_weight_ptr", "d_bias_ptr"]
    signature = {f"ids_{n}_ptr": "*i64:16" for n in range(MAX_TABLES)}
    signature |= {f"rows_{n}": "i32" for n in range(MAX_TABLES)} | {"num_tokens": "i32"}
    signature |= dict.fromkeys(floats, "*fp32:16") | dict.fromkeys(rows, "*bf16:16")
    signature |= {"eps": "fp32"} if name == "forward" else {}
    title = f"embed_norm_{name} {num_tables}x{size} bf16"
    return Target(title, kernel, signature, constants, options, multiplies=False)
