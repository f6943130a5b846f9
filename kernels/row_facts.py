"""What the attention backward needs of every query: its log-sum-exp and delta = rowsum(out * grad_out).

Written head by head, (H, T), since the backward reads the values of many queries of one head at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .aot import Target
from .launch import Options, block_dim, launch

_ROWS = 64
_OPTIONS = Options(num_warps=4, num_stages=1)


def backward_rows(out: Tensor, grad_out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (H, T) each: the log-sum-exp again, and the sums of out * grad_out, which are (T, H, D)."""
    num_tokens, num_heads, head_dim = out.shape
    lse_by_head, delta = (lse.new_empty((num_heads, num_tokens)) for _ in range(2))
    launch(
        backward_rows_kernel,
        (triton.cdiv(num_tokens, _ROWS) * num_heads,),
        (
            out,
            grad_out,
            lse,
            lse_by_head,
            delta,
            num_tokens,
            num_heads,
            *(x.stride(dim) for x in (out, grad_out) for dim in range(3)),
            lse.stride(0),
            lse.stride(1),
        ),
        {"HEAD_DIM": head_dim, "D": block_dim(head_dim), "ROWS": _ROWS},
        _OPTIONS,
    )
    return lse_by_head, delta


@triton.jit(do_not_specialize=["num_tokens"])
def backward_rows_kernel(
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    lse_by_head_ptr,
    delta_ptr,
    num_tokens,
    num_heads,
    stride_ot,
    stride_oh,
    stride_od,
    stride_gt,
    stride_gh,
    stride_gd,
    stride_lt,
    stride_lh,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    rows = (tl.program_id(0) // num_heads).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    row_ok = rows < num_tokens
    ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
    out_ptrs = out_ptr + head * stride_oh + rows[:, None] * stride_ot + dims[None, :] * stride_od
    grad_ptrs = grad_out_ptr + head * stride_gh + rows[:, None] * stride_gt + dims[None, :] * stride_gd
    out = tl.load(out_ptrs, mask=ok, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_ptrs, mask=ok, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + rows * stride_lt + head * stride_lh, mask=row_ok, other=0.0)
    place = head * num_tokens + rows
    tl.store(lse_by_head_ptr + place, lse, mask=row_ok)
    tl.store(delta_ptr + place, tl.sum(out * grad_out, 1), mask=row_ok)


def aot_targets() -> list[Target]:
    signature = {"out_ptr": "*bf16:16", "grad_out_ptr": "*bf16:16"}
    signature |= {"lse_ptr": "*fp32:16", "lse_by_head_ptr": "*fp32:16", "delta_ptr": "*fp32:16"}
    signature |= {"num_tokens": "i32", "num_heads": "i32"}
    signature |= {f"stride_{name}": "i32:16" for name in ("ot", "oh", "gt", "gh")}
    signature |= {"stride_lt": "i32"}
    constants = {"HEAD_DIM": 64, "D": 64, "ROWS": _ROWS, "stride_od": 1, "stride_gd": 1, "stride_lh": 1}
    return [
        Target(
            "backward_rows D=64 bf16", backward_rows_kernel, signature, constants, _OPTIONS, multiplies=False
        )
    ]
