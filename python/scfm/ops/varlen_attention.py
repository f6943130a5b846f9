"""Full bidirectional attention inside each packed cell.

    out[i] = sum_j softmax_j(scale * <q[i], k[j]>) v[j],   j over the tokens of i's cell

Cells never see each other, so no padding and no mask exists anywhere, and a cell's result depends on its own
tokens only, bit for bit. Row statistics (log-sum-exp) are kept for the backward, which makes the probabilities
again. Paths: our C++ kernels on CPU, Triton or FlashAttention on a GPU, torch's own kernels cell by cell for what
those do not take (float64, wide heads).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.ops import flash, native, paths, triton_kernels
from scfm.ops.arguments import cell_slices, check_heads, check_offsets, wide

_NAME = "varlen_attention"
_QUERY_BLOCK = 256  # of torch's backward: 12 heads x 256 x 2,048 probabilities are 25 MB in float32

paths.register(
    _NAME,
    [
        paths.Path(
            "native", "scfm's C++ kernels", native.objection_unless("varlen_forward", "varlen_backward")
        ),
        paths.Path("flash_attn_3", "flash-attn 3 (flash_attn_interface)", flash.objection_version_3),
        paths.Path("triton", "scfm's Triton kernels", triton_kernels.objection),
        paths.Path("torch_varlen", "torch.nn.attention.varlen", flash.objection_torch),
        paths.Path("flash_attn_2", "flash-attn 2", flash.objection_version_2),
        paths.Path("torch", "torch's fused attention, a call a cell", lambda tensor: None),
    ],
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """Attention of packed cells.

    q, k, v: (T, H, D) float32, float64, bfloat16 or float16; cu_seqlens: int32 (C + 1,). ``cu_seqlens_q`` packs
    the queries by their own offsets (one query a cell, for instance); default: the keys' offsets.
    scale: default 1 / sqrt(D). Returns (Tq, H, D) in q's dtype. A cell without keys gives zeros.
    Raises InvalidArgumentError for shapes or offsets that do not fit.
    """
    offsets_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    check_heads(_NAME, q, k, v)
    check_offsets(_NAME, "cu_seqlens", cu_seqlens, len(k), q.device)
    check_offsets(_NAME, "cu_seqlens_q", offsets_q, len(q), q.device, num_cells=cu_seqlens.numel() - 1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out: Tensor = torch.ops.scfm.varlen_attention(q, k, v, cu_seqlens, offsets_q, scale)[0]
    return out


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """The formula, one cell at a time, in whatever dtype it is given (float64 in the tests)."""
    offsets_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.zeros_like(q)
    for q_rows, kv_rows in cell_slices(offsets_q, cu_seqlens):
        scores = torch.einsum("ihd,jhd->hij", q[q_rows], k[kv_rows]) * scale
        out[q_rows] = torch.einsum("hij,jhd->ihd", torch.softmax(scores, dim=-1), v[kv_rows])
    return out


@torch.library.custom_op("scfm::varlen_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the natural log-sum-exp of every query's scores, (Tq, H), for the backward."""
    path = paths.choose(_NAME, q)
    if path == "native":
        return _native_forward(q, k, v, cu_seqlens, cu_seqlens_q, scale)
    if path == "triton":
        from scfm.kernels import varlen_attention as kernels

        return kernels.forward(q, k, v, cu_seqlens_q, cu_seqlens, scale)  # type: ignore[no-any-return]
    if path == "torch":
        return _torch_forward(q, k, v, cu_seqlens, cu_seqlens_q, scale)
    return flash.forward(path, q, k, v, cu_seqlens, cu_seqlens_q, scale)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide(q.dtype))


@torch.library.custom_op("scfm::varlen_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities are made again from the scores and ``lse``: none are kept from the forward."""
    path = paths.choose(_NAME, q)
    if path == "native":
        return _native_backward(grad_out, q, k, v, out, lse, cu_seqlens, cu_seqlens_q, scale)
    if path != "torch" and triton_kernels.objection(q) is None:
        from scfm.kernels import varlen_attention as kernels

        return kernels.backward(  # type: ignore[no-any-return]
            grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, scale
        )
    return _torch_backward(grad_out, q, k, v, out, lse, cu_seqlens, cu_seqlens_q, scale)


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, cu_seqlens, cu_seqlens_q, scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_q)
    ctx.mark_non_differentiable(output[1])
    ctx.scale = scale  # type: ignore[attr-defined]


