"""Full bidirectional attention inside each packed cell.

    out[i] = sum_j softmax_j(scale * <q[i], k[j]>) v[j],   j over the tokens of i's cell

Cells never see each other, so no padding and no mask exists anywhere. Each cell is one call of torch's fused
attention, whose row statistics are kept for the backward; bfloat16 on CPU is widened to float32 first, which is
both faster and more accurate there than torch's bfloat16 kernel. A cell's result depends on its own tokens only,
bit for bit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.errors import InvalidArgumentError

_QUERY_BLOCK = 256  # of the backward: 12 heads x 256 x 2,048 probabilities are 25 MB in float32


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

    q, k, v: (T, H, D) float32, float64 or bfloat16; cu_seqlens: int32 (C + 1,). ``cu_seqlens_q`` packs the
    queries by their own offsets (one query a cell, for instance); default: the keys' offsets.
    scale: default 1 / sqrt(D). Returns (Tq, H, D) in q's dtype. A cell without keys gives zeros.
    Raises InvalidArgumentError for shapes or offsets that do not fit.
    """
    offsets_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    _check(q, k, v, cu_seqlens, offsets_q)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
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
    for q_rows, kv_rows in _cells(cu_seqlens, offsets_q):
        scores = torch.einsum("ihd,jhd->hij", q[q_rows], k[kv_rows]) * scale
        out[q_rows] = torch.einsum("hij,jhd->ihd", torch.softmax(scores, dim=-1), v[kv_rows])
    return out


@torch.library.custom_op("scfm::varlen_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and log-sum-exp of every query's scores, (Tq, H), for the backward."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(q.shape[:2], dtype=_wide(q.dtype))
    for q_rows, kv_rows in _cells(cu_seqlens, cu_seqlens_q):
        out[q_rows], lse[q_rows] = _attend_cell(q[q_rows], k[kv_rows], v[kv_rows], scale)
    return out, lse


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=_wide(q.dtype))


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
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for q_rows, kv_rows in _cells(cu_seqlens, cu_seqlens_q):
        cell = (grad_out[q_rows], q[q_rows], k[kv_rows], v[kv_rows], out[q_rows], lse[q_rows])
        dq[q_rows], dk[kv_rows], dv[kv_rows] = _cell_gradients(*cell, scale)
    return dq, dk, dv


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
    empty = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return empty[0], empty[1], empty[2]


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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _attend_cell(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One cell: (Lq, H, D), (L, H, D), (L, H, D) -> output (Lq, H, D) in q's dtype, log-sum-exp (Lq, H)."""
    if q.device.type == "cpu":
        heads = [x.to(_wide(x.dtype)).transpose(0, 1)[None] for x in (q, k, v)]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=scale)
        return out[0].transpose(0, 1).to(q.dtype), lse[0].T
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)[0].transpose(0, 1)
    return out, q.new_zeros(q.shape[:2], dtype=_wide(q.dtype))


def _cell_gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One cell's dq, dk, dv, (L, H, D) each."""
    if q.device.type != "cpu":
        return _gradients_by_formula(grad_out, q, k, v, scale)
    heads = [x.to(_wide(x.dtype)).transpose(0, 1)[None] for x in (grad_out, q, k, v, out)]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads, lse.T[None].contiguous(), 0.0, False, scale=scale
    )
    dq, dk, dv = (x[0].transpose(0, 1).to(q.dtype) for x in grads)
    return dq, dk, dv


def _gradients_by_formula(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """P = softmax(scale q k^T);  dv = P^T do;  dS = P (do v^T - rowsum(P * (do v^T)));

    dq = scale dS k;  dk = scale dS^T q;  a block of queries at a time.
    """
    dtype = q.dtype
    grad_out, q, k, v = (x.to(_wide(dtype)).transpose(0, 1) for x in (grad_out, q, k, v))
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


def _cells(cu_seqlens: Tensor, cu_seqlens_q: Tensor) -> list[tuple[slice, slice]]:
    """(query rows, key rows) of every cell that has both."""
    keys, queries = cu_seqlens.tolist(), cu_seqlens_q.tolist()
    return [
        (slice(queries[c], queries[c + 1]), slice(keys[c], keys[c + 1]))
        for c in range(len(keys) - 1)
        if keys[c] < keys[c + 1] and queries[c] < queries[c + 1]
    ]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor) -> None:
    if q.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise InvalidArgumentError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected (T, H, D) each, "
            "k and v equal, H and D the same in all",
            where="varlen_attention",
        )
    if not q.dtype == k.dtype == v.dtype:
        raise InvalidArgumentError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype} differ", where="varlen_attention")
    if cu_seqlens.shape != cu_seqlens_q.shape or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise InvalidArgumentError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} and cu_seqlens_q {tuple(cu_seqlens_q.shape)} must be "
            "1-D and equally long",
            where="varlen_attention",
        )
    if torch.compiler.is_compiling():
        return
    for name, offsets, tokens in (("cu_seqlens", cu_seqlens, len(k)), ("cu_seqlens_q", cu_seqlens_q, len(q))):
        if int(offsets[0]) != 0 or int(offsets[-1]) != tokens or bool((offsets.diff() < 0).any()):
            raise InvalidArgumentError(
                f"{name} must rise from 0 to {tokens}, found {offsets[0]} to {offsets[-1]}",
                where="varlen_attention",
            )
