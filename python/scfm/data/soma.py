"""Reading TileDB-SOMA experiments, as CELLxGENE Census publishes its atlases (extra ``census``).

Counts are a sparse array of (cell, gene, value) addressed by soma_joinid; a block of cells is one query, its
entries sorted into rows here. Cells stand in the order of their ids. Slower than any file: for whole atlases
export the cells that are needed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.cell_table import CellTable, LoadedTable
from scfm.data.csr import gather_rows
from scfm.data.h5_file import reading
from scfm.data.matrix import CountMatrix, CsrParts
from scfm.data.number_types import Array, check_value_type, plain_values
from scfm.data.raw_counts import Candidate, choose_counts
from scfm.data.source import CellSource
from scfm.errors import FormatError, InvalidArgumentError, MissingDependencyError, MissingFileError

__all__ = ["is_experiment", "is_soma", "open_soma"]

MEASUREMENT = "RNA"
_PREFIX = "soma://"
_ID = "soma_joinid"


def is_soma(folder: Path) -> bool:
    """Whether this is the folder of a TileDB group, which a SOMA experiment is."""
    return (folder / "__group").is_dir() or (folder / "__tiledb_group.tdb").is_file()


def is_experiment(x: Any) -> bool:
    """Whether this is a tiledbsoma.Experiment; nothing is imported to find out."""
    return any(
        kind.__name__ == "Experiment" and kind.__module__.split(".")[0] in ("tiledbsoma", "somacore")
        for kind in type(x).__mro__
    )


def open_soma(x: Any, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
    """The cells of a SOMA experiment, raw counts of the measurement "RNA".

    x: an open tiledbsoma.Experiment, a folder, or "soma://" before a path or URI. layer: name of the layer of
    X, "raw" unless given. Raises MissingDependencyError, MissingFileError, FormatError, NotCountsError,
    InvalidArgumentError.
    """
    experiment = _Experiment(x)
    chosen = "raw" if layer in (None, "X") else str(layer)
    with experiment.opened() as opened:
        names = _layers(opened, experiment.name)
        if chosen not in names:
            raise InvalidArgumentError(
                f"there is no {chosen!r}; there are: {', '.join(names)}", path=experiment.name, where="layer"
            )
        with reading(experiment.name, "obs"):
            cell_ids = _ids(opened.obs)
        with reading(experiment.name, f"ms/{MEASUREMENT}/var"):
            genes = _genes(opened.ms[MEASUREMENT].var)
    place = f"ms/{MEASUREMENT}/X/{chosen}"
    genes_table = LoadedTable(genes.drop(columns=_ID))

    def counts() -> CountMatrix:
        return _SomaCounts(experiment, place, cell_ids, genes[_ID].to_numpy())

    candidate = Candidate("X", counts, genes_table)
    choice = choose_counts([candidate], name=experiment.name, layer="X", assume_counts=assume_counts)
    return CellSource(
        choice.matrix,
        counts_from=f"X[{chosen!r}]",
        genes=genes_table,
        obs=_SomaCells(experiment),
        is_counts=choice.is_counts,
        assume_counts=assume_counts,
    )


class _Experiment:
    """An experiment by its URI, opened for each use; or an object that the caller keeps open."""

    def __init__(self, x: Any) -> None:
        self._given = x if is_experiment(x) else None
        text = x.uri if is_experiment(x) else str(x)
        self.name = text
        self._uri = text.removeprefix(_PREFIX)
        if "://" not in self._uri and not Path(self._uri).is_dir():
            raise MissingFileError("no such folder", path=self._uri)

    @contextmanager
    def opened(self) -> Iterator[Any]:
        if self._given is not None:
            yield self._given
            return
        try:
            import tiledbsoma
        except ImportError as error:
            raise MissingDependencyError(
                "reading SOMA experiments needs tiledbsoma",
                path=self.name,
                hint="Install it with pip install scfm[census].",
            ) from error
        with reading(self.name, "/"):
            found = tiledbsoma.open(self._uri)
        with found:
            if not isinstance(found, tiledbsoma.Experiment):
                raise FormatError(
                    f"is a SOMA {type(found).__name__}, expected an Experiment",
                    path=self.name,
                    hint="Of a Census, give one organism: .../census_data/homo_sapiens.",
                )
            yield found


def _layers(opened: Any, name: str) -> list[str]:
    with reading(name, "ms"):
        if MEASUREMENT not in opened.ms:
            raise FormatError(
                f"has no measurement {MEASUREMENT!r}; there are: {', '.join(opened.ms)}",
                path=name,
                where="ms",
            )
        return list(opened.ms[MEASUREMENT].X)


def _ids(table: Any) -> NDArray[np.int64]:
    """The ids of a table's rows, ascending."""
    found = table.read(column_names=[_ID]).concat()[_ID].to_numpy()
    return np.sort(found.astype(np.int64, copy=False))


