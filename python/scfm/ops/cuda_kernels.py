"""When the CUDA module can be used, and how tensors are handed to it.

Its kernels read 16 bytes at a time: rows that do not begin at such places are copied, and a head_dim that is no whole
number of them is filled up with zeros, which change no score. Work is queued on torch's current stream. Not run on a
GPU yet; the same kernels run on the host in tests/cuda.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
_VECTOR_BYTES = 16


@cache
def missing() -> str | None:
    """Why the CUDA module cannot be used here, or None."""
    try:
        cuda = module()
    except ModuleNotFoundError:
        return "the CUDA module is not built"
    except ImportError as error:
        return f"the CUDA module cannot be loaded ({error})"
    if cuda.device_count() == 0:
        major, minor = cuda.runtime_version()
        return f"no GPU, or its driver is too old for CUDA {major}.{minor}"
    return None


def objection(tensor: Tensor) -> str | None:
    """Why the CUDA kernels cannot take a tensor of this device, dtype and last dimension."""
    if tensor.device.type != "cuda":
        return "computes on a GPU"
    if tensor.dtype not in DTYPES:
        return f"has no {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.dim() and tensor.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {tensor.shape[-1]} is above {MAX_HEAD_DIM}"
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    return missing()


def module() -> Any:
    """scfm._cuda."""
    return import_module("scfm._cuda")


@contextmanager
def stream_on(device: torch.device) -> Iterator[int]:
    """Within: ``device`` is torch's current one. Gives the address of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def graph_forward(
    q: Tensor, k: Tensor, v: Tensor, row_offsets: Tensor, columns: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) and the natural log-sum-exp (T, H) float32; see scfm.ops.graph_attention."""
    _check_pairs(row_offsets, columns, "row_offsets", "columns")
    stored = [_stored(x) for x in (q, k, v)]
    out = stored[0].new_empty(stored[0].shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    with stream_on(q.device) as stream:
        module().graph_forward(*stored, out, lse, row_offsets, columns, scale, stream)
    return _cut(out, q), lse


def graph_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. plan: row_offsets, columns, col_offsets, rows."""
    _check_pairs(*plan[:2], "row_offsets", "columns")
    _check_pairs(*plan[2:], "col_offsets", "rows")
    stored = [_stored(x) for x in (grad_out, q, k, v, out)]
    grads = [stored[1].new_empty(stored[1].shape) for _ in range(3)]
    delta = torch.empty_like(lse)
    with stream_on(q.device) as stream:
        module().graph_backward(*stored, lse, delta, *grads, *plan, scale, stream)
    dq, dk, dv = (_cut(x, q) for x in grads)
    return dq, dk, dv


def _stored(x: Tensor) -> Tensor:
    """x as the kernels read it: rows that begin at, and are, whole vectors."""
    x = x.detach()
    vector = _VECTOR_BYTES // x.element_size()
    if x.shape[-1] % vector:
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % vector))
    aligned = x.data_ptr() % _VECTOR_BYTES == 0 and all(step % vector == 0 for step in x.stride()[:-1])
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _cut(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape == like.shape else x[..., : like.shape[-1]].contiguous()


def _check_pairs(offsets: Tensor, positions: Tensor, offsets_name: str, positions_name: str) -> None:
    """What a kernel follows blindly. Looked at once for each plan, since the answer has to be waited for."""
    known = (offsets.data_ptr(), offsets.numel(), *_versions(offsets, positions))
    if getattr(positions, "_scfm_checked", None) == known or _capturing(offsets):
        return
    num_tokens, num_edges = offsets.numel() - 1, positions.numel()
    steps = offsets.diff()
    facts = [offsets[0], offsets[-1], steps.min() if num_tokens else offsets[0]]
    facts += [positions.min(), positions.max()] if num_edges else [offsets[0], offsets[0]]
    first, last, least, lowest, highest = torch.stack([x.to(torch.int64) for x in facts]).tolist()
    if first != 0 or last != num_edges or least < 0:
        raise InvalidArgumentError(
            f"{offsets_name} must rise from 0 to {num_edges}, the number of {positions_name}; found {first} to {last}",
            where="graph_attention",
        )
    if num_edges and not 0 <= lowest <= highest < num_tokens:
        raise InvalidArgumentError(
            f"{positions_name} run from {lowest} to {highest}; expected 0 to {num_tokens - 1}",
            where="graph_attention",
        )
    positions._scfm_checked = known  # type: ignore[attr-defined]


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(-1 if x.is_inference() else x._version for x in tensors)


def _capturing(tensor: Tensor) -> bool:
    """Within a CUDA graph's capture nothing can be waited for; what is captured has run before."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
