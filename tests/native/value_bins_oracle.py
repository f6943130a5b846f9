"""value_bins by its definition: numpy.quantile, numpy.digitize, and Philox one counter at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scfm import _native as native

BINS, KEPT = 0x62696E73, 0x6B657074  # the purposes of draws
_MASK64 = 2**64 - 1


@dataclass
class Cells:
    """Arguments of native.value_bins, all of them."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    column_slot: np.ndarray
    slot_token: np.ndarray
    quantiles: np.ndarray = field(default_factory=lambda: np.linspace(0, 1, 50))
    rule: str = "seeded"
    draws: np.ndarray | None = None
    draw_offsets: np.ndarray | None = None
    kept: str = "any"
    max_tokens: int = -1
    prefix_token: int = -1
    prefix_value: float = 0.0
    with_zeros: bool = False
    seed: int = 0
    epoch: int = 0

    def run(self, **changed: Any) -> Any:
        return native.value_bins(**(vars(self) | changed))


def words(seed: int, purpose: int, cell: int, epoch: int, count: int) -> np.ndarray:
    """The random words of one cell: word i is word (i // 16) % 4 of counter (i // 64) * 16 + i % 16."""
    key = np.array([(seed & 0xFFFFFFFF) ^ purpose, seed >> 32], np.uint32)
    found = np.empty(-(-count // 64) * 64, np.uint32)
    for counter in range(len(found) // 4):
        where = np.array([counter, cell & 0xFFFFFFFF, cell >> 32, epoch], np.uint32)
        first = counter // 16 * 64 + counter % 16
        found[first : first + 64 : 16] = native.philox4x32(where, key)
    return found[:count]


def fingerprint(tokens: Sequence[int], values: np.ndarray) -> int:
    total = 0
    for token, bits in zip(tokens, np.asarray(values, np.float32).view(np.uint32).tolist(), strict=True):
        mixed = ((token << 32) | bits) * 0x9E3779B97F4A7C15 & _MASK64
        total += mixed ^ (mixed >> 32)
    return total & _MASK64


def edge_counts(values: np.ndarray, quantiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """left, right: how many edges are <= and < each value."""
    edges = np.quantile(values, quantiles)
    return np.digitize(values, edges), np.digitize(values, edges, right=True)


def encode_cell(cells: Cells, row: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens, values and number of gene tokens before cutting."""
    span = slice(cells.indptr[row], cells.indptr[row + 1])
    # A column that stands several times is one entry of the data's type; columns of one slot are summed after that.
    columns = np.zeros(len(cells.column_slot))
    np.add.at(columns, cells.indices[span], cells.data[span].astype(np.float64))
    if cells.data.dtype == np.float32:
        columns = columns.astype(np.float32).astype(np.float64)
    sums = np.zeros(len(cells.slot_token))
    known = cells.column_slot >= 0
    np.add.at(sums, cells.column_slot[known], columns[known])
    dense = sums.astype(np.float32)
    (places,) = np.nonzero(dense)
    expressed, tokens = dense[places], cells.slot_token[places]
    cell = fingerprint(tokens.tolist(), expressed)
    values = expressed
    if len(cells.quantiles) and len(places):
        left, right = edge_counts(expressed, cells.quantiles)
        if cells.rule == "seeded":
            drawn = words(cells.seed, BINS, cell, cells.epoch, len(places)).astype(np.uint64)
            left = left - ((drawn * (left - right).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
        elif cells.rule == "given":
            assert cells.draws is not None and cells.draw_offsets is not None
            u = cells.draws[cells.draw_offsets[row] : cells.draw_offsets[row + 1]]
            left = np.ceil(u * (right - left) + left)
        values = left.astype(np.float32)
    if cells.with_zeros:
        spread = np.zeros(len(cells.slot_token), np.float32)
        spread[places] = values
        values, tokens, expressed = spread, cells.slot_token, dense
    count = len(tokens)
    if count == 0:
        return np.empty(0, np.int32), np.empty(0, np.float32), 0
    has_prefix = cells.prefix_token >= 0
    most = count if cells.max_tokens < 0 else min(count, cells.max_tokens - has_prefix)
    if most < count:
        chosen = kept_places(cells, cell, expressed, count, most)
        tokens, values = tokens[chosen], values[chosen]
    if has_prefix:
        tokens = np.concatenate([[cells.prefix_token], tokens])
        values = np.concatenate([[np.float32(cells.prefix_value)], values])
    return tokens.astype(np.int32), values.astype(np.float32), count


def kept_places(cells: Cells, cell: int, expressed: np.ndarray, count: int, most: int) -> np.ndarray:
    if cells.kept == "largest":
        return np.sort(np.lexsort((np.arange(count), -expressed))[:most])
    chosen: list[int] = []
    for place, word in enumerate(words(cells.seed, KEPT, cell, cells.epoch, count).tolist()):
        if (word * (count - place)) >> 32 < most - len(chosen):
            chosen.append(place)
    return np.array(chosen)
