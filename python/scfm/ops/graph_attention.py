"""Sparse gene attention: a token attends to its neighbours in a gene graph, to global tokens and to itself.

    out[i] = sum_j softmax_j(scale * <q[i], k[j]>) v[j],   j over the tokens that i sees

Exact, not an approximation of full attention: the graph says what is seen, and only those scores are ever computed.
Which tokens those are lies in a plan (see gene_graph.py) that all heads and layers share. Paths: our C++ kernels on
CPU; on a GPU CUDA over the plan's edges, or Triton over its 64 x 64 blocks; the formula in torch elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError
from scfm.ops import cuda_kernels, native, paths, triton_kernels
from scfm.ops.arguments import check_heads, wide
from scfm.ops.gene_graph import GraphPlan

_NAME = "graph_attention"
_EDGES_AT_ONCE = 1 << 16  # of the formula: 65,536 edges of 12 heads of 64 are 200 MB in float32

paths.register(
    _NAME,
    [
        paths.Path(
            "native", "scfm's C++ kernels", native.objection_unless("graph_forward", "graph_backward")
        ),
        paths.Path("cuda", "scfm's CUDA kernels, along the edges", cuda_kernels.objection),
        paths.Path("triton", "scfm's Triton kernels, block-sparse", triton_kernels.objection),
        paths.Path("torch", "the formula in torch", lambda tensor: None),
    ],
)


def graph_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: GraphPlan, *, scale: float | None = None
) -> Tensor:
    """Attention along the edges of a gene graph.

    q, k, v: (T, H, D) float32, float64, bfloat16 or float16; plan: ``GeneGraph.plan(token_ids, cu_seqlens)`` of the
    same T tokens. scale: default 1 / sqrt(D). Returns (T, H, D) in q's dtype; a token that sees nothing gives zeros.
    Raises InvalidArgumentError for shapes that do not fit.
    """
    check_heads(_NAME, q, k, v, same_rows=True)
    if plan.num_tokens != len(q) or plan.columns.device != q.device:
        raise InvalidArgumentError(
            f"the plan is of {plan.num_tokens} tokens on {plan.columns.device}, q of {len(q)} on {q.device}",
            where=_NAME,
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    parts = (plan.row_offsets, plan.columns, plan.col_offsets, plan.rows)
    out: Tensor = torch.ops.scfm.graph_attention(q, k, v, *parts, scale)[0]
    return out


def graph_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, plan: GraphPlan, *, scale: float | None = None
) -> Tensor:
    """The formula with a dense mask over the whole pack, in whatever dtype it is given."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    seen = plan.dense_mask()
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    p = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1).nan_to_num(0.0)
    return torch.einsum("hij,jhd->ihd", p, v)


@torch.library.custom_op("scfm::graph_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    col_offsets: Tensor,
    rows: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the natural log-sum-exp of every token's scores, (T, H), for the backward."""
    path = paths.choose(_NAME, q)
    if path == "native":
        from scfm import _native

        stored = [native.storable(x) for x in (q, k, v)]
        out, lse = stored[0].new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        arrays = [native.array(x) for x in (*stored, out, lse, row_offsets, columns)]
        native.with_torch_threads(_native.graph_forward, *arrays, scale)
        return out.to(q.dtype), lse
    if path == "cuda":
        return cuda_kernels.graph_forward(q, k, v, row_offsets, columns, scale)
    if path == "triton":
        from scfm.kernels import graph_attention as kernels

        plan = kernels.block_plan(row_offsets, columns)
        return kernels.forward(q, k, v, plan, scale)  # type: ignore[no-any-return]
    return _torch_forward(q, k, v, row_offsets, columns, scale)


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    col_offsets: Tensor,
    rows: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide(q.dtype))


