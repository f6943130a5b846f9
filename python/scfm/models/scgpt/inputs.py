"""One batch as scGPT's forward takes it, checked: tokens, values, and what some models want beside them.

Everything wrong is named here, with the cell, before anything is computed: ids outside the gene table, values that
are no categories, batch labels outside theirs, cells without a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.scgpt.config import ScgptConfig

NUM_FLAGS = 3  # rows of the perturbation table: not perturbed, perturbed, padding


@dataclass(frozen=True)
class Inputs:
    """Tensors on the model's device.

    token_ids: int32 (T,); values: float32 (T,) or None; cu_seqlens: int32 (C + 1,); cell_of_token: int64 (T,);
    first_rows: int64 (C,), each cell's first token; batch_labels: int64 (C,) or None; modalities, pert_flags: int64
    (T,) or None; num_known: int32 (C,) or None, the tokens of each cell that are not to be generated.
    """

    token_ids: Tensor
    values: Tensor | None
    cu_seqlens: Tensor
    cell_of_token: Tensor
    first_rows: Tensor
    batch_labels: Tensor | None = None
    modalities: Tensor | None = None
    pert_flags: Tensor | None = None
    num_known: Tensor | None = None

    @property
    def num_cells(self) -> int:
        return len(self.first_rows)

    @property
    def unknown(self) -> Tensor | None:
        """bool (T,): the tokens to be generated."""
        if self.num_known is None:
            return None
        position = torch.arange(len(self.token_ids), device=self.token_ids.device)
        return position >= (self.first_rows + self.num_known)[self.cell_of_token]

    def at(self, rows: Tensor) -> Inputs:
        """What belongs to some tokens, int64 (M,), as if they were all; cells and offsets stay those of the pack."""

        def of_tokens(found: Tensor | None) -> Tensor | None:
            return None if found is None else found.index_select(0, rows)

        return replace(
            self,
            token_ids=self.token_ids.index_select(0, rows),
            values=of_tokens(self.values),
            cell_of_token=self.cell_of_token.index_select(0, rows),
            modalities=of_tokens(self.modalities),
            pert_flags=of_tokens(self.pert_flags),
        )


def checked_inputs(
    config: ScgptConfig,
    packed: PackedCells,
    device: torch.device,
    *,
    batch_labels: Any = None,
    modalities: Any = None,
    pert_flags: Any = None,
    num_known: Any = None,
    needs_values: bool = True,
) -> Inputs:
    """What forward was given, on the model's device. Raises InvalidArgumentError naming cell and argument."""
    if not isinstance(packed, PackedCells):
        raise InvalidArgumentError(
            f"is a {type(packed).__name__}; expected PackedCells", where="packed", hint="Use model.tokenize."
        )
    _check_tokens(config, packed)
    if needs_values:
        _check_values(config, packed)
    packed = packed.to(device) if packed.token_ids.device != device else packed
    starts, lengths = packed.cu_seqlens[:-1].to(torch.int64), packed.lengths.to(torch.int64)
    cells = torch.arange(packed.num_cells, device=device)
    num_flags = NUM_FLAGS if config.perturbation else 0
    return Inputs(
        packed.token_ids,
        packed.values if needs_values else None,
        packed.cu_seqlens,
        torch.repeat_interleave(cells, lengths, output_size=packed.num_tokens),
        starts,
        _rows_of_a_table("batch_labels", batch_labels, packed, packed.num_cells, config.num_batch_labels),
        _rows_of_a_table("modalities", modalities, packed, packed.num_tokens, config.num_modalities),
        _rows_of_a_table("pert_flags", pert_flags, packed, packed.num_tokens, num_flags),
        _known(num_known, packed, config),
    )


