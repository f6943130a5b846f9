"""Geneformer's rank-value encoding in plain numpy, one cell at a time: the definition the native code must meet.

Written from the description of the authors' tokenizer, not from the C++: counts of one column are summed, each
count x becomes x / n * 10,000 / median in the arithmetic asked for, and a stable descending sort gives the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Block:
    """Arguments of rank_value by name."""

    indptr: Array
    indices: Array
    data: Array
    library_size: Array
    column_slot: Array
    slot_token: Array
    slot_median: Array
    num_single: int
    arithmetic: str = "multiply64"
    keep_zeros: bool = True
    max_tokens: int = -1
    prefix_token: int = -1
    suffix_token: int = -1
    with_counts: bool = True

    def arguments(self, **changed: Any) -> dict[str, Any]:
        return {**vars(self), **changed}


def _per_10k(x: Array, n: np.float64, arithmetic: str) -> Array:
    if arithmetic.endswith("32"):
        x, n32, one, scale = x.astype(np.float32), np.float32(n), np.float32(1), np.float32(10_000)
        share = x * (one / n32) if arithmetic == "multiply32" else x / n32
        return (share * scale).astype(np.float64)
    x = x.astype(np.float64)
    return (x * (1.0 / n) if arithmetic == "multiply64" else x / n) * 10_000


def encode_cell(block: Block, row: int) -> tuple[Array, Array, int, float, float]:
    """(token ids, counts, number of gene tokens, mapped counts, total counts) of one cell."""
    here = slice(block.indptr[row], block.indptr[row + 1])
    columns, which = np.unique(block.indices[here], return_inverse=True)
    x = np.bincount(which, weights=block.data[here].astype(np.float64), minlength=columns.size)
    if block.data.dtype == np.float32:
        x = x.astype(np.float32).astype(np.float64)
    slot = block.column_slot[columns]
    num_slots = block.slot_token.size
    arithmetic = block.arithmetic
    if num_slots > block.num_single:
        arithmetic = arithmetic[:-2] + "64"

    single = (slot >= 0) & (slot < block.num_single)
    if not block.keep_zeros:
        single &= x != 0
    summed = slot >= block.num_single
    sums = np.bincount(slot[summed], weights=x[summed], minlength=num_slots)
    slots = np.concatenate([slot[single], np.flatnonzero(sums)]).astype(np.int64)
    values = np.concatenate([x[single], sums[sums != 0]])

    with np.errstate(all="ignore"):
        counts = _per_10k(values, block.library_size[row], arithmetic)
        median = block.slot_median[slots]
        ranked = counts * (1.0 / median) if arithmetic.startswith("multiply") else counts / median
    order = np.argsort(-ranked, kind="stable")
    specials = (block.prefix_token >= 0) + (block.suffix_token >= 0)
    if block.max_tokens >= 0:
        order = order[: block.max_tokens - specials]
    tokens, per_10k = block.slot_token[slots[order]], counts[order]
    if slots.size:
        prefix, suffix = (
            np.array([t] if t >= 0 else [], np.int32) for t in (block.prefix_token, block.suffix_token)
        )
        tokens = np.concatenate([prefix, tokens, suffix])
        per_10k = np.concatenate([np.zeros(prefix.size), per_10k, np.zeros(suffix.size)])
    return tokens, per_10k, slots.size, float(x[slot >= 0].sum()), float(x.sum())
