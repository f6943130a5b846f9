"""The original's padded batches, read from packed cells: for those who want its numbers to the last digit.

scGPT's code pads cells to one length, and the padding is not without effect: an average or weighted pooling includes
it, and what it holds depends on which of three attention paths ran. Here padding does not exist, unless one of these
readings is asked for by name:

    "plain":  a <pad> attends to the cell's tokens like any other query (gradients enabled)
    "nested": the encoder's output at padding is zero (torch's nested-tensor path, without gradients)
    "flash":  attention gives zeros at padding, before the output projection (flash-attn 1)

All padding of a cell is alike, so one <pad> a cell is computed and counted as often as it would occur.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.inputs import Inputs

PaddedReading = Literal["plain", "nested", "flash"]


@dataclass(frozen=True)
class PaddedInputs:
    """Every cell with one <pad> behind its tokens. token_rows, pad_rows: int64, where tokens and pads are."""

    inputs: Inputs
    token_rows: Tensor
    pad_rows: Tensor


@dataclass(frozen=True)
class Padding:
    """hidden: float32 (C, hidden_size), each cell's state at padding; counts: int64 (C,), how often it occurs."""

    hidden: Tensor
    counts: Tensor
    value: float


def check_reading(reading: str, inputs: Inputs) -> None:
    if reading not in ("plain", "nested", "flash"):
        raise InvalidArgumentError(f'{reading!r}; expected "plain", "nested" or "flash"', where="padding")
    if inputs.num_known is not None:
        raise InvalidArgumentError("generation is read without padding only", where="padding")


def padding_counts(inputs: Inputs, length: int | None) -> Tensor:
    """How many <pad> each cell would get: up to ``length`` tokens, or to the longest cell of the batch."""
    lengths = inputs.cu_seqlens.diff().to(torch.int64)
    longest = int(lengths.max()) if len(lengths) else 0
    if length is not None and length < longest:
        raise InvalidArgumentError(f"{length}; the longest cell has {longest} tokens", where="padded_length")
    return (longest if length is None else length) - lengths


def padded(inputs: Inputs, config: ScgptConfig, pad_id: int) -> PaddedInputs:
    """The same cells, each with a <pad> at its end."""
    device = inputs.token_ids.device
    cells = torch.arange(inputs.num_cells, device=device)
    tokens = torch.arange(len(inputs.token_ids), device=device)
    token_rows = tokens + inputs.cell_of_token
    pad_rows = inputs.cu_seqlens[1:].to(torch.int64) + cells
    num_rows = len(tokens) + inputs.num_cells

    def spread(given: Tensor, filling: float) -> Tensor:
        return given.new_full((num_rows,), filling).index_copy(0, token_rows, given)

    cell_of_row = inputs.cell_of_token.new_empty(num_rows)
    cell_of_row[token_rows], cell_of_row[pad_rows] = inputs.cell_of_token, cells
    with_pads = replace(
        inputs,
        token_ids=spread(inputs.token_ids, pad_id),
        values=None if inputs.values is None else spread(inputs.values, config.pad_value),
        pert_flags=None if inputs.pert_flags is None else spread(inputs.pert_flags, config.pert_pad_id),
        modalities=None,
        cu_seqlens=inputs.cu_seqlens + torch.arange(inputs.num_cells + 1, dtype=torch.int32, device=device),
        cell_of_token=cell_of_row,
        first_rows=inputs.first_rows + cells,
    )
    return PaddedInputs(with_pads, token_rows, pad_rows)
