"""Packed inputs for the operators' tests, and the bound that every fast path is held to."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

LENGTHS = [
    [],
    [1],
    [0, 3, 0],
    [37, 64, 5, 130, 1],
    [127, 128, 129],
    [1] * 40,
    [257, 2, 0, 1],
]


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def heads(
    total: int, num_heads: int = 2, head_dim: int = 16, *, seed: int = 0, dtype=torch.float64
) -> list[Tensor]:
    """q, k, v and an upstream gradient, (total, num_heads, head_dim), exact in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (total, num_heads, head_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def check_as_exact_as_torch(ours: Tensor, same_dtype: Tensor, exact: Tensor, *, slack: float = 1e-6) -> None:
    """The error is at most twice that of the plain formula in the same dtype."""
    assert ours.shape == exact.shape
    if not ours.numel():
        return
    assert bool(torch.isfinite(ours).all())
    if ours.dtype == torch.float64:
        slack = 1e-14  # for results that torch hits exactly
    error = (ours.double() - exact).abs().max()
    allowed = 2 * (same_dtype.double() - exact).abs().max() + slack * max(
        1.0, float(exact.detach().abs().max())
    )
    assert error <= allowed, f"error {float(error):.3g}, allowed {float(allowed):.3g}"


def module_of(operator: str) -> ModuleType:
    """scfm.ops.<operator> the file; as an attribute of scfm.ops the name is the function."""
    return import_module(f"scfm.ops.{operator}")


def gradients(function, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    if not out.requires_grad:  # a reference without cells never touched its inputs
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(out, leaves, upstream))
