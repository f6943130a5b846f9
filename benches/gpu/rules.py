"""When a result passes: as exact as torch in the same dtype, the same bits twice, the same bits in any company.

The yardstick is the plain formula computed by torch on the same device in the same dtype: of the output the largest
error may be at most twice its own; of a gradient the root mean square at most twice and the largest at most four
times, since gradients hold differences of sums that cancel, where single elements scatter. Truth is the formula in
float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_SLACK = 1e-6  # of the largest value: where torch happens to hit the truth exactly
_CANCELLATION = 4e-6  # of sums in float32; and a 32nd of the last bit of 16-bit results
CAPTURE_WARM_UPS = 3


@dataclass(frozen=True)
class Yardstick:
    """The output and gradients of the formula, in float64 and in the dtype under test."""

    exact: list[Tensor]
    same: list[Tensor]


def yardstick(formula: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> Yardstick:
    """Where the formula overflows in float16, the truth rounded to float16 stands in for it."""
    exact = with_gradients(formula, [x.double() for x in inputs], upstream)
    same = with_gradients(formula, inputs, upstream)
    pairs = zip(same, exact, strict=True)
    return Yardstick(exact, [torch.where(torch.isfinite(s), s, e.to(s.dtype)) for s, e in pairs])


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor
) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    if not out.requires_grad:  # the formula never touches the inputs of a pack without cells
        return [out, *(torch.zeros_like(x) for x in leaves)]
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype), allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)),
    ]


def complaint(found: Sequence[Tensor], rod: Yardstick) -> tuple[str | None, str]:
    """(what is wrong, or None; the errors in words)."""
    shares = []
    for number, (ours, same, exact) in enumerate(zip(found, rod.same, rod.exact, strict=True)):
        what = "output" if number == 0 else f"gradient {number}"
        if not ours.numel():
            continue
        if not bool(torch.isfinite(ours).all()):
            return (
                f"{what} holds {int((~torch.isfinite(ours)).sum())} values that were not written or overflow",
                "",
            )
        epsilon = torch.finfo(found[1].dtype).eps if number else 0.0
        share = _share_of_allowed(ours.double() - exact, same.double() - exact, exact, epsilon)
        if not share <= 1:
            return f"{what} is {share:.2f} times as far from float64 as is allowed", ""
        shares.append(share)
    if not shares:
        return None, "nothing to compare"
    return None, f"error {shares[0]:.2f} of what is allowed" + (
        f", of gradients {max(shares[1:]):.2f}" if len(shares) > 1 else ""
    )


def _share_of_allowed(ours: Tensor, same: Tensor, exact: Tensor, epsilon: float) -> float:
    """Of errors; epsilon: of a gradient's dtype, 0 for the output."""
    scale = max(1.0, float(exact.abs().max()))
    largest, usual = float(ours.abs().max()), float(same.abs().max())
    if epsilon == 0:
        return largest / (2 * usual + _SLACK * scale)
    root, usual_root = (float(x.square().mean().sqrt()) for x in (ours, same))
    slack = max(_CANCELLATION, epsilon / 32) * scale
    return max(root / (2 * usual_root + slack / 4), largest / (4 * usual + slack))


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """NaN equals the same NaN, and 0 is not -0."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Within: memory that torch hands out holds NaN, or the largest integer, until somebody writes it."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled


def captured(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(what a CUDA graph gives that was captured on other values, what a plain call gives)."""
    held = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARM_UPS):
            function(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = function(*held)
    for place, values in zip(held, inputs, strict=True):
        place.copy_(values)
    graph.replay()
    with torch.no_grad():
        return out.clone(), function(*inputs)
