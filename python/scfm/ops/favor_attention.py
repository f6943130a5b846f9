"""Performer's FAVOR+ attention: softmax attention through random positive features, linear in the cell's length.

    a_q = (c q) W^T,  a_k = (c k) W^T,  c = D^(-1/4);   n(x) = |c x|^2 / 2
    q' = exp(a_q - n(q) - max_f a_q) + eps;   k' = exp(a_k - n(k) - M) + eps
    out_i = (q'_i . sum_j k'_j v_j^T) / (q'_i . sum_j k'_j)

M is the largest a_k over all heads, tokens and features of the cell: with it a cell does not depend on its batch. The
released scBERT and scFoundation code takes it over the whole batch, which kmax_scope="batch" reproduces. Keys are
streamed once with a running maximum (the eps part is separable, so the merge is exact) and feature maps never lie in
memory. Source: Choromanski et al. 2021, in the form of scBERT's released code.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError
from scfm.ops import native, paths, triton_kernels
from scfm.ops.arguments import check_heads, check_offsets, wide

_NAME = "favor_attention"
EPS = 1e-4
_TOKENS_AT_ONCE = 2048

paths.register(
    _NAME,
    [
        paths.Path(
            "native", "scfm's C++ kernels", native.objection_unless("favor_forward", "favor_backward")
        ),
        paths.Path("triton", "scfm's Triton kernels", triton_kernels.objection),
        paths.Path("torch", "the formula in torch, cell by cell", lambda tensor: None),
    ],
)


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    *,
    kmax_scope: Literal["cell", "batch"] = "cell",
    eps: float = EPS,
) -> Tensor:
    """FAVOR+ attention inside each packed cell.

    q, k, v: (T, H, D) float32, float64, bfloat16 or float16; projection W: (F, D), shared by the heads, not trained;
    cu_seqlens: int32 (C + 1,). kmax_scope: "cell", or "batch" for the released code's dependence on the batch.
    Returns (T, H, D) in q's dtype. Gradients flow through both maxima, as in the released code.
    Raises InvalidArgumentError for shapes or offsets that do not fit.
    """
    check_heads(_NAME, q, k, v, same_rows=True)
    check_offsets(_NAME, "cu_seqlens", cu_seqlens, len(k), q.device)
    if projection.dim() != 2 or projection.shape[1] != q.shape[2] or projection.requires_grad:
        raise InvalidArgumentError(
            f"projection is {tuple(projection.shape)}{', requiring a gradient' if projection.requires_grad else ''}; "
            f"expected (features, {q.shape[2]}), a buffer",
            where=_NAME,
        )
    if kmax_scope not in ("cell", "batch"):
        raise InvalidArgumentError(
            f'{kmax_scope!r}; expected "cell" or "batch"', where=f"{_NAME}: kmax_scope"
        )
    projection = projection.to(wide(q.dtype)).contiguous()
    shared = None
    if kmax_scope == "batch" and len(k):
        shared = _batch_key_max(k, projection).expand(cu_seqlens.numel() - 1).contiguous()
    out: Tensor = torch.ops.scfm.favor_attention(q, k, v, projection, cu_seqlens, shared, eps)[0]
    return out


def favor_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    *,
    kmax_scope: Literal["cell", "batch"] = "cell",
    eps: float = EPS,
) -> Tensor:
    """The formula with its feature maps, one cell at a time, in whatever dtype it is given."""
    c = q.shape[-1] ** -0.25
    shared = (c * k @ projection.T).amax() if kmax_scope == "batch" and len(k) else None
    out = torch.zeros_like(q)
    for rows in (cell for cell in _cells(cu_seqlens) if cell.start < cell.stop):
        a_q, a_k = (c * x[rows] @ projection.T for x in (q, k))
        n_q, n_k = ((c * x[rows]).square().sum(-1, keepdim=True) / 2 for x in (q, k))
        q_features = torch.exp(a_q - n_q - a_q.amax(-1, keepdim=True)) + eps
        k_features = torch.exp(a_k - n_k - (a_k.amax() if shared is None else shared)) + eps
        context = torch.einsum("jhf,jhd->hfd", k_features, v[rows])
        norm = torch.einsum("ihf,hf->ih", q_features, k_features.sum(0))
        out[rows] = torch.einsum("ihf,hfd->ihd", q_features, context) / norm.unsqueeze(-1)
    return out


@torch.library.custom_op("scfm::favor_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_max: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the maximum that each cell's keys were taken relative to, (C,)."""
    path = paths.choose(_NAME, q)
    if path == "native":
        from scfm import _native

        stored = [native.storable(x) for x in (q, k, v)]
        out = stored[0].new_empty(q.shape)
        used = q.new_empty(cu_seqlens.numel() - 1, dtype=torch.float32)
        if key_max is not None:
            used.copy_(key_max)
        arrays = [native.array(x) for x in (*stored, projection, out, used)]
        native.with_torch_threads(
            _native.favor_forward, *arrays, key_max is not None, native.array(cu_seqlens), eps
        )
        return out.to(q.dtype), used
    if path == "triton":
        from scfm.kernels import favor_attention as kernels

        return kernels.forward(q, k, v, projection, cu_seqlens, key_max, eps)[:2]  # type: ignore[no-any-return]
    return _torch_forward(q, k, v, projection, cu_seqlens, key_max, eps)


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_max: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(cu_seqlens.shape[0] - 1, dtype=wide(q.dtype))


