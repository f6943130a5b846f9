"""Other people's packed attention on GPUs: flash-attn 3 and 2 where installed, and torch's varlen_attn.

Only their forwards are used: each returns the log-sum-exp of its rows, from which our own deterministic backward
makes the probabilities again (theirs sum with atomics unless asked otherwise). Not run on a GPU by us yet.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from scfm.ops import triton_kernels

_HALF = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


@cache
def _module(name: str) -> Any | None:
    try:
        return import_module(name)
    except ImportError:
        return None


def objection_version_3(tensor: Tensor) -> str | None:
    if (reason := _not_for(tensor)) is not None:
        return reason
    if torch.cuda.get_device_capability(tensor.device)[0] != 9:
        return "made for Hopper (compute capability 9.x)"
    return None if _module("flash_attn_interface") else "not installed"


def objection_version_2(tensor: Tensor) -> str | None:
    return _not_for(tensor) or (None if _module("flash_attn") else "not installed")


def objection_torch(tensor: Tensor) -> str | None:
    return _not_for(tensor) or (None if _module("torch.nn.attention.varlen") else "needs torch 2.11 or later")


def _not_for(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return "computes on a GPU"
    if tensor.dtype not in _HALF:
        return "takes bfloat16 and float16 only"
    if tensor.dim() and (tensor.shape[-1] > _MAX_HEAD_DIM or tensor.shape[-1] % 8):
        return f"head_dim {tensor.shape[-1]} is not a multiple of 8 up to {_MAX_HEAD_DIM}"
    return triton_kernels.missing()  # which the backward needs


def forward(
    path: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (Tq, H, D) and natural log-sum-exp float32 (Tq, H). These kernels want the longest cell's length."""
    longest_q, longest_k = (int(x.diff().max()) if x.numel() > 1 else 0 for x in (cu_seqlens_q, cu_seqlens))
    if longest_q == 0 or longest_k == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    if path == "torch_varlen":
        varlen = import_module("torch.nn.attention.varlen")
        aux = varlen.AuxRequest(lse=True)
        out, lse = varlen.varlen_attn(
            q, k, v, cu_seqlens_q, cu_seqlens, longest_q, longest_k, return_aux=aux, scale=scale
        )
    elif path == "flash_attn_3":
        out, lse, *_ = import_module("flash_attn_interface").flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens,
            longest_q,
            longest_k,
            softmax_scale=scale,
            return_attn_probs=True,
        )
    else:
        out, lse, _ = import_module("flash_attn").flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens,
            longest_q,
            longest_k,
            softmax_scale=scale,
            return_attn_probs=True,
        )
    return out, lse.T.contiguous() if lse.shape != q.shape[:2] else lse
