"""Which device a model runs on, and which numbers it multiplies in."""

from __future__ import annotations

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
