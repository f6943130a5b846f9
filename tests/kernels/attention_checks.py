"""How every attention kernel is compared: with the formula in float64 and in its own dtype."""

from __future__ import annotations

import packs
import torch
from torch import Tensor

# Gradients hold differences of two float32 sums of the same products (dp - delta), added in different orders. Where
# they cancel exactly torch's error is 0 and ours is this; elsewhere single elements scatter more than the whole does.
CANCELLATION = 4e-6


def check_results(ours: list[Tensor], formula, inputs: tuple[Tensor, ...], upstream: Tensor) -> None:
    """ours: out and the inputs' gradients, each as exact as torch's in the same dtype and nowhere unwritten."""
    exact_inputs = [x.double() for x in inputs]
    exact = [formula(*exact_inputs), *packs.gradients(formula, exact_inputs, upstream.double())]
    same = [formula(*inputs), *packs.gradients(formula, inputs, upstream)]
    assert all(found.dtype == upstream.dtype for found in ours)
    packs.check_as_exact_as_torch(ours[0].cpu(), same[0], exact[0])
    for found, torch_found, truth in zip(ours[1:], same[1:], exact[1:], strict=True):
        check_gradient(found.cpu().double(), torch_found.double(), truth)


def check_gradient(found: Tensor, torch_found: Tensor, truth: Tensor) -> None:
    """The whole's error is at most twice torch's, an element's at most four times torch's largest."""
    assert found.shape == truth.shape
    if not found.numel():
        return
    ours, torchs = found - truth, torch_found - truth
    slack = CANCELLATION * max(1.0, float(truth.abs().max()))
    assert ours.square().mean().sqrt() <= 2 * torchs.square().mean().sqrt() + slack / 4
    assert ours.abs().max() <= 4 * torchs.abs().max() + slack


def check_lse(found: Tensor, exact: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), exact, rtol=2e-6, atol=2e-6)