def _autograd(
    ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    scale = ctx.scale  # type: ignore[attr-defined]
    dq, dk, dv = torch.ops.scfm.varlen_attention_backward(grad_out.contiguous(), *saved, scale)
    return dq, dk, dv, None, None, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)


# ---- our C++ kernels --------------------------------------------------------------------------------------------


def _native_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from scfm import _native

    stored = [native.storable(x) for x in (q, k, v)]
    out = stored[0].new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    arrays = [native.array(x) for x in (*stored, out, lse, cu_seqlens_q, cu_seqlens)]
    native.with_torch_threads(_native.varlen_forward, *arrays, None, scale)
    return out.to(q.dtype), lse


def _native_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from scfm import _native

    stored = [native.storable(x) for x in (grad_out, q, k, v, out)]
    grads = [x.new_empty(x.shape) for x in stored[1:4]]
    arrays = [native.array(x) for x in (*stored, lse, *grads, cu_seqlens_q, cu_seqlens)]
    native.with_torch_threads(_native.varlen_backward, *arrays, None, scale)
    dq, dk, dv = (x.to(q.dtype) for x in grads)
    return dq, dk, dv


# ---- torch, a cell at a time ------------------------------------------------------------------------------------


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=wide(q.dtype))
    for q_rows, kv_rows in cell_slices(cu_seqlens_q, cu_seqlens):
        queries, keys, values = (
            x.to(wide(x.dtype)).transpose(0, 1)[None] for x in (q[q_rows], k[kv_rows], v[kv_rows])
        )
        if q.device.type == "cpu":
            attended, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, scale=scale
            )
            out[q_rows], lse[q_rows] = attended[0].transpose(0, 1).to(q.dtype), logs[0].T
        else:
            attended = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
            out[q_rows] = attended[0].transpose(0, 1).to(q.dtype)
            lse[q_rows] = log_sum_exp(queries[0], keys[0], scale).T
    return out, lse


def log_sum_exp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """log sum_j exp(scale <q[i], k[j]>) of (H, L, D) each, a block of queries at a time; (H, L)."""
    keys = k.transpose(1, 2)
    parts = [torch.logsumexp(torch.bmm(x, keys) * scale, dim=-1) for x in torch.split(q, _QUERY_BLOCK, 1)]
    return torch.cat(parts, 1)


def _torch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for q_rows, kv_rows in cell_slices(cu_seqlens_q, cu_seqlens):
        cell = (grad_out[q_rows], q[q_rows], k[kv_rows], v[kv_rows])
        dq[q_rows], dk[kv_rows], dv[kv_rows] = gradients_by_formula(*cell, scale)
    return dq, dk, dv


def gradients_by_formula(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One cell's P = softmax(scale q k^T);  dv = P^T do;  dS = P (do v^T - rowsum(P * (do v^T)));

    dq = scale dS k;  dk = scale dS^T q;  a block of queries at a time. (L, H, D) each.
    """
    dtype = q.dtype
    grad_out, q, k, v = (x.to(wide(dtype)).transpose(0, 1) for x in (grad_out, q, k, v))
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dq = []
    blocks = zip(torch.split(q, _QUERY_BLOCK, 1), torch.split(grad_out, _QUERY_BLOCK, 1), strict=True)
    for queries, upstream in blocks:
        p = torch.softmax(torch.bmm(queries, keys).mul_(scale), dim=-1)
        dv += torch.bmm(p.transpose(1, 2), upstream)
        dp = torch.bmm(upstream, values)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq.append(torch.bmm(ds, k))
        dk += torch.bmm(ds.transpose(1, 2), queries)
    grads = [x.transpose(0, 1).to(dtype) for x in (torch.cat(dq, 1), dk, dv)]
    return grads[0], grads[1], grads[2]
