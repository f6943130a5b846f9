"""Hidden values: which of a cell's values the model must find out, and what it sees there instead.

scGPT hides values, not genes. Its fine-tuning hides a given share of each cell's tokens exactly, its collator each
token with a given probability. Here either draws from counters keyed by (seed, epoch, cell id), so that a cell hides
the same tokens in any batch; the functions ``_as_upstream`` draw what the original's code draws from the global
generators, padded positions and <cls> included. Source: the released scGPT gene tokenizer and data collator.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scfm import _native
from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError

__all__ = [
    "HiddenValues",
    "choose_tokens",
    "hide_each",
    "hide_each_as_upstream",
    "hide_share",
    "hide_share_as_upstream",
]

# Keeps these draws apart from others of the same seed: "hide" and "each".
_HIDE = 0x68696465
_EACH = 0x65616368


@dataclass(frozen=True)
class HiddenValues:
    """packed: the cells with hidden values replaced; hidden: bool (T,), where they were."""

    packed: PackedCells
    hidden: Tensor


def hide_share(
    packed: PackedCells,
    mask_ratio: float,
    *,
    seed: int,
    epoch: int = 0,
    mask_value: float = -1.0,
    num_spared: int = 1,
) -> HiddenValues:
    """Hide int(mask_ratio * tokens) of each cell's values, never its first ``num_spared`` (<cls>).

    Raises InvalidArgumentError for a ratio outside 0 to 1 or a pack without values.
    """
    _check(packed, "mask_ratio", mask_ratio)
    lengths = packed.lengths.numpy()
    wanted = (lengths * mask_ratio).astype(np.int32)
    wanted = np.minimum(wanted, np.maximum(lengths - num_spared, 0)).astype(np.int32)
    chosen = choose_tokens(packed, wanted, num_spared=num_spared, seed=seed, epoch=epoch, purpose=_HIDE)
    return _hidden(packed, chosen, mask_value)


def hide_share_as_upstream(
    packed: PackedCells, mask_ratio: float, *, mask_value: float = -1.0, pad_value: float = -2.0
) -> HiddenValues:
    """The original's random_mask_value: numpy's global generator, cell by cell; a <cls> of value 0 may be hidden."""
    values = _check(packed, "mask_ratio", mask_ratio)
    hidden = np.zeros(packed.num_tokens, dtype=bool)
    for start, stop in itertools.pairwise(packed.cu_seqlens.tolist()):
        places = start + np.flatnonzero(values[start:stop] != pad_value)
        # The original's generator, so the legacy one.
        chosen = np.random.choice(places, int(len(places) * mask_ratio), replace=False)  # noqa: NPY002
        hidden[chosen] = True
    return _hidden(packed, torch.from_numpy(hidden), mask_value)


def hide_each(
    packed: PackedCells,
    probability: float,
    *,
    seed: int,
    epoch: int = 0,
    mask_value: float = -1.0,
    num_spared: int = 1,
) -> HiddenValues:
    """Hide each value with this probability, never a cell's first ``num_spared``. Raises InvalidArgumentError."""
    _check(packed, "probability", probability)
    _, chosen = _native.mlm_mask(
        packed.token_ids.numpy(),
        packed.cu_seqlens.numpy(),
        packed.cell_ids.numpy(),
        seed ^ _EACH,
        epoch,
        probability,
        0,
        1,
        [],
    )
    hidden = np.zeros(packed.num_tokens, dtype=bool)
    hidden[chosen] = True
    hidden &= _places(packed) >= num_spared
    return _hidden(packed, torch.from_numpy(hidden), mask_value)


def hide_each_as_upstream(
    packed: PackedCells,
    probability: float,
    *,
    mask_value: float = -1.0,
    pad_value: float = -2.0,
    num_spared: int = 1,
    pretraining: bool = False,
) -> HiddenValues:
    """The original collator's: torch's global generator, once for every position of the padded batch.

    pretraining: as the collator of the pretraining branch does it, which takes the spared tokens away before it
    draws and then spares as many of the rest once more.
    """
    values = torch.from_numpy(_check(packed, "probability", probability))
    longest = int(packed.lengths.max()) if packed.num_cells else 0
    real = torch.arange(longest) < packed.lengths.unsqueeze(1)
    chances = torch.zeros(real.shape).masked_scatter_(
        real, torch.where(values == pad_value, 0.0, probability)
    )
    first = num_spared if pretraining else 0
    chances[:, : first + num_spared] = 0.0
    hidden = torch.zeros_like(real)
    hidden[:, first:] = torch.bernoulli(chances[:, first:]).bool()
    return _hidden(packed, hidden[real], mask_value)


def choose_tokens(
    packed: PackedCells, num_chosen: np.ndarray, *, num_spared: int, seed: int, epoch: int, purpose: int
) -> Tensor:
    """bool (T,): num_chosen[c] tokens of cell c, every set of them equally likely, never its first ``num_spared``.

    Depends on seed, epoch, purpose and the cell's id only. Raises ValueError where a cell has too few.
    """
    chosen = _native.choose_tokens(
        packed.cu_seqlens.numpy(),
        packed.cell_ids.numpy(),
        np.ascontiguousarray(num_chosen, dtype=np.int32),
        num_spared,
        seed,
        epoch,
        purpose,
    )
    return torch.from_numpy(chosen.view(np.bool_))


def _check(packed: PackedCells, name: str, share: float) -> np.ndarray:
    """The pack's values; raises InvalidArgumentError."""
    if packed.values is None:
        raise InvalidArgumentError("has no values to hide", where="packed")
    if not 0.0 <= share <= 1.0:
        raise InvalidArgumentError(f"{share}; expected 0 to 1", where=name)
    values: np.ndarray = packed.values.numpy()
    return values


def _hidden(packed: PackedCells, hidden: Tensor, mask_value: float) -> HiddenValues:
    assert packed.values is not None
    return HiddenValues(replace(packed, values=packed.values.masked_fill(hidden, mask_value)), hidden)


def _places(packed: PackedCells) -> np.ndarray:
    """Each token's place in its cell."""
    lengths = packed.lengths.numpy()
    places: np.ndarray = np.arange(packed.num_tokens) - np.repeat(packed.cu_seqlens.numpy()[:-1], lengths)
    return places
