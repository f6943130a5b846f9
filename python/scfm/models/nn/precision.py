"""Which numbers a model multiplies in, and the fastest exact way to multiply float32 on this CPU.

torch sends float32 products on CPU to MKL, which on AMD processors stays at AVX2: under half of what the chip
can do. oneDNN has an AVX-512 path of the same accuracy behind torch's "medium" precision; but on processors
with matrix units that setting may round the inputs to bfloat16. So the setting is used only after one small
product has shown float32 accuracy on this very machine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from scfm.errors import InvalidArgumentError

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """``"auto"`` picks bfloat16 only where the hardware multiplies it natively, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if dtype in _DTYPES:
        return _DTYPES[str(dtype)]
    raise InvalidArgumentError(f'{dtype!r}; expected "auto", "float32" or "bfloat16"', where="dtype")


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` picks CUDA when torch sees a GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidArgumentError(f"{device!r}: {str(error).splitlines()[0]}", where="device") from error
    return chosen


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 multiply instructions (AVX512-BF16, AMX; CUDA 8.0 and later)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        from scfm import _native

        features = _native.cpu_features()
        return bool(features["avx512_bf16"] or features["amx_bf16"])
    return False


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


def float32_path(device: torch.device) -> str:
    """In words: how float32 products are computed on this device."""
    if device.type != "cpu":
        return "torch's default"
    return "oneDNN, float32 accuracy checked" if _medium_is_exact() else "torch's default (MKL)"