def _check_tokens(config: ScgptConfig, packed: PackedCells) -> None:
    if not packed.num_cells:
        return
    empty = (packed.lengths == 0).nonzero().flatten()
    if len(empty):
        raise InvalidArgumentError(
            f"cell {int(packed.cell_ids[empty[0]])} has no token, not even <cls> ({len(empty)} such cells)",
            where="PackedCells",
        )
    low, high = int(packed.token_ids.min()), int(packed.token_ids.max())
    if low < 0 or high >= config.vocab_size:
        wrong = ((packed.token_ids < 0) | (packed.token_ids >= config.vocab_size)).nonzero()[0]
        raise InvalidArgumentError(
            f"token ids run from {low} to {high}; the vocabulary is 0 to {config.vocab_size - 1} "
            f"(first in cell {_cell_at(packed, int(wrong))})",
            where="PackedCells.token_ids",
            hint="The cells were tokenized for another model.",
        )


def _check_values(config: ScgptConfig, packed: PackedCells) -> None:
    values = packed.values
    if values is None:
        raise InvalidArgumentError(
            "scGPT's tokens have values (bins or expression), and these have none", where="PackedCells.values"
        )
    if config.value_style == "category":
        wrong = (values != values.round()) | (values < 0) | (values >= config.num_value_ids)
        expected = (
            f'whole numbers from 0 to {config.num_value_ids - 1}, for this model takes values by "category"'
        )
        hint = "Bin the values, or load a model with continuous values."
    else:
        wrong, expected, hint = ~values.isfinite(), "a finite number", None
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        raise InvalidArgumentError(
            f"value {float(values[token]):g} in cell {_cell_at(packed, token)}; expected {expected}",
            where="PackedCells.values",
            hint=hint,
        )


def _rows_of_a_table(name: str, given: Any, packed: PackedCells, count: int, num_rows: int) -> Tensor | None:
    """int64 (count,) on the pack's device, each within a table of ``num_rows``."""
    if given is None:
        return None
    if not num_rows:
        raise InvalidArgumentError("this model has no such input", where=name)
    rows = torch.as_tensor(np.asarray(given) if not isinstance(given, Tensor) else given)
    if rows.is_floating_point() or rows.is_complex() or rows.shape != (count,):
        raise InvalidArgumentError(
            f"{rows.dtype} {tuple(rows.shape)}; expected whole numbers ({count},)", where=name
        )
    wrong = (rows < 0) | (rows >= num_rows)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        cell = int(packed.cell_ids[place]) if count == packed.num_cells else _cell_at(packed, place)
        raise InvalidArgumentError(
            f"{int(rows[place])} in cell {cell}; the model's table has rows 0 to {num_rows - 1}", where=name
        )
    return rows.to(packed.token_ids.device, torch.int64)


def _known(num_known: Any, packed: PackedCells, config: ScgptConfig) -> Tensor | None:
    if num_known is None:
        return None
    if not config.has_flags:
        raise InvalidArgumentError(
            "the model has no flag_encoder, so it cannot generate genes",
            where="num_known",
            hint="Use a checkpoint of generative pretraining, such as the released whole-human one.",
        )
    counts = torch.as_tensor(num_known).to(packed.token_ids.device)
    if counts.is_floating_point() or counts.shape != (packed.num_cells,):
        raise InvalidArgumentError(
            f"{counts.dtype} {tuple(counts.shape)}; expected whole numbers ({packed.num_cells},)",
            where="num_known",
        )
    wrong = (counts < 1) | (counts > packed.lengths)
    if bool(wrong.any()):
        cell = int(wrong.nonzero()[0])
        raise InvalidArgumentError(
            f"{int(counts[cell])} in cell {int(packed.cell_ids[cell])}, which has {int(packed.lengths[cell])} tokens; "
            "expected at least 1, the <cls>",
            where="num_known",
        )
    return counts.to(torch.int32)


def _cell_at(packed: PackedCells, token: int) -> int:
    cell = int(torch.searchsorted(packed.cu_seqlens, token, right=True)) - 1
    return int(packed.cell_ids[cell])
