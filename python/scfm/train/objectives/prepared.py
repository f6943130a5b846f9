"""A microbatch as an objective takes it: what the model is shown, and over how many units its losses are sums."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scfm.data.packed import PackedCells

__all__ = ["Prepared"]


@dataclass(frozen=True)
class Prepared:
    """Cells made ready on CPU, by draws of (seed, epoch, cell) alone; families add their targets.

    packed: what the model is shown. counts: for each term of the loss how many units (masked tokens, cells, pairs of
    cells) its sum runs over. num_tokens: positions that are computed, which a token budget is about.
    """

    packed: PackedCells
    counts: dict[str, int]
    num_tokens: int

    @property
    def planned_tokens(self) -> int:
        """What lengths_of counted for these cells: positions at most, where draws decide how many are computed."""
        return self.num_tokens

    @property
    def num_cells(self) -> int:
        return self.packed.num_cells

    @property
    def cell_ids(self) -> Tensor:
        """int64 (C,): numbers of the cells in the corpus."""
        return self.packed.cell_ids
