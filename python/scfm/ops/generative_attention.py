"""scGPT's mask for generation: known genes see known genes; an unknown gene sees the known ones and itself.

    out[i] = sum_j softmax_j(scale * <q[i], k[j]>) v[j],   j over known(cell of i), and i itself where i is unknown

In each cell the known tokens come first. An unknown token's own key is one score more, kept apart: nothing of size
unknown x unknown is ever formed, and the cost is that of (tokens x known). Source: the released scGPT pretraining
code, whose dense masks this equals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError
from scfm.ops import native, paths, triton_kernels
from scfm.ops.arguments import check_heads, check_offsets, wide

_NAME = "generative_attention"

paths.register(
    _NAME,
    [
        paths.Path(
            "native", "scfm's C++ kernels", native.objection_unless("varlen_forward", "varlen_backward")
        ),
        paths.Path("triton", "scfm's Triton kernels", triton_kernels.objection),
        paths.Path("torch", "the formula in torch, cell by cell", lambda tensor: None),
    ],
)


def generative_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, num_known: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention of packed cells whose first ``num_known`` tokens are known and whose others are to be generated.

    q, k, v: (T, H, D) float32, float64, bfloat16 or float16; cu_seqlens: int32 (C + 1,); num_known: int32 (C,),
    0 to the cell's length. scale: default 1 / sqrt(D). Returns (T, H, D) in q's dtype.
    Raises InvalidArgumentError for shapes, offsets or counts that do not fit.
    """
    check_heads(_NAME, q, k, v, same_rows=True)
    check_offsets(_NAME, "cu_seqlens", cu_seqlens, len(k), q.device)
    _check_known(num_known, cu_seqlens)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out: Tensor = torch.ops.scfm.generative_attention(q, k, v, cu_seqlens, num_known, scale)[0]
    return out


def generative_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, num_known: Tensor, *, scale: float | None = None
) -> Tensor:
    """The same with the dense mask written out, one cell at a time, in whatever dtype it is given."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.zeros_like(q)
    for rows, known in _cells(cu_seqlens, num_known):
        length = rows.stop - rows.start
        seen = torch.eye(length, dtype=torch.bool, device=q.device)
        seen[:known, :known] = True
        seen[known:, :known] = True
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) * scale
        p = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
        out[rows] = torch.einsum("hij,jhd->ihd", p, v[rows])
    return out


@torch.library.custom_op("scfm::generative_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, num_known: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the natural log-sum-exp of every query's scores, (T, H), for the backward."""
    path = paths.choose(_NAME, q)
    if path == "native":
        from scfm import _native

        stored = [native.storable(x) for x in (q, k, v)]
        out, lse = stored[0].new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        arrays = [native.array(x) for x in (*stored, out, lse, cu_seqlens, cu_seqlens, num_known)]
        native.with_torch_threads(_native.varlen_forward, *arrays, scale)
        return out.to(q.dtype), lse
    if path == "triton":
        from scfm.kernels import generative_attention as kernels

        return kernels.forward(q, k, v, cu_seqlens, num_known, scale)  # type: ignore[no-any-return]
    return _torch_forward(q, k, v, cu_seqlens, num_known, scale)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, num_known: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide(q.dtype))


@torch.library.custom_op("scfm::generative_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    num_known: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities are made again from the scores and ``lse``."""
    path = paths.choose(_NAME, q)
    if path == "native":
        from scfm import _native

        stored = [native.storable(x) for x in (grad_out, q, k, v, out)]
        grads = [x.new_empty(x.shape) for x in stored[1:4]]
        arrays = [native.array(x) for x in (*stored, lse, *grads, cu_seqlens, cu_seqlens, num_known)]
        native.with_torch_threads(_native.varlen_backward, *arrays, scale)
        dq, dk, dv = (x.to(q.dtype) for x in grads)
        return dq, dk, dv
    if path == "triton":
        from scfm.kernels import generative_attention as kernels

        return kernels.backward(  # type: ignore[no-any-return]
            grad_out, q, k, v, out, lse, cu_seqlens, num_known, scale
        )
    return _torch_backward(grad_out, q, k, v, lse, cu_seqlens, num_known, scale)


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    num_known: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, cu_seqlens, num_known, scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, num_known)
    ctx.mark_non_differentiable(output[1])
    ctx.scale = scale  # type: ignore[attr-defined]


