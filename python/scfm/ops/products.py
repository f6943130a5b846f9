"""Matrix products whose rows do not depend on their company, and the fastest exact float32 on this CPU.

Matrix libraries switch algorithm for very few rows, and the last bit with it; products of fewer than 16 rows are
therefore padded to 16, which makes a row's result the same in any batch.

torch sends float32 products on CPU to MKL, which on AMD processors stays at AVX2: under half of what the chip
can do. Where no gradient is needed oneDNN is called directly, with bias and ReLU inside the product. Where one is,
oneDNN is reached through torch's "medium" precision; but on processors with matrix units that setting may round the
inputs to bfloat16, so it is used only after one small product has shown float32 accuracy on this very machine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16


def row_stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``F.linear`` in the weight's dtype, with at least MIN_ROWS rows in the product; then ReLU if asked."""
    x = x.to(weight.dtype)
    rows = x.shape[0]
    if rows < MIN_ROWS:
        return row_stable_linear(F.pad(x, (0, 0, 0, MIN_ROWS - rows)), weight, bias, relu=relu)[:rows]
    if _goes_to_onednn(x, weight, bias):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, "relu" if relu else "none", [], ""
        )
        return product
    with fast_float32(x.device):
        y = F.linear(x, weight, bias)
    return F.relu(y) if relu else y


@contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Within: float32 products on CPU take oneDNN's path if it is as accurate as float32 should be.

    The setting is torch's global one; it is counted, so that threads leave behind what the first one found.
    """
    if device.type != "cpu" or not _medium_is_exact():
        yield
        return
    _setting.enter()
    try:
        yield
    finally:
        _setting.leave()


def float32_path(device: torch.device) -> str:
    """In words: how float32 products are computed on this device."""
    if device.type != "cpu":
        return "torch's default"
    if not _has_onednn():
        return "torch's default"
    training = "oneDNN, float32 accuracy checked" if _medium_is_exact() else "torch's default (MKL)"
    return f"oneDNN (with gradients: {training})"


def _goes_to_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN takes the product and no gradient has to come back through it."""
    if x.device.type != "cpu" or not _has_onednn() or torch.compiler.is_compiling():
        return False
    if x.dtype != torch.float32 and not (
        x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return False
    return not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )


@cache
def _has_onednn() -> bool:
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _MediumPrecision:
    """torch's float32 precision at "medium" while anyone is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = "highest"

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("medium")
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.set_float32_matmul_precision(self._before)


_setting = _MediumPrecision()


@cache
def _medium_is_exact() -> bool:
    """One product at "medium" against float64: float32 gives about 5e-7 here, bfloat16 inputs 4e-3."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 512, generator=generator)
    b = torch.randn(512, 64, generator=generator)
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (a @ b - exact).abs().max() / exact.abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error < 5e-6)
