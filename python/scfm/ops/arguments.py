"""Checks that the attention operators share: shapes, dtypes and offsets, each named with what was found.

Offsets are looked at once: a tensor that has passed is remembered until it is changed, so that the twelve layers
of a model do not fetch the same numbers from a GPU twelve times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def check_heads(operator: str, q: Tensor, k: Tensor, v: Tensor, *, same_rows: bool = False) -> None:
    """(T, H, D) each, k and v alike, one dtype and device."""
    fits = q.dim() == 3 and k.shape == v.shape and q.shape[1:] == k.shape[1:]
    if not fits or (same_rows and q.shape != k.shape):
        raise InvalidArgumentError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected (T, H, D) each, "
            f"{'all equal' if same_rows else 'k and v equal, H and D the same in all'}",
            where=operator,
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in FLOATS:
        raise InvalidArgumentError(
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one floating dtype", where=operator
        )
    if not q.device == k.device == v.device:
        raise InvalidArgumentError(f"devices {q.device}, {k.device}, {v.device} differ", where=operator)


def check_offsets(
    operator: str,
    name: str,
    offsets: Tensor,
    num_rows: int,
    device: torch.device,
    *,
    num_cells: int | None = None,
) -> None:
    """int32, from 0 to num_rows, never falling, on the tensors' device; num_cells + 1 of them where that is known."""
    wrong_count = offsets.numel() < 1 if num_cells is None else offsets.numel() != num_cells + 1
    if offsets.dim() != 1 or wrong_count or offsets.dtype != torch.int32:
        expected = "cells + 1" if num_cells is None else num_cells + 1
        raise InvalidArgumentError(
            f"{name} is {offsets.dtype} {tuple(offsets.shape)}; expected torch.int32 ({expected},)",
            where=operator,
        )
    if offsets.device != device:
        raise InvalidArgumentError(f"{name} is on {offsets.device}, the tensors on {device}", where=operator)
    if torch.compiler.is_compiling() or _passed(offsets, num_rows):
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_rows or bool((offsets.diff() < 0).any()):
        raise InvalidArgumentError(
            f"{name} must rise from 0 to {num_rows}, found {int(offsets[0])} to {int(offsets[-1])}",
            where=operator,
        )
    _remember(offsets, num_rows)


def cell_slices(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    """(query rows, key rows) of every cell that has both."""
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [
        (slice(queries[c], queries[c + 1]), slice(keys[c], keys[c + 1]))
        for c in range(len(keys) - 1)
        if keys[c] < keys[c + 1] and queries[c] < queries[c + 1]
    ]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # inference tensors count no versions


def _passed(offsets: Tensor, num_rows: int) -> bool:
    return getattr(offsets, "_scfm_passed", None) == (_version(offsets), num_rows)


def _remember(offsets: Tensor, num_rows: int) -> None:
    offsets._scfm_passed = (_version(offsets), num_rows)  # type: ignore[attr-defined]
