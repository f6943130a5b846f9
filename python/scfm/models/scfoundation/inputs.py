"""A pack checked for scFoundation: positions in range and ascending, values finite; then on the model's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.scfoundation.config import ScfoundationConfig


@dataclass(frozen=True)
class Inputs:
    """token_ids: int64 (T,), positions; values: float32 (T,); cu_seqlens: int32 (C + 1,)."""

    token_ids: Tensor
    values: Tensor
    cu_seqlens: Tensor

    @property
    def num_cells(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def cell_of_token(self) -> Tensor:
        """int64 (T,)"""
        lengths = self.cu_seqlens.diff().to(torch.int64)
        return torch.repeat_interleave(torch.arange(self.num_cells, device=lengths.device), lengths)


def checked_inputs(
    config: ScfoundationConfig, packed: PackedCells, device: torch.device, *, beside: Inputs | None = None
) -> Inputs:
    """beside: the tokens that the encoder sees, where ``packed`` are those that enter behind it.

    Raises InvalidArgumentError naming the cell.
    """
    if packed.values is None:
        raise InvalidArgumentError(
            "has no values; scFoundation's tokens are positions with expression values", where="packed"
        )
    tokens = packed.token_ids.to(torch.int64)
    bad = (tokens < 0) | (tokens >= config.vocab_size) | ~packed.values.isfinite()
    ascends = tokens.diff() > 0
    starts = packed.cu_seqlens[1:-1].to(torch.int64)
    ascends[starts[(starts > 0) & (starts < len(tokens))] - 1] = True
    bad[1:] |= ~ascends
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        cell = int(torch.searchsorted(packed.cu_seqlens, token, right=True)) - 1
        raise InvalidArgumentError(
            f"position {int(tokens[token])} with value {float(packed.values[token]):.4g}; expected positions that "
            f"ascend within the cell, from 0 to {config.vocab_size - 1}, and finite values",
            where=f"cell {cell} of the pack",
        )
    inputs = Inputs(tokens.to(device), packed.values.to(device), packed.cu_seqlens.to(device))
    if beside is not None:
        _expect_apart(inputs, beside, config.vocab_size)
    return inputs


def merged(inputs: Inputs, hidden: Tensor, late: Inputs, late_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both packs' tokens and rows, each cell's together, and their cu_seqlens."""
    order = torch.argsort(torch.cat([inputs.cell_of_token, late.cell_of_token]), stable=True)
    token_ids = torch.cat([inputs.token_ids, late.token_ids]).index_select(0, order)
    rows = torch.cat([hidden, late_rows.to(hidden.dtype)]).index_select(0, order)
    return token_ids, rows, inputs.cu_seqlens + late.cu_seqlens


def _expect_apart(late: Inputs, early: Inputs, vocab_size: int) -> None:
    if late.num_cells != early.num_cells:
        raise InvalidArgumentError(f"{late.num_cells} cells beside {early.num_cells} in packed", where="late")
    ours, theirs = (one.cell_of_token * vocab_size + one.token_ids for one in (late, early))
    both = torch.isin(ours, theirs)
    if bool(both.any()):
        token = int(both.nonzero()[0])
        raise InvalidArgumentError(
            f"position {int(late.token_ids[token])} stands in packed too",
            where=f"late, cell {int(late.cell_of_token[token])}",
        )