@torch.library.custom_op("scfm::graph_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    col_offsets: Tensor,
    rows: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq by rows of the plan, dk and dv by its columns: every sum has one owner and one order."""
    path = paths.choose(_NAME, q)
    if path == "native":
        from scfm import _native

        stored = [native.storable(x) for x in (grad_out, q, k, v, out)]
        grads = [x.new_empty(x.shape) for x in stored[1:4]]
        plan = (row_offsets, columns, col_offsets, rows)
        arrays = [native.array(x) for x in (*stored, lse, *grads, *plan)]
        native.with_torch_threads(_native.graph_backward, *arrays, scale)
        dq, dk, dv = (x.to(q.dtype) for x in grads)
        return dq, dk, dv
    if path == "cuda":
        plan = (row_offsets, columns, col_offsets, rows)
        return cuda_kernels.graph_backward(grad_out, q, k, v, out, lse, plan, scale)
    if path == "triton":
        from scfm.kernels import graph_attention as kernels

        blocks = kernels.block_plan(row_offsets, columns)
        return kernels.backward(grad_out, q, k, v, out, lse, blocks, scale)  # type: ignore[no-any-return]
    return _torch_backward(grad_out, q, k, v, out, lse, row_offsets, columns, scale)


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    col_offsets: Tensor,
    rows: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])
    ctx.scale = scale  # type: ignore[attr-defined]


def _autograd(
    ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    scale = ctx.scale  # type: ignore[attr-defined]
    dq, dk, dv = torch.ops.scfm.graph_attention_backward(grad_out.contiguous(), *saved, scale)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)


# ---- the formula, some rows at a time ---------------------------------------------------------------------------


def _row_blocks(row_offsets: Tensor) -> list[tuple[int, int]]:
    """Consecutive rows of about _EDGES_AT_ONCE edges together."""
    offsets = row_offsets.tolist()
    blocks, start = [], 0
    for row in range(1, len(offsets)):
        if offsets[row] - offsets[start] >= _EDGES_AT_ONCE or row == len(offsets) - 1:
            blocks.append((start, row))
            start = row
    return blocks


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, row_offsets: Tensor, columns: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], -math.inf, dtype=wide(q.dtype))
    for begin, end in _row_blocks(row_offsets):
        row, column = _edges(row_offsets, columns, begin, end)
        queries, keys, values = (x.to(wide(x.dtype)) for x in (q[begin:end], k[column], v[column]))
        scores = (queries[row] * keys).sum(-1) * scale
        top = lse.new_full((end - begin, q.shape[1]), -math.inf)
        top = top.scatter_reduce(0, row[:, None].expand_as(scores), scores, "amax")
        weights = torch.exp(scores - top[row])
        total = torch.zeros_like(top).index_add_(0, row, weights)
        mixed = torch.zeros_like(queries).index_add_(0, row, weights.unsqueeze(-1) * values)
        seen = total > 0
        out[begin:end] = (mixed / total.where(seen, 1.0).unsqueeze(-1)).to(q.dtype)
        lse[begin:end] = torch.where(seen, top + torch.log(total), -math.inf)
    return out, lse


def _torch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    for begin, end in _row_blocks(row_offsets):
        row, column = _edges(row_offsets, columns, begin, end)
        row += begin
        queries, upstream, keys, values = (x.to(dtype) for x in (q[row], grad_out[row], k[column], v[column]))
        p = torch.exp((queries * keys).sum(-1) * scale - lse[row])
        ds = p * ((upstream * values).sum(-1) - delta[row]) * scale
        dq.index_add_(0, row, ds.unsqueeze(-1) * keys)
        dk.index_add_(0, column, ds.unsqueeze(-1) * queries)
        dv.index_add_(0, column, p.unsqueeze(-1) * upstream)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _edges(row_offsets: Tensor, columns: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """(row less ``begin``, column) of every edge of the rows from begin to end."""
    counts = row_offsets[begin : end + 1].diff()
    row = torch.repeat_interleave(torch.arange(end - begin, device=columns.device), counts)
    return row, columns[int(row_offsets[begin]) : int(row_offsets[end])].to(torch.int64)
