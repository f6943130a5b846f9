"""How every Triton kernel here is launched: on the right device, with explicit options, in safe dot types, cheaply.

The interpreter (TRITON_INTERPRET=1, read by Triton when a kernel is defined) computes products of bfloat16 on raw
bits, truncates where it stores bfloat16, and has no tensor cores: there, kernels are told to multiply in float32 and
to store bfloat16 results as float32, which torch then rounds. On a device the dot type is the
storage type; float32 is multiplied in full precision unless the user allowed TF32 for torch's own products.
FP fusion is asked for in every launch, since Triton's default for it differs between versions.

At the widths of this field a kernel runs for as long as Triton's own launch takes on the host (11 us, most of it to
find out which compiled variant the arguments need). What decides that is little: dtypes, which pointers and numbers
are divisible by 16, which numbers are 1. So compiled variants are kept here by just that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _probe():
    pass


INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)
_MAX_INT32 = 2**31 - 1
MIN_BLOCK_DIM = 16  # the least inner dimension of a product on tensor cores
_DOT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, eq=False)
class Options:
    """How a kernel is compiled: warps of a program, stages of its load pipeline. Make each once: told by identity."""

    num_warps: int = 4
    num_stages: int = 2

    @property
    def keywords(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type that tensors stored in ``dtype`` are multiplied in (sums are float32 always)."""
    return tl.float32 if INTERPRETED else _DOT_DTYPES[dtype]


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of tl.dot; it matters for float32 only."""
    if dtype != torch.float32 or INTERPRETED:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch >= 2.9 answers for both of its settings here; asking the older flag may raise where the newer was set.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def new_output(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """What a kernel writes a result of ``like``'s dtype to; give it to ``as_stored`` afterwards."""
    wide = INTERPRETED and like.dtype == torch.bfloat16
    return like.new_empty(like.shape if shape is None else shape, dtype=torch.float32 if wide else like.dtype)


def as_stored(written: Tensor, like: Tensor) -> Tensor:
    """A result in ``like``'s dtype; on a device it already is."""
    return written.to(like.dtype)


def type_name(dtype: torch.dtype) -> str:
    """Triton's name of a storage type: "bf16" in a signature's "*bf16"."""
    return _TYPE_NAMES[dtype]


def block_dim(size: int) -> int:
    """The power of two that a dimension is padded to, by masks, inside a kernel."""
    return max(MIN_BLOCK_DIM, triton.next_power_of_2(size))


def architecture(device: torch.device) -> int:
    """Compute capability as a number, 90 for 9.0; what the interpreter is told is that of the widest tables."""
    return 90 if device.type != "cuda" else _capability(device.index or 0)


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def launch(
    kernel: Callable[..., Any],
    grid: tuple[int],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    options: Options,
) -> None:
    """Queue ``kernel`` on the current stream of the device of its first tensor; an empty grid is no launch.

    arguments: the kernel's run-time parameters in order; constants: its constexpr parameters, which follow, by name.
    """
    if grid[0] == 0:
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with _on(device):
        if INTERPRETED:
            kernel[grid](*arguments, **constants, **options.keywords)  # type: ignore[index]
            return
        key = (id(kernel), device.index, options, *constants.values(), *_kinds(arguments))
        kept = _VARIANTS.get(key)
        if kept is None:
            compiled = kernel[grid](*arguments, **constants, **options.keywords)  # type: ignore[index]
            names = kernel.arg_names[len(arguments) :]  # type: ignore[attr-defined]
            _VARIANTS[key] = compiled, tuple(constants[name] for name in names)
        else:
            compiled, values = kept
            compiled[(grid[0], 1, 1)](*arguments, *values)


# (compiled kernel, its constexpr values in order) by what Triton specialises on
_VARIANTS: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _kinds(arguments: tuple[Any, ...]) -> list[Any]:
    """All that Triton may specialise a kernel on, and nothing finer: dtypes, alignments, ones, 64-bit numbers."""
    kinds: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            kinds.append(x.dtype)
            kinds.append(x.data_ptr() % 16 == 0)
        elif isinstance(x, int):
            kinds.append(4 if x == 1 else (x % 16 == 0) + 2 * (x > _MAX_INT32))
    return kinds


def _on(device: torch.device) -> Any:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
