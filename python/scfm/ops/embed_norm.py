"""The sum of a token's embeddings and its LayerNorm, in one pass.

    x[t] = sum_n tables[n][ids[n][t]] + addend[t];   out[t] = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Gene, value, position, modality and batch tables are read once each and nothing between is written; the backward makes
x again. Gradients of a table are summed for each id over its tokens in their order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.errors import InvalidArgumentError
from scfm.ops import native, paths, triton_kernels
from scfm.ops.arguments import FLOATS, wide

_NAME = "embed_norm"

paths.register(
    _NAME,
    [
        paths.Path(
            "native",
            "scfm's C++ kernels",
            native.objection_unless("embed_norm_forward", "embed_norm_backward", max_last_dim=None),
        ),
        paths.Path(
            "triton",
            "scfm's Triton kernels",
            lambda tensor: triton_kernels.objection(tensor, max_last_dim=None),
        ),
        paths.Path("torch", "torch's embeddings and layer_norm", lambda tensor: None),
    ],
)


def embed_norm(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    addend: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Embeddings of T tokens, summed and normalised.

    ids: int32 or int64 (T,) each, one for every table; tables: (V_n, M), of one floating dtype; addend: (T, M) of the
    same dtype, such as the projection of a continuous value; weight, bias: (M,), or None both for the plain sum.
    Statistics are float32 (float64 of float64). Returns (T, M) in the tables' dtype. Raises InvalidArgumentError for
    shapes or dtypes that do not fit, and on CPU for ids outside a table (on a GPU that would wait for the device).
    """
    _check(ids, tables, weight, bias, addend)
    out: Tensor = torch.ops.scfm.embed_norm(list(ids), list(tables), addend, weight, bias, eps)[0]
    return out


