"""When the Triton kernels can be used: a GPU that torch sees, Triton installed, a dtype and width they take.

With TRITON_INTERPRET=1 in the environment they are computed by Triton's interpreter, on the CPU: slowly, and for
looking at kernels only, which is what that variable is for.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (3, 6)


@cache
def missing() -> str | None:
    """Why Triton cannot be used here, or None."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= OLDEST else f"triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"


@cache
def interpreted() -> bool:
    """Whether Triton computes on the CPU, by its interpreter; it reads the variable once, and so does this."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def objection(tensor: Tensor, *, max_last_dim: int | None = 256) -> str | None:
    """Why the Triton kernels cannot take a tensor of this device, dtype and last dimension."""
    kind = tensor.device.type
    if kind != ("cpu" if interpreted() else "cuda"):
        return "is interpreted, on the CPU (TRITON_INTERPRET=1)" if interpreted() else "computes on a GPU"
    if tensor.dtype not in DTYPES:
        return f"has no {str(tensor.dtype).removeprefix('torch.')}"
    if max_last_dim is not None and tensor.dim() and tensor.shape[-1] > max_last_dim:
        return f"head_dim {tensor.shape[-1]} is above {max_last_dim}"
    if kind == "cuda" and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    return missing()
