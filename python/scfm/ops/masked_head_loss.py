"""Projection to the vocabulary and cross-entropy, on the masked rows only.

    loss[n] = logsumexp_v(<h[n], w[v]> + b[v]) - (<h[n], w[t[n]]> + b[t[n]])

Of a vocabulary of 20,275 genes the logits of 10,000 masked tokens are 811 MB in float32: they are made some rows at
a time on CPU, some genes at a time inside the Triton kernel, and made again in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError
from scfm.ops import paths, triton_kernels
from scfm.ops.arguments import FLOATS, wide
from scfm.ops.products import fast_float32, row_stable_linear

_NAME = "masked_head_loss"
_LOGITS_AT_ONCE = 1 << 22  # 16 MB in float32

paths.register(
    _NAME,
    [
        paths.Path(
            "triton",
            "scfm's Triton kernels",
            lambda tensor: triton_kernels.objection(tensor, max_last_dim=None),
        ),
        paths.Path("torch", "torch's products, a block of rows at a time", lambda tensor: None),
    ],
)


def masked_head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy of every row, in nats, float32 (N,) (float64 of float64).

    hidden: (N, M), the rows of masked tokens; weight: (V, M) and bias: (V,) or None, of one floating dtype; targets:
    int32 or int64 (N,), 0 to V - 1. Raises InvalidArgumentError for shapes, dtypes or targets that do not fit.
    """
    _check(hidden, weight, bias, targets)
    losses: Tensor = torch.ops.scfm.masked_head_loss(hidden, weight, bias, targets.to(torch.int64))[0]
    return losses


def masked_head_loss_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """The formula with all logits in memory, in whatever dtype it is given."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return torch.logsumexp(logits, dim=1) - logits.gather(1, targets[:, None])[:, 0]


@torch.library.custom_op("scfm::masked_head_loss", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, and the log-sum-exp of every row's logits, (N,), for the backward."""
    if paths.choose(_NAME, hidden) == "triton":
        from scfm.kernels import masked_head as kernels

        return kernels.forward(hidden, weight, bias, targets)  # type: ignore[no-any-return]
    _check_targets(targets, len(weight))
    losses, lse = (hidden.new_empty(len(hidden), dtype=wide(hidden.dtype)) for _ in range(2))
    for rows in _row_blocks(len(hidden), len(weight)):
        logits = row_stable_linear(hidden[rows], weight, bias).to(losses.dtype)
        lse[rows] = torch.logsumexp(logits, dim=1)
        losses[rows] = lse[rows] - logits.gather(1, targets[rows, None])[:, 0]
    return losses, lse


@_forward.register_fake
def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    each = hidden.new_empty(hidden.shape[:1], dtype=wide(hidden.dtype))
    return each, torch.empty_like(each)


@torch.library.custom_op("scfm::masked_head_loss_backward", mutates_args=())
def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (of no elements where there is none); logits are made again."""
    if paths.choose(_NAME, hidden) == "triton":
        from scfm.kernels import masked_head as kernels

        d_hidden, d_weight, d_bias = kernels.backward(grad, hidden, weight, bias, targets, lse)
        return d_hidden, d_weight, hidden.new_empty(0) if d_bias is None else d_bias
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros(weight.shape, dtype=wide(weight.dtype), device=weight.device)
    d_bias = d_weight.new_zeros(0 if bias is None else len(weight))
    with fast_float32(hidden.device):
        for rows in _row_blocks(len(hidden), len(weight)):
            logits = row_stable_linear(hidden[rows], weight, bias).to(lse.dtype)
            d_logits = logits.sub_(lse[rows, None]).exp_()
            d_logits[torch.arange(len(d_logits), device=logits.device), targets[rows]] -= 1.0
            d_logits.mul_(grad[rows, None])
            if bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            d_hidden[rows] = d_logits @ weight
            if d_weight.dtype == hidden.dtype:
                d_weight.addmm_(d_logits.T, hidden[rows])
            else:
                d_weight += d_logits.T @ hidden[rows]
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


@_backward.register_fake
def _backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(0) if bias is None else weight.new_empty(weight.shape[:1])
    return torch.empty_like(hidden), torch.empty_like(weight), d_bias


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    output: tuple[Tensor, Tensor],
) -> None:
    ctx.save_for_backward(*inputs, output[1])  # type: ignore[arg-type]
    ctx.mark_non_differentiable(output[1])


def _autograd(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    hidden, weight, bias, targets, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = torch.ops.scfm.masked_head_loss_backward(grad.contiguous(), hidden, weight, bias, targets, lse)
    return grads[0], grads[1], None if bias is None else grads[2], None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)


def _row_blocks(num_rows: int, vocab_size: int) -> list[slice]:
    """Blocks of rows whose logits are about _LOGITS_AT_ONCE numbers: the same blocks for every number of threads."""
    step = max(_LOGITS_AT_ONCE // max(vocab_size, 1), 64)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    fits = (
        hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and weight.shape[0] > 0
    )
    if not fits or (bias is not None and bias.shape != weight.shape[:1]) or targets.shape != hidden.shape[:1]:
        shown = None if bias is None else tuple(bias.shape)
        raise InvalidArgumentError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, bias {shown}, targets "
            f"{tuple(targets.shape)}; expected (N, M), (V, M), (V,) or None, (N,)",
            where=_NAME,
        )
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if len(dtypes) > 1 or hidden.dtype not in FLOATS or targets.dtype not in (torch.int32, torch.int64):
        raise InvalidArgumentError(
            f"hidden {hidden.dtype}, weight {weight.dtype}, targets {targets.dtype}; expected one floating dtype "
            "and torch.int32 or int64",
            where=_NAME,
        )
    if len({x.device for x in (hidden, weight, targets)}) > 1:
        raise InvalidArgumentError(
            f"devices {hidden.device}, {weight.device}, {targets.device} differ", where=_NAME
        )


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    wrong = (targets < 0) | (targets >= vocab_size)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise InvalidArgumentError(
            f"targets[{row}] = {int(targets[row])}; expected 0 to {vocab_size - 1}", where=_NAME
        )
