"""The bridge to the C++ kernels: torch tensors on the CPU as numpy arrays over the same memory.

numpy has no bfloat16; those tensors travel as int16 arrays of the same bits. float16 has no kernels of its own on
CPU and is widened to float32 by the callers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

MAX_HEAD_DIM = 256
Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def missing(*functions: str) -> str | None:
    """Why the native module, or one of its functions, cannot be used, or None."""
    try:
        from scfm import _native
    except ImportError as error:
        return f"the native module is not built ({error})"
    absent = [name for name in functions if not hasattr(_native, name)]
    return f"the native module is of another version: it lacks {', '.join(absent)}" if absent else None


def objection_unless(
    *functions: str, max_last_dim: int | None = MAX_HEAD_DIM
) -> Callable[[Tensor], str | None]:
    """Why the CPU kernels of these names cannot take a tensor (by device, dtype and last dimension)."""

    def objection(tensor: Tensor) -> str | None:
        if tensor.device.type != "cpu":
            return "computes on the CPU"
        if tensor.dtype not in DTYPES:
            return f"has no {str(tensor.dtype).removeprefix('torch.')}"
        if max_last_dim is not None and tensor.dim() and tensor.shape[-1] > max_last_dim:
            return f"head_dim {tensor.shape[-1]} is above {max_last_dim}"
        return missing(*functions)

    return objection


def array(tensor: Tensor) -> Array:
    """The tensor's memory; bfloat16 as int16. Copied only if the last dimension is not contiguous.

    By DLPack where that can be written to: ``Tensor.numpy`` forbids the memory ever to be resized, and FSDP2 frees the
    gathered weights by resizing.
    """
    tensor = tensor.detach()
    if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    view: Array = np.from_dlpack(tensor)
    return view if view.flags.writeable else tensor.numpy()


def storable(tensor: Tensor) -> Tensor:
    """The tensor in a dtype the kernels store: float16 becomes float32."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def with_torch_threads(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a kernel with as many threads as torch uses, so that torch.set_num_threads rules both."""
    from scfm import _native

    threads = torch.get_num_threads()
    if _native.get_num_threads() != threads:
        _native.set_num_threads(threads)
    return function(*arguments)