def _autograd(
    ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    scale = ctx.scale  # type: ignore[attr-defined]
    dq, dk, dv = torch.ops.scfm.generative_attention_backward(grad_out.contiguous(), *saved, scale)
    return dq, dk, dv, None, None, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)


# ---- torch ------------------------------------------------------------------------------------------------------


def _cell_heads(x: Tensor, rows: slice) -> Tensor:
    """(L, H, D) of a cell as (H, L, D), in the dtype it is computed in."""
    return x[rows].to(wide(x.dtype)).transpose(0, 1)


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, num_known: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], -math.inf, dtype=wide(q.dtype))
    for rows, known in _cells(cu_seqlens, num_known):
        queries, keys, values = (_cell_heads(x, rows) for x in (q, k, v))
        scores = torch.matmul(queries, keys[:, :known].transpose(1, 2)) * scale
        own = _own_scores(queries, keys, known, scale)
        total = torch.logsumexp(torch.cat([scores, own.unsqueeze(-1)], dim=-1), dim=-1)
        mixed = torch.matmul(torch.exp(scores - total.unsqueeze(-1)), values[:, :known])
        mixed += torch.exp(own - total).unsqueeze(-1) * values
        out[rows], lse[rows] = mixed.transpose(0, 1).to(q.dtype), total.T
    return out, lse


def _torch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    num_known: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows, known in _cells(cu_seqlens, num_known):
        upstream, queries, keys, values = (_cell_heads(x, rows) for x in (grad_out, q, k, v))
        total = lse[rows].T.unsqueeze(-1)
        p = torch.exp(torch.matmul(queries, keys[:, :known].transpose(1, 2)) * scale - total)
        p_own = torch.exp(_own_scores(queries, keys, known, scale).unsqueeze(-1) - total)
        dp = torch.matmul(upstream, values[:, :known].transpose(1, 2))
        dp_own = (upstream * values).sum(-1, keepdim=True)
        delta = (p * dp).sum(-1, keepdim=True) + p_own * dp_own
        ds, ds_own = p * (dp - delta) * scale, p_own * (dp_own - delta) * scale
        grads = [torch.matmul(ds, keys[:, :known]) + ds_own * keys, ds_own * queries, p_own * upstream]
        grads[1][:, :known] += torch.matmul(ds.transpose(1, 2), queries)
        grads[2][:, :known] += torch.matmul(p.transpose(1, 2), upstream)
        dq[rows], dk[rows], dv[rows] = (x.transpose(0, 1).to(q.dtype) for x in grads)
    return dq, dk, dv


def _own_scores(queries: Tensor, keys: Tensor, known: int, scale: float) -> Tensor:
    """Each token's score of its own key, (H, L); -infinity for the known, whose key is among the others."""
    own = (queries * keys).sum(-1) * scale
    own[:, :known] = -math.inf
    return own


def _cells(cu_seqlens: Tensor, num_known: Tensor) -> list[tuple[slice, int]]:
    """(rows, number of known tokens) of every cell that has tokens."""
    bounds, known = cu_seqlens.tolist(), num_known.tolist()
    return [
        (slice(bounds[c], bounds[c + 1]), known[c]) for c in range(len(known)) if bounds[c] < bounds[c + 1]
    ]


def _check_known(num_known: Tensor, cu_seqlens: Tensor) -> None:
    if num_known.dtype != torch.int32 or num_known.shape != (cu_seqlens.numel() - 1,):
        raise InvalidArgumentError(
            f"num_known is {num_known.dtype} {tuple(num_known.shape)}; expected torch.int32 "
            f"({cu_seqlens.numel() - 1},), one a cell",
            where=_NAME,
        )
    if num_known.device != cu_seqlens.device:
        raise InvalidArgumentError(
            f"num_known is on {num_known.device}, cu_seqlens on {cu_seqlens.device}", where=_NAME
        )
    if torch.compiler.is_compiling():
        return
    wrong = (num_known < 0) | (num_known > cu_seqlens.diff())
    if bool(wrong.any()):
        cell = int(wrong.nonzero()[0])
        raise InvalidArgumentError(
            f"num_known[{cell}] = {int(num_known[cell])}; the cell has {int(cu_seqlens.diff()[cell])} tokens",
            where=_NAME,
        )