@torch.library.custom_op("scfm::favor_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_max: Tensor,
    given: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of each cell's key maximum, which is already in dk unless it was given."""
    path = paths.choose(_NAME, q)
    if path == "native":
        from scfm import _native

        stored = [native.storable(x) for x in (grad_out, q, k, v)]
        grads = [x.new_empty(x.shape) for x in stored[1:]]
        max_grad = torch.empty_like(key_max)
        arrays = [native.array(x) for x in (*stored, projection, *grads, key_max)]
        ends = [native.array(x) for x in (max_grad, cu_seqlens)]
        native.with_torch_threads(_native.favor_backward, *arrays, given, *ends, eps)
        dq, dk, dv = (x.to(q.dtype) for x in grads)
        return dq, dk, dv, max_grad
    if path == "triton":
        from scfm.kernels import favor_attention as kernels

        return kernels.backward(  # type: ignore[no-any-return]
            grad_out, q, k, v, projection, cu_seqlens, key_max, given, eps
        )
    return _torch_backward(grad_out, q, k, v, projection, cu_seqlens, key_max, given, eps)


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_max: Tensor,
    given: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(key_max)


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, projection, cu_seqlens, key_max, eps = inputs
    ctx.save_for_backward(q, k, v, projection, cu_seqlens, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.given, ctx.eps = key_max is not None, eps  # type: ignore[attr-defined]


def _autograd(
    ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    given, eps = ctx.given, ctx.eps  # type: ignore[attr-defined]
    dq, dk, dv, max_grad = torch.ops.scfm.favor_attention_backward(grad_out.contiguous(), *saved, given, eps)
    return dq, dk, dv, None, None, max_grad if given else None, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)


# ---- the formula, with feature maps of one cell in memory -------------------------------------------------------


def _torch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_max: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(q.shape)
    used = q.new_full((cu_seqlens.numel() - 1,), -torch.inf, dtype=wide(q.dtype))
    if key_max is not None:
        used.copy_(key_max)
    for cell, rows in enumerate(_cells(cu_seqlens)):
        if rows.start == rows.stop:
            continue
        queries, keys, values = _heads(q, rows), _heads(k, rows), _heads(v, rows)
        if key_max is None:
            used[cell] = _projected(keys, projection).amax()
        q_exp, _ = _query_exponentials(queries, projection)
        q_features, k_features = q_exp + eps, _key_exponentials(keys, projection, used[cell]) + eps
        context, total = k_features.transpose(1, 2) @ values, k_features.sum(1)
        norm = q_features @ total.unsqueeze(-1)
        out[rows] = (q_features @ context / norm).transpose(0, 1).to(q.dtype)
    return out, used


def _torch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_max: Tensor,
    given: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    max_grad = torch.zeros_like(key_max)
    c = q.shape[-1] ** -0.25
    for cell, rows in enumerate(_cells(cu_seqlens)):
        if rows.start == rows.stop:
            continue
        upstream, queries, keys, values = (_heads(x, rows) for x in (grad_out, q, k, v))
        q_exp, top = _query_exponentials(queries, projection)
        k_exp = _key_exponentials(keys, projection, key_max[cell])
        q_features, k_features = q_exp + eps, k_exp + eps
        context, total = k_features.transpose(1, 2) @ values, k_features.sum(1).unsqueeze(-1)
        norm = q_features @ total
        d_mixed = upstream / norm
        d_norm = -(d_mixed * (q_features @ context / norm)).sum(-1, keepdim=True)
        d_context, d_total = q_features.transpose(1, 2) @ d_mixed, q_features.transpose(1, 2) @ d_norm
        d_aq = q_exp * (d_mixed @ context.transpose(1, 2) + d_norm @ total.transpose(1, 2))
        d_ak = k_exp * (values @ d_context.transpose(1, 2) + d_total.transpose(1, 2))
        d_nq, d_nk = -d_aq.sum(-1, keepdim=True), -d_ak.sum(-1, keepdim=True)
        d_aq.scatter_add_(-1, top, d_nq)  # the query's maximum has the gradient of its norm
        max_grad[cell] = d_nk.sum()
        if not given:
            _add_at_first_maximum(d_ak, _projected(keys, projection), d_nk.sum())
        dq[rows] = (c * (d_aq @ projection) + c * c * d_nq * queries).transpose(0, 1).to(q.dtype)
        dk[rows] = (c * (d_ak @ projection) + c * c * d_nk * keys).transpose(0, 1).to(q.dtype)
        dv[rows] = (k_features @ d_context).transpose(0, 1).to(q.dtype)
    return dq, dk, dv, max_grad


def _heads(x: Tensor, rows: slice) -> Tensor:
    """(L, H, D) of a cell as (H, L, D), in the dtype it is computed in."""
    return x[rows].to(wide(x.dtype)).transpose(0, 1)


def _projected(x: Tensor, projection: Tensor) -> Tensor:
    scaled: Tensor = x.shape[-1] ** -0.25 * x
    return scaled @ projection.T


def _query_exponentials(queries: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """exp(a_q - n(q) - max_f a_q), (H, L, F), and where each maximum is, (H, L, 1)."""
    a = _projected(queries, projection)
    top, where = a.max(-1, keepdim=True)
    return torch.exp(a - _half_norm(queries) - top), where


def _key_exponentials(keys: Tensor, projection: Tensor, key_max: Tensor) -> Tensor:
    features: Tensor = torch.exp(_projected(keys, projection) - _half_norm(keys) - key_max)
    return features


def _half_norm(x: Tensor) -> Tensor:
    halved: Tensor = x.square().sum(-1, keepdim=True) * (x.shape[-1] ** -0.5 / 2)
    return halved


def _add_at_first_maximum(d_ak: Tensor, a_k: Tensor, amount: Tensor) -> None:
    """Add to the gradient of the largest a_k, (H, L, F); of equals the lowest token, then head, then feature."""
    by_token = a_k.transpose(0, 1)
    place = int(by_token.reshape(-1).argmax())
    token, rest = divmod(place, by_token.shape[1] * by_token.shape[2])
    head, feature = divmod(rest, by_token.shape[2])
    d_ak[head, token, feature] += amount


def _batch_key_max(k: Tensor, projection: Tensor) -> Tensor:
    """The largest a_k of the whole batch, 0-d, differentiable through the one product it comes from."""
    place = torch.ops.scfm.favor_largest_product(k, projection).reshape(1)
    # An index of no dimensions would be fetched from a GPU; one of one dimension is read there.
    row = k.flatten(0, 1).index_select(0, place // len(projection)).to(projection.dtype)
    products = _projected(row, projection)[0]
    return products.index_select(0, place % len(projection))[0]


@torch.library.custom_op("scfm::favor_largest_product", mutates_args=())
def _largest_product(k: Tensor, projection: Tensor) -> Tensor:
    """Where the largest a_k is: an int64 index into (T, H, F), some tokens at a time, without waiting for a GPU."""
    best = projection.new_full((), -torch.inf)
    place = torch.zeros((), dtype=torch.int64, device=k.device)
    for start in range(0, len(k), _TOKENS_AT_ONCE):
        products = _projected(k[start : start + _TOKENS_AT_ONCE].to(projection.dtype), projection)
        value, flat = products.flatten().max(0)
        larger = value > best
        best = torch.where(larger, value, best)
        place = torch.where(larger, flat + start * k.shape[1] * len(projection), place)
    return place


@_largest_product.register_fake
def _largest_product_fake(k: Tensor, projection: Tensor) -> Tensor:
    return k.new_empty((), dtype=torch.int64)


def _cells(cu_seqlens: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist())]
