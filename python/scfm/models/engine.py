"""The embedding engine: blocks of cells are read, tokenized, sorted by length and embedded, in constant memory.

Cells are gathered until there are several batches' worth, so that sorting by length can fill each batch, and
every result goes back to its own row: output order is the input's, whatever the batches were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from scfm.data.packed import PackedCells, concatenate
from scfm.data.read import read
from scfm.errors import BadCellError, InvalidArgumentError
from scfm.models.batches import token_budget_batches

if TYPE_CHECKING:
    from scfm.models.base import FoundationModel

BadCellPolicy = Literal["error", "nan", "nan-row", "skip"]
Progress = Callable[[int, int, int], None]

_BATCHES_IN_HAND = 16


def default_token_budget(device: torch.device) -> int:
    """Tokens computed at once: enough to fill the device, small enough for its memory."""
    return 65_536 if device.type == "cuda" else 8_192


def packed_batches(packed: PackedCells, token_budget: int) -> Iterator[PackedCells]:
    """The pack's cells in token-budget batches, longest first."""
    for chosen in token_budget_batches(packed.lengths, token_budget):
        yield packed.select(chosen)


@torch.inference_mode()
def embed_cells(
    model: FoundationModel,
    data: Any,
    *,
    layer: int,
    pooling: str,
    token_budget: int | None = None,
    on_bad_cell: BadCellPolicy = "error",
    progress: Progress | None = None,
    counts_layer: str | None = None,
    assume_counts: bool = False,
    species: str | None = None,
) -> np.ndarray:
    """float32 (cells, hidden_size) in the order of ``data``; see FoundationModel.embed."""
    if on_bad_cell == "nan-row":
        on_bad_cell = "nan"
    if on_bad_cell not in ("error", "nan", "skip"):
        raise InvalidArgumentError(f'{on_bad_cell!r}; expected "error", "nan" or "skip"', where="on_bad_cell")
    if token_budget is not None and token_budget < 1:
        raise InvalidArgumentError(f"{token_budget}; expected at least 1", where="token_budget")
    budget = token_budget or default_token_budget(model.device)
    model.check_embedding(layer, pooling)
    if isinstance(data, PackedCells):
        num_cells, name, stream = data.num_cells, "PackedCells", iter([_renumbered(data)])
    else:
        source = read(data, layer=counts_layer, assume_counts=assume_counts)
        num_cells, name = len(source), source.name
        # obs["filter_pass"] thins what the authors tokenize for training; here every cell gets its row.
        stream = model.tokenizer.packs(
            source, species=species, use_filter_pass=False, empty_bad_cells=on_bad_cell != "error"
        )
    out = np.full((num_cells, model.config.hidden_size), np.nan, dtype=np.float32)
    embedded = np.zeros(num_cells, dtype=bool)
    done = tokens = 0
    if on_bad_cell == "error":
        stream = _complete(stream, name)
    for gathered in _gathered(stream, budget * _BATCHES_IN_HAND):
        # A cell without tokens has no first token to read; it stays NaN and follows the policy below.
        pack = gathered.select(gathered.lengths > 0)
        for batch in packed_batches(pack, budget):
            rows = batch.cell_ids.numpy()
            out[rows] = model.embed_batch(batch, layer=layer, pooling=pooling).float().cpu().numpy()
            embedded[rows] = True
            done, tokens = done + batch.num_cells, tokens + batch.num_tokens
            if progress is not None:
                progress(done, num_cells, tokens)
    if progress is not None:
        progress(num_cells, num_cells, tokens)
    return _apply_policy(out, embedded, on_bad_cell, name)


def _renumbered(packed: PackedCells) -> PackedCells:
    """Rows of the output are positions in the pack, whatever source its cells came from."""
    return PackedCells(
        packed.token_ids, packed.values, packed.cu_seqlens, torch.arange(packed.num_cells, dtype=torch.int64)
    )


def _complete(stream: Iterator[PackedCells], name: str) -> Iterator[PackedCells]:
    """The stream, as long as no row is missing from it: an error at once, not after the whole atlas."""
    expected = 0
    for pack in stream:
        rows = pack.cell_ids.numpy()
        bad = np.setdiff1d(np.arange(expected, int(rows.max(initial=expected - 1)) + 1), rows)
        bad = np.union1d(bad, rows[pack.lengths.numpy() == 0])
        if bad.size:
            raise _no_known_gene(bad, name)
        expected += len(rows)
        yield pack


def _gathered(stream: Iterator[PackedCells], enough: int) -> Iterator[PackedCells]:
    waiting: list[PackedCells] = []
    tokens = 0
    for pack in stream:
        waiting.append(pack)
        tokens += pack.num_tokens
        if tokens >= enough:
            yield concatenate(waiting)
            waiting, tokens = [], 0
    if waiting:
        yield concatenate(waiting)


def _apply_policy(out: np.ndarray, embedded: np.ndarray, policy: BadCellPolicy, name: str) -> np.ndarray:
    # A cell of special tokens only has a mean over no gene: NaN, and as bad as a cell without tokens.
    good = embedded & ~np.isnan(out).any(axis=1)
    if good.all():
        return out
    if policy == "error":
        raise _no_known_gene(np.flatnonzero(~good), name)
    return out[good] if policy == "skip" else out


def _no_known_gene(rows: np.ndarray, name: str) -> BadCellError:
    return BadCellError(
        f"{rows.size} cells so far have no gene that the model knows: rows "
        f"{', '.join(map(str, rows[:5]))}{' ...' if rows.size > 5 else ''}",
        path=name,
        hint='Pass on_bad_cell="nan" for rows of NaN, or on_bad_cell="skip" to leave them out.',
    )