def _genes(table: Any) -> pd.DataFrame:
    """var in the order of its ids, with the genes' ids as index and soma_joinid among the columns."""
    genes = table.read().concat().to_pandas().sort_values(_ID)
    named = next((name for name in ("feature_id", "var_id") if name in genes), None)
    index = genes[named] if named else genes[_ID]
    named_genes: pd.DataFrame = genes.set_index(pd.Index(index.astype(str)))
    return named_genes


class _SomaCounts(CountMatrix):
    """The layer at ``place``; row and column ``i`` are the i-th of the given, ascending ids."""

    reader = "tiledbsoma"

    def __init__(
        self, experiment: _Experiment, place: str, cell_ids: NDArray[np.int64], gene_ids: NDArray[np.int64]
    ) -> None:
        super().__init__(
            name=experiment.name, dataset=place, num_cells=len(cell_ids), num_genes=len(gene_ids)
        )
        self._experiment = experiment
        self._layer = place.rpartition("/")[2]
        self._cell_ids = cell_ids
        self._gene_ids = gene_ids

    @contextmanager
    def opened(self) -> Iterator[Callable[[NDArray[np.int64]], CsrParts]]:
        with self._experiment.opened() as opened:
            with reading(self.name, self.dataset):
                array = opened.ms[MEASUREMENT].X[self._layer]
            yield lambda rows: self._read(array, rows)

    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        with self.opened() as read:
            return read(rows)

    def _read(self, array: Any, rows: NDArray[np.int64]) -> CsrParts:
        stored, inverse = np.unique(rows, return_inverse=True)
        wanted = self._cell_ids[stored]
        cells, genes, values = self._entries(array, wanted)
        row_of = _positions(wanted, cells, self.name, f"{self.dataset}: soma_dim_0")
        column_of = _positions(self._gene_ids, genes, self.name, f"{self.dataset}: soma_dim_1")
        order = np.lexsort((column_of, row_of))
        indptr = np.zeros(len(stored) + 1, dtype=np.int64)
        np.cumsum(np.bincount(row_of, minlength=len(stored)), out=indptr[1:])
        chosen, positions = gather_rows(indptr, inverse.astype(np.int64, copy=False))
        order = order[positions]
        return CsrParts(
            chosen,
            column_of[order].astype(np.int32),
            plain_values(values[order], name=self.name, dataset=self.dataset),
        )

    def _entries(self, array: Any, cell_ids: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        """(cell ids, gene ids, values) of all entries of these cells."""
        if not len(cell_ids):
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        first, last = int(cell_ids[0]), int(cell_ids[-1])
        # A range is told in two numbers; other choices are told one by one.
        contiguous = last - first + 1 == len(cell_ids)
        with reading(self.name, f"{self.dataset}, soma_joinid {first} to {last}"):
            asked = slice(first, last) if contiguous else cell_ids
            table = array.read((asked,)).tables().concat()
            columns = [table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data")]
        check_value_type(columns[2].dtype, name=self.name, dataset=self.dataset)
        return columns[0], columns[1], columns[2]


def _positions(known: NDArray[np.int64], ids: Array, name: str, where: str) -> NDArray[np.int64]:
    """Place of each id among the known, ascending ones."""
    found = np.searchsorted(known, ids)
    wrong = (
        (found >= len(known)) | (known[np.minimum(found, len(known) - 1)] != ids)
        if len(known)
        else ids == ids
    )
    if wrong.any():
        raise FormatError(
            f"an entry names soma_joinid {int(ids[np.flatnonzero(wrong)[0]])}, which its table does not have",
            path=name,
            where=where,
            hint="The experiment is damaged or was written while it was read.",
        )
    return found


class _SomaCells(CellTable):
    """obs, its rows in the order of their ids."""

    def __init__(self, experiment: _Experiment) -> None:
        self._experiment = experiment

    def __call__(self) -> pd.DataFrame:
        table = self._frame(None)
        named = next((name for name in ("obs_id", "cell_id") if name in table), _ID)
        return table.set_index(pd.Index(table[named].astype(str), name=named))

    def names(self) -> list[str]:
        with self._experiment.opened() as opened, reading(self._experiment.name, "obs"):
            return list(opened.obs.keys())

    def column(self, name: str) -> pd.Series | None:
        if name not in self.names():
            return None
        column: pd.Series = self._frame(list(dict.fromkeys([_ID, name])))[name]
        return column.reset_index(drop=True)

    def _frame(self, names: list[str] | None) -> pd.DataFrame:
        with self._experiment.opened() as opened, reading(self._experiment.name, "obs"):
            table: pd.DataFrame = opened.obs.read(column_names=names).concat().to_pandas()
            return table.sort_values(_ID)
