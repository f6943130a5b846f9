"""The original scGPT's own random choices, draw for draw from numpy's and torch's global generators.

With the same seeds (numpy.random.seed, torch.manual_seed) and the same cells in the same order, tokens equal those of
the original's code. They depend on every cell before them; the "seeded" rules of the tokenizer have the same
distributions and do not.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scfm.data.packed import PackedCells

__all__ = ["cut_as_upstream", "upstream_draws"]


def upstream_draws(values: np.ndarray, cu_seqlens: np.ndarray) -> dict[str, Any]:
    """One number a value that is not zero, cell by cell, as arguments of the native binning."""
    expressed = np.concatenate([[0], np.cumsum(values != 0, dtype=np.int64)])
    offsets = expressed[cu_seqlens]
    # The original's generator, so the legacy one.
    draws = np.random.random_sample(int(offsets[-1]))  # noqa: NPY002
    return {"draws": draws, "draw_offsets": np.ascontiguousarray(offsets)}


def cut_as_upstream(
    packed: PackedCells,
    max_tokens: int | None,
    *,
    num_first: int,
    drawn_by: Literal["torch", "numpy"] = "torch",
) -> PackedCells:
    """Cells longer than ``max_tokens`` cut as the original does: the first ``num_first`` tokens, then others drawn,
    in the order drawn. drawn_by: "torch" as its collator does, "numpy" as its fine-tuning tokenizer does.
    """
    lengths = packed.lengths.tolist()
    if max_tokens is None or max(lengths, default=0) <= max_tokens:
        return packed
    starts = packed.cu_seqlens.tolist()
    places = []
    for start, length in zip(starts, lengths, strict=False):
        if length > max_tokens:
            drawn = _draw(length - num_first, max_tokens - num_first, drawn_by)
            places += [torch.arange(start, start + num_first), drawn + (start + num_first)]
        else:
            places.append(torch.arange(start, start + length))
    positions = torch.cat(places)
    cut = torch.clamp(packed.lengths.to(torch.int64), max=max_tokens)
    return PackedCells(
        token_ids=packed.token_ids[positions],
        values=None if packed.values is None else packed.values[positions],
        cu_seqlens=torch.nn.functional.pad(torch.cumsum(cut, 0), (1, 0)).to(torch.int32),
        cell_ids=packed.cell_ids,
    )


def _draw(count: int, num_drawn: int, drawn_by: str) -> Tensor:
    if drawn_by == "torch":
        return torch.randperm(count)[:num_drawn]
    # The original's generator, so the legacy one.
    return torch.from_numpy(np.random.choice(count, num_drawn, replace=False))  # noqa: NPY002
