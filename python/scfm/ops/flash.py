"""Other people's packed attention on GPUs: flash-attn 3 and 2 where installed, and torch's varlen_attn.

Only their forwards are used: each returns the log-sum-exp of its rows, from which our own deterministic backward
makes the probabilities again (theirs sum with atomics unless asked otherwise). Keys are never split between blocks,
so that a cell's bits do not depend on its company. Not run on a GPU by us yet.

Signatures: flash_attn_varlen_func of flash-attn 2.6 and later and of flash_attn_interface (3), varlen_attn of torch
2.11 and later. All three want the longest cell's length on the host, and give the log-sum-exp as (H, Tq).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from scfm.ops import triton_kernels

_HALF = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
_ALIGNMENT = 8  # elements of 16 bits: the kernels load 16 bytes at a time


def objection_version_3(tensor: Tensor) -> str | None:
    if (reason := _not_for(tensor)) is not None:
        return reason
    if torch.cuda.get_device_capability(tensor.device)[0] != 9:
        return "made for Hopper (compute capability 9.x)"
    return _lacks("flash_attn_interface", "flash_attn_varlen_func", "softmax_scale")


def objection_version_2(tensor: Tensor) -> str | None:
    if (reason := _not_for(tensor)) is not None:
        return reason
    return _lacks("flash_attn", "flash_attn_varlen_func", "return_attn_probs") or _too_old_version_2()


def objection_torch(tensor: Tensor) -> str | None:
    if (reason := _not_for(tensor)) is not None:
        return reason
    # Before 2.11 the function was there, without a scale.
    return (
        "needs torch 2.11 or later" if _lacks("torch.nn.attention.varlen", "varlen_attn", "scale") else None
    )


def _not_for(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return "computes on a GPU"
    if tensor.dtype not in _HALF:
        return "takes bfloat16 and float16 only"
    if tensor.dim() and (tensor.shape[-1] > _MAX_HEAD_DIM or tensor.shape[-1] % _ALIGNMENT):
        return f"head_dim {tensor.shape[-1]} is not a multiple of {_ALIGNMENT} up to {_MAX_HEAD_DIM}"
    return triton_kernels.objection(
        tensor
    )  # which the backward needs, and compute capability 8.0 as these do


@cache
def _function(module: str, name: str) -> Callable[..., Any] | None:
    """The function, if it can be had; a broken installation may raise anything."""
    try:
        found: Callable[..., Any] | None = getattr(import_module(module), name, None)
    except (ImportError, OSError, RuntimeError):
        return None
    return found


@cache
def _parameters(module: str, name: str) -> frozenset[str]:
    function = _function(module, name)
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)


def _lacks(module: str, name: str, parameter: str) -> str | None:
    """A folder of flash-attn 4 is also called flash_attn, so that the module alone proves nothing."""
    if _function(module, name) is None:
        return "not installed"
    return (
        None if parameter in _parameters(module, name) else f"of another version: {name} has no {parameter}"
    )


@cache
def _too_old_version_2() -> str | None:
    version = str(getattr(import_module("flash_attn"), "__version__", "0.0"))
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return None if numbers >= (2, 6) else f"flash-attn {version} is older than 2.6"


def forward(
    path: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (Tq, H, D) and natural log-sum-exp float32 (Tq, H) of "flash_attn_3", "flash_attn_2", "torch_varlen"."""
    lengths = longest_cell(cu_seqlens_q), longest_cell(cu_seqlens)
    if 0 in lengths:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    packed = (*(_readable(x) for x in (q, k, v)), cu_seqlens_q, cu_seqlens, *lengths)
    if path == "torch_varlen":
        varlen = import_module("torch.nn.attention.varlen")
        asked = {"return_aux": varlen.AuxRequest(lse=True), "scale": scale, **_torch_splits()}
        out, lse = varlen.varlen_attn(*packed, **asked)
    else:
        module = "flash_attn_interface" if path == "flash_attn_3" else "flash_attn"
        name = "flash_attn_varlen_func"
        # Early versions of 3 give the log-sum-exp unasked; later ones, and 2, when asked for probabilities.
        asked = {"return_attn_probs": True} if "return_attn_probs" in _parameters(module, name) else {}
        function = _function(module, name)
        assert function is not None
        out, lse, *_ = function(*packed, softmax_scale=scale, **asked)
    return out, lse.T.contiguous()


def longest_cell(offsets: Tensor) -> int:
    """The most rows of a cell, fetched from the GPU once: remembered with the offsets until they change."""
    version = None if offsets.is_inference() else offsets._version  # inference tensors count no versions
    known: tuple[int | None, int] | None = getattr(offsets, "_scfm_longest", None)
    if known is not None and known[0] == version:
        return known[1]
    longest = int(offsets.diff().max()) if offsets.numel() > 1 else 0
    offsets._scfm_longest = (version, longest)  # type: ignore[attr-defined]
    return longest


def _torch_splits() -> dict[str, int]:
    """torch's own kernel never splits keys here; flash-attn 3, if it was put in its place, must be told not to."""
    current = getattr(import_module("torch.nn.attention"), "current_flash_attention_impl", lambda: None)
    splits = "num_splits" in _parameters("torch.nn.attention.varlen", "varlen_attn")
    return {"num_splits": 1} if splits and current() is not None else {}


def _readable(x: Tensor) -> Tensor:
    """A view that 16-byte loads can read; copied where a slice is out of step."""
    aligned = x.data_ptr() % (2 * _ALIGNMENT) == 0 and all(s % _ALIGNMENT == 0 for s in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)
