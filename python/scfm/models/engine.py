"""The embedding engine: blocks of cells are read, tokenized, sorted by length and embedded, in constant memory.

Cells are gathered until there are several batches' worth, so that sorting by length can fill each batch, and
every result goes back to its own row: output order is the input's, whatever the batches were. That is also
why a batch that does not fit in memory can simply be split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from scfm.data.packed import PackedCells, concatenate
from scfm.data.source import CellSource
from scfm.errors import BadCellError, InvalidArgumentError, ResourceError
from scfm.models.batches import token_budget_batches
from scfm.models.token_budget import TokenBudget, is_out_of_memory

if TYPE_CHECKING:
    from scfm.models.base import FoundationModel

BadCellPolicy = Literal["error", "nan", "nan-row", "skip"]
Progress = Callable[[int, int, int], None]
Labels = Callable[[np.ndarray], list[str]]

_BATCHES_IN_HAND = 16


def default_token_budget(device: torch.device) -> int:
    """Tokens computed at once: enough to fill the device, small enough for its memory."""
    return 65_536 if device.type == "cuda" else 8_192


def packed_batches(packed: PackedCells, token_budget: int) -> Iterator[PackedCells]:
    """The pack's cells in token-budget batches, longest first."""
    for chosen in token_budget_batches(packed.lengths, token_budget):
        yield packed.select(chosen)


@dataclass(frozen=True)
class EmbeddedCells:
    """values: float32 (cells, hidden_size), NaN where a cell has no embedding. without_genes: positions of the
    cells without any gene that the model knows (or with impossible counts); not_finite: positions of other
    cells whose embedding holds NaN or infinity, empty unless these were asked to be kept.
    """

    values: np.ndarray
    without_genes: np.ndarray
    not_finite: np.ndarray
    num_tokens: int


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
    budget = TokenBudget(default_token_budget(model.device) if token_budget is None else token_budget)
    if not isinstance(data, PackedCells):
        data = model.read_cells(data, counts_layer=counts_layer, assume_counts=assume_counts)
    found = embed_source(
        model,
        data,
        layer=layer,
        pooling=pooling,
        token_budget=budget,
        stop_at_bad_cell=on_bad_cell == "error",
        progress=progress,
        species=species,
    )
    if on_bad_cell == "skip":
        return np.delete(found.values, found.without_genes, axis=0)
    return found.values


@torch.inference_mode()
def embed_source(
    model: FoundationModel,
    data: CellSource | PackedCells,
    *,
    layer: int,
    pooling: str,
    token_budget: TokenBudget,
    stop_at_bad_cell: bool,
    keep_not_finite: bool = False,
    progress: Progress | None = None,
    species: str | None = None,
) -> EmbeddedCells:
    """Every cell's embedding, and which cells have none.

    stop_at_bad_cell: BadCellError at the first cell without known genes. An embedding that is not finite
    although its cell has genes raises BadCellError too, unless ``keep_not_finite``. ResourceError names the
    cell that does not fit in memory even alone.
    """
    model.check_embedding(layer, pooling)
    if isinstance(data, PackedCells):
        num_cells, name, label = data.num_cells, "PackedCells", _positions
        stream = iter([_renumbered(data)])
    else:
        num_cells, name, label = len(data), data.name, data.row_labels
        # obs["filter_pass"] thins what the authors tokenize for training; here every cell gets its row.
        stream = model.tokenizer.packs(
            data, species=species, use_filter_pass=False, empty_bad_cells=not stop_at_bad_cell
        )
    if stop_at_bad_cell:
        stream = _complete(stream, name, label)
    out = np.full((num_cells, model.embedding_size(pooling)), np.nan, dtype=np.float32)
    embedded = np.zeros(num_cells, dtype=bool)
    not_finite: list[int] = []
    done = tokens = 0
    for gathered in _gathered(stream, token_budget.tokens * _BATCHES_IN_HAND):
        # A cell without tokens has no first token to read; it stays NaN and follows the caller's policy.
        pack = gathered.select(gathered.lengths > 0)
        for batch, values in _embedded(model, pack, layer, pooling, token_budget, name, label):
            cells = batch.cell_ids.numpy()
            out[cells] = values
            embedded[cells] = True
            if not np.isfinite(values).all():
                genes, wrong = _split_not_finite(model, batch, values)
                embedded[genes] = False
                if wrong.size and not keep_not_finite:
                    raise _not_finite(wrong, name, label)
                not_finite += wrong.tolist()
            done, tokens = done + batch.num_cells, tokens + batch.num_tokens
            if progress is not None:
                progress(done, num_cells, tokens)
    if progress is not None:
        progress(num_cells, num_cells, tokens)
    without = np.flatnonzero(~embedded)
    if stop_at_bad_cell and without.size:
        raise _no_known_gene(without, name, label)
    return EmbeddedCells(out, without, np.array(sorted(not_finite), dtype=np.int64), tokens)


