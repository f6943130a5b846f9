"""From packed cells to scBERT's dense ones: a bin for every position of the panel and the slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.scbert.config import ScbertConfig


@dataclass(frozen=True)
class Inputs:
    """Cells of P = num_positions rows each.

    bins: int64 (C, P), 0 where nothing was given; rows: int64 (T,), where the pack's tokens stand among the C * P rows;
    cu_seqlens: int32 (C + 1,) of these.
    """

    bins: Tensor
    rows: Tensor
    cu_seqlens: Tensor

    @property
    def num_cells(self) -> int:
        return len(self.bins)

    def cells(self, chosen: slice) -> Inputs:
        """Some of the cells; ``rows`` stays empty."""
        bins = self.bins[chosen]
        return Inputs(bins, self.rows[:0], _offsets(bins))


def checked_inputs(config: ScbertConfig, packed: PackedCells, device: torch.device) -> Inputs:
    """Positions and bins of ``packed`` spread over the panel. Raises InvalidArgumentError naming the cell."""
    num_positions = config.num_positions
    if packed.values is None:
        raise InvalidArgumentError(
            "the pack has no values; scBERT needs the bin of each position",
            where="packed",
            hint="Tokenize with model.tokenize, or scfm.ScbertTokenizer.",
        )
    tokens, values = packed.token_ids.to(torch.int64), packed.values
    cell_of_token = torch.repeat_interleave(torch.arange(packed.num_cells), packed.lengths.to(torch.int64))
    outside = (tokens < 0) | (tokens >= num_positions)
    if bool(outside.any()):
        place = int(outside.nonzero()[0])
        raise InvalidArgumentError(
            f"cell {int(cell_of_token[place])} has position {int(tokens[place]):,}; this model's panel has "
            f"{config.num_genes:,} genes and one slot behind them",
            where="packed.token_ids",
            hint="Were the cells tokenized with another panel?",
        )
    wrong = (values != values.trunc()) | (values < 0) | (values > config.mask_bin)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise InvalidArgumentError(
            f"cell {int(cell_of_token[place])} has value {float(values[place]):g} at position "
            f"{int(tokens[place]):,}; expected a bin, 0 to {config.mask_bin - 1}, or {config.mask_bin} where hidden",
            where="packed.values",
        )
    rows = cell_of_token * num_positions + tokens
    if len(torch.unique(rows)) < len(rows):
        ordered = rows.sort().values
        place = int((ordered.diff() == 0).nonzero()[0])
        cell, position = divmod(int(ordered[place]), num_positions)
        raise InvalidArgumentError(
            f"cell {cell} has position {position:,} more than once", where="packed.token_ids"
        )
    bins = torch.zeros(packed.num_cells * num_positions, dtype=torch.int64)
    bins[rows] = values.to(torch.int64)
    bins = bins.view(packed.num_cells, num_positions).to(device)
    return Inputs(bins, rows.to(device), _offsets(bins))


def _offsets(bins: Tensor) -> Tensor:
    num_cells, num_positions = bins.shape
    return torch.arange(num_cells + 1, dtype=torch.int32, device=bins.device) * num_positions
