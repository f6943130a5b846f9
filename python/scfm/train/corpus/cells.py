"""The cells of a corpus: which of each source's are used, and which of those are kept out of training.

Cells are counted through all parts of all sources, end to end, those that ``keep`` leaves out not among them. A cell is
held out where a table says so, or by a uniform number that depends on (seed, cell) only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.data.source_list import SourceList
from scfm.errors import ConfigError

__all__ = ["cells_where", "held_out_cells", "open_cells", "opened", "sample_cells", "with_lowest_words"]

_PURPOSE_HELD_OUT = 1
_WORDS_A_CELL = 4  # of a Philox counter
_CELLS_AT_ONCE = 1 << 20
_NAMED = 5


def open_cells(
    data: Sequence[Any],
    *,
    layer: str | None,
    folder: str | Path | None,
    held_out_fraction: float,
    seed: int,
) -> tuple[SourceList, NDArray[np.bool_]]:
    """The sources of a run's ``data`` as one list, and bool (cells,): held out.

    folder: where relative paths start. Raises ConfigError for tables that do not fit their file, and the readers'
    errors.
    """
    if not data:
        raise ConfigError("no data given", where="data", hint="Name at least one .h5ad file.")
    parts: list[CellSource] = []
    chosen: list[NDArray[np.bool_]] = []
    for number, item in enumerate(data):
        table = item if isinstance(item, Mapping) else {"path": item}
        source = opened(table["path"], layer=table.get("layer", layer), folder=folder)
        where = f"data[{number}]"
        if table.get("keep"):
            source = source.select(cells_where(source, table["keep"], every=True, where=f"{where}.keep"))
        held_out = np.zeros(len(source), dtype=bool)
        if table.get("held_out"):
            held_out = cells_where(source, table["held_out"], every=False, where=f"{where}.held_out")
        parts += source.parts
        # A list that was reordered: its parts laid end to end are what counts here.
        chosen.append(held_out[source.place_of(np.arange(len(source)))])
    cells = SourceList(parts)
    held = np.concatenate(chosen) | held_out_cells(len(cells), held_out_fraction, seed)
    return cells, held


def opened(item: Any, *, layer: str | None, folder: str | Path | None) -> CellSource:
    """The raw counts of a path, an AnnData or a CellSource."""
    if isinstance(item, str | Path) and folder is not None and "://" not in str(item):
        item = Path(folder) / item
    return read(item, layer=layer)


def cells_where(
    source: CellSource, chosen: Mapping[str, Sequence[Any]], *, every: bool, where: str
) -> NDArray[np.bool_]:
    """bool (cells,): cells with one of the values in every (or in any) of these columns of obs.

    Raises ConfigError naming a column, or a value, that the source does not have.
    """
    found = np.full(len(source), every)
    for name, values in chosen.items():
        column = source.obs_column(name)
        if column is None:
            raise ConfigError(
                f"there is no column {name!r}; there are: {', '.join(source.obs_column_names) or 'none'}",
                path=source.name,
                where=where,
            )
        present = column.unique().tolist()
        missing = [value for value in values if value not in present]
        if missing:
            shown = ", ".join(repr(value) for value in present[:_NAMED])
            raise ConfigError(
                f"no cell has {missing[0]!r:.60} in {name!r}; values there are {shown}"
                + (f" and {len(present) - _NAMED} more" if len(present) > _NAMED else ""),
                path=source.name,
                where=where,
            )
        matches = column.isin(list(values)).to_numpy(dtype=bool)
        found = found & matches if every else found | matches
    return found


def held_out_cells(num_cells: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """bool (cells,): kept out of training. Keyed by (seed, cell), so it never changes with the company."""
    found = np.zeros(num_cells, dtype=bool)
    if fraction > 0:
        for cells, words in _words(num_cells, seed, _PURPOSE_HELD_OUT):
            # The upper 53 bits are a uniform number in [0, 1).
            found[cells] = (words[:, 0] >> np.uint64(11)) < fraction * 2.0**53
    return found


def sample_cells(eligible: NDArray[np.bool_], most_cells: int, seed: int) -> NDArray[np.int64]:
    """Ascending, at most so many of the eligible cells; a cell's chance depends on (seed, cell) only."""
    # Another word than the one that decides which cells are held out.
    return with_lowest_words(
        (
            (span.start + np.flatnonzero(eligible[span]), words[eligible[span], 1])
            for span, words in _words(len(eligible), seed, _PURPOSE_HELD_OUT)
        ),
        most_cells,
    )


def with_lowest_words(
    stretches: Iterable[tuple[NDArray[np.int64], NDArray[np.unsignedinteger]]], most_cells: int
) -> NDArray[np.int64]:
    """Ascending, the cells that drew the lowest words; no more than a stretch of others is held at once."""
    chosen, lowest = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
    for cells, words in stretches:
        chosen, lowest = np.concatenate([chosen, cells]), np.concatenate([lowest, words])
        if len(chosen) > most_cells:
            kept = np.argpartition(lowest, most_cells - 1)[:most_cells]
            chosen, lowest = chosen[kept], lowest[kept]
    return np.sort(chosen)


def _words(num_cells: int, seed: int, purpose: int) -> Iterator[tuple[slice, NDArray[np.uint64]]]:
    """Stretches of cells with four Philox words for each: key (seed, purpose), counter (cell + 1, 0, 0, 0)."""
    philox = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=0)
    for start in range(0, num_cells, _CELLS_AT_ONCE):
        stop = min(start + _CELLS_AT_ONCE, num_cells)
        words = philox.random_raw((stop - start) * _WORDS_A_CELL)
        yield slice(start, stop), words.reshape(-1, _WORDS_A_CELL)