def _embedded(
    model: FoundationModel,
    pack: PackedCells,
    layer: int,
    pooling: str,
    budget: TokenBudget,
    name: str,
    label: Labels,
) -> Iterator[tuple[PackedCells, np.ndarray]]:
    """Batches within the budget, longest cells first, each with its embeddings; smaller ones after a failure."""
    order = torch.argsort(pack.lengths, descending=True, stable=True)
    ends = torch.cumsum(pack.lengths[order].to(torch.int64), 0)
    start, before = 0, 0
    while start < len(order):
        stop = max(int(torch.searchsorted(ends, before + budget.tokens, right=True)), start + 1)
        batch = pack.select(order[start:stop])
        values = _try(model, batch, layer, pooling)
        if values is None:
            if batch.num_cells == 1:
                raise _too_long(batch, name, label)
            budget.halve(batch.num_tokens)
            continue
        budget.succeeded()
        yield batch, values
        start, before = stop, int(ends[stop - 1])


def _try(model: FoundationModel, batch: PackedCells, layer: int, pooling: str) -> np.ndarray | None:
    """The batch's embeddings, or None if memory ran out; whatever the attempt held is let go by then."""
    try:
        values: np.ndarray = model.embed_batch(batch, layer=layer, pooling=pooling).float().cpu().numpy()
        return values
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _split_not_finite(
    model: FoundationModel, batch: PackedCells, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of cells that hold special tokens only (a mean over no gene), and of those that went wrong."""
    specials = torch.tensor(
        [t for t, n in model.token_names().items() if n.startswith("<")], dtype=torch.int32
    )
    of_gene = ~torch.isin(batch.token_ids, specials)
    counted = torch.segment_reduce(of_gene.float(), "sum", lengths=batch.lengths.to(torch.int64), axis=0)
    bad = ~np.isfinite(values).all(axis=1)
    cells, has_genes = batch.cell_ids.numpy(), counted.numpy() > 0
    return cells[bad & ~has_genes], np.sort(cells[bad & has_genes])


def _renumbered(packed: PackedCells) -> PackedCells:
    """Rows of the output are positions in the pack, whatever source its cells came from."""
    return PackedCells(
        packed.token_ids, packed.values, packed.cu_seqlens, torch.arange(packed.num_cells, dtype=torch.int64)
    )


def _complete(stream: Iterator[PackedCells], name: str, label: Labels) -> Iterator[PackedCells]:
    """The stream, as long as no cell is missing from it: an error at once, not after the whole atlas."""
    expected = 0
    for pack in stream:
        cells = pack.cell_ids.numpy()
        bad = np.setdiff1d(np.arange(expected, int(cells.max(initial=expected - 1)) + 1), cells)
        bad = np.union1d(bad, cells[pack.lengths.numpy() == 0])
        if bad.size:
            raise _no_known_gene(bad, name, label)
        expected += len(cells)
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


def _positions(cells: np.ndarray) -> list[str]:
    return [str(cell) for cell in cells]


def _named(cells: np.ndarray, label: Labels) -> str:
    """The first few of these cells, as a user would look for them."""
    return f"{', '.join(label(cells[:5]))}{' ...' if cells.size > 5 else ''}"


def _no_known_gene(cells: np.ndarray, name: str, label: Labels) -> BadCellError:
    return BadCellError(
        f"{cells.size} cells so far have no gene that the model knows: rows {_named(cells, label)}",
        path=name,
        hint='Pass on_bad_cell="nan" for rows of NaN, or on_bad_cell="skip" to leave them out (scfm embed: '
        "--on-bad-cell, in a new folder).",
    )


def _not_finite(cells: np.ndarray, name: str, label: Labels) -> BadCellError:
    return BadCellError(
        f"{cells.size} cells with good counts got NaN or infinity in their embedding: rows {_named(cells, label)}",
        path=name,
        hint='Compute in float32 (dtype="float32"; scfm embed: --dtype float32, in a new folder); if that does '
        "not help, the weights are damaged.",
    )


def _too_long(batch: PackedCells, name: str, label: Labels) -> ResourceError:
    return ResourceError(
        f"one cell of {batch.num_tokens:,} tokens does not fit in memory: row "
        f"{_named(batch.cell_ids.numpy(), label)}",
        path=name,
        hint="Use a machine or GPU with more memory, or a model that takes fewer tokens.",
    )