def embed_norm_reference(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    addend: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """The formula, in whatever dtype it is given."""
    x = torch.stack([table[index.long()] for index, table in zip(ids, tables, strict=True)]).sum(0)
    x = x if addend is None else x + addend
    if weight is None or bias is None:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


@torch.library.custom_op("scfm::embed_norm", mutates_args=())
def _forward(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and mean and 1 / sqrt(var + eps) of every token, (T,), for the backward."""
    path = paths.choose(_NAME, tables[0])
    if path == "triton":
        from scfm.kernels import embed_norm as kernels

        return kernels.forward(ids, tables, addend, weight, bias, eps)  # type: ignore[no-any-return]
    _check_ids(ids, tables)
    if path == "native":
        return _native_forward(ids, tables, addend, weight, bias, eps)
    x = _summed(ids, tables, addend)
    if weight is None or bias is None:
        return x.to(tables[0].dtype), x.new_zeros(len(x)), x.new_zeros(len(x))
    out, mean, rstd = torch.native_layer_norm(x, [x.shape[1]], weight.to(x.dtype), bias.to(x.dtype), eps)
    return out.to(tables[0].dtype), mean[:, 0], rstd[:, 0]


@_forward.register_fake
def _forward_fake(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = ids[0].shape[0], tables[0].dtype
    each = tables[0].new_empty(rows, dtype=wide(dtype))
    return tables[0].new_empty(rows, tables[0].shape[1]), each, torch.empty_like(each)


@torch.library.custom_op("scfm::embed_norm_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> list[Tensor]:
    """Gradients of the tables, then of addend, weight and bias where they are given."""
    path = paths.choose(_NAME, tables[0])
    if path == "native":
        grads = _native_backward(grad_out, ids, tables, addend, weight, mean, rstd)
    elif path == "triton":
        from scfm.kernels import embed_norm as kernels

        grad_tables, *rest = kernels.backward(grad_out, ids, tables, addend, weight, mean, rstd)
        grads = [*grad_tables, *(x for x in rest if x is not None)]
    else:
        grads = _torch_backward(grad_out, ids, tables, addend, weight, mean, rstd)
    return [x.to(tables[0].dtype) for x in grads]


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> list[Tensor]:
    like = [*tables, *([] if addend is None else [addend]), *([] if weight is None else [weight, weight])]
    return [x.new_empty(x.shape) for x in like]


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None, Tensor | None, Tensor | None, float],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    ids, tables, addend, weight, _, _ = inputs
    ctx.save_for_backward(*ids, *tables, addend, weight, *output[1:])  # type: ignore[arg-type]
    ctx.mark_non_differentiable(*output[1:])
    ctx.count = len(tables)  # type: ignore[attr-defined]


def _autograd(
    ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor, *_: Tensor | None
) -> tuple[list[None], list[Tensor], Tensor | None, Tensor | None, Tensor | None, None]:
    saved, count = ctx.saved_tensors, ctx.count  # type: ignore[attr-defined]
    ids, tables = list(saved[:count]), list(saved[count : 2 * count])
    addend, weight, mean, rstd = saved[2 * count :]
    grads = torch.ops.scfm.embed_norm_backward(grad_out.contiguous(), ids, tables, addend, weight, mean, rstd)
    rest = list(grads[count:])
    d_addend = rest.pop(0) if addend is not None else None
    d_weight, d_bias = rest if weight is not None else (None, None)
    return [None] * count, list(grads[:count]), d_addend, d_weight, d_bias, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)


# ---- our C++ kernels --------------------------------------------------------------------------------------------


def _native_forward(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from scfm import _native

    stored = [native.storable(x) for x in tables]
    num_tokens, size = len(ids[0]), tables[0].shape[1]
    out = stored[0].new_empty(num_tokens, size)
    mean, rstd = (out.new_zeros(num_tokens, dtype=torch.float32) for _ in range(2))
    native.with_torch_threads(
        _native.embed_norm_forward,
        [native.array(x.contiguous()) for x in ids],
        [native.array(x.contiguous()) for x in stored],
        _optional(addend),
        _optional(weight, torch.float32),
        _optional(bias, torch.float32),
        native.array(out),
        native.array(mean),
        native.array(rstd),
        eps,
    )
    return out.to(tables[0].dtype), mean, rstd


def _native_backward(
    grad_out: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> list[Tensor]:
    from scfm import _native

    stored = [native.storable(x) for x in tables]
    grad_tables = [x.new_empty(x.shape, dtype=torch.float32) for x in stored]
    grad_addend = None if addend is None else native.storable(addend).new_empty(addend.shape)
    grads = [] if weight is None else [weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2)]
    native.with_torch_threads(
        _native.embed_norm_backward,
        native.array(native.storable(grad_out).contiguous()),
        [native.array(x.contiguous()) for x in ids],
        [native.array(x.contiguous()) for x in stored],
        _optional(addend),
        _optional(weight, torch.float32),
        native.array(mean),
        native.array(rstd),
        [native.array(x) for x in grad_tables],
        _optional(grad_addend),
        *([native.array(x) for x in grads] or (None, None)),
    )
    return [*grad_tables, *([] if grad_addend is None else [grad_addend]), *grads]


def _optional(tensor: Tensor | None, dtype: torch.dtype | None = None) -> native.Array | None:
    if tensor is None:
        return None
    return native.array(native.storable(tensor if dtype is None else tensor.to(dtype)).contiguous())


# ---- torch ------------------------------------------------------------------------------------------------------


def _summed(ids: Sequence[Tensor], tables: Sequence[Tensor], addend: Tensor | None) -> Tensor:
    dtype = wide(tables[0].dtype)
    x = F.embedding(ids[0], tables[0]).to(dtype)
    for index, table in zip(ids[1:], tables[1:], strict=True):
        x = x + F.embedding(index, table)
    return x if addend is None else x + addend


def _torch_backward(
    grad_out: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    addend: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> list[Tensor]:
    dx = grad_out.to(mean.dtype, copy=True)
    rest = []
    if weight is not None:
        centred = _summed(ids, tables, addend) - mean[:, None]
        normed = centred * rstd[:, None]
        rest = [(dx * normed).sum(0), dx.sum(0)]
        dy = dx * weight.to(dx.dtype)
        dx = dy - dy.mean(-1, keepdim=True) - normed * (dy * normed).mean(-1, keepdim=True)
        dx = dx * rstd[:, None]
    grads = [
        torch.ops.aten.embedding_dense_backward(
            dx, index, len(table), -1, False
        )  # sorts: no atomics on any device
        for index, table in zip(ids, tables, strict=True)
    ]
    return [*grads, *([] if addend is None else [dx]), *rest]


# ---- checks -----------------------------------------------------------------------------------------------------


def _check(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
) -> None:
    if not len(ids) == len(tables) >= 1:
        raise InvalidArgumentError(
            f"{len(ids)} ids and {len(tables)} tables; expected one for each", where=_NAME
        )
    rows, size, dtype = ids[0].numel(), tables[0].shape[-1], tables[0].dtype
    for index, table in zip(ids, tables, strict=True):
        if index.shape != (rows,) or index.dtype not in (torch.int32, torch.int64):
            raise InvalidArgumentError(
                f"ids {index.dtype} {tuple(index.shape)}; expected int32 or int64 ({rows},)", where=_NAME
            )
        if table.dim() != 2 or table.shape[1] != size or table.dtype != dtype or dtype not in FLOATS:
            raise InvalidArgumentError(
                f"a table is {table.dtype} {tuple(table.shape)}; expected (V, {size}), {dtype} as the first",
                where=_NAME,
            )
    if (weight is None) != (bias is None):
        raise InvalidArgumentError("weight and bias are given together or not at all", where=_NAME)
    for name, tensor, shape in (
        ("weight", weight, (size,)),
        ("bias", bias, (size,)),
        ("addend", addend, (rows, size)),
    ):
        if tensor is not None and (tensor.shape != shape or (name == "addend" and tensor.dtype != dtype)):
            raise InvalidArgumentError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape}", where=_NAME
            )


def _check_ids(ids: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    for number, (index, table) in enumerate(zip(ids, tables, strict=True)):
        if index.device.type != "cpu" or not index.numel():
            continue
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= len(table):
            raise InvalidArgumentError(
                f"ids[{number}] run from {low} to {high}; table {number} has rows 0 to {len(table) - 1}",
                where=_NAME,
            )
