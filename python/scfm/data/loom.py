"""Reading .loom files: a dense matrix, genes x cells, with attributes of rows (genes) and columns (cells).

Read-only and block by block; the file is never written to. Loom's names are kept, and the usual ones
become the indices of the two tables (Gene or var_names, CellID or obs_names).
"""

from __future__ import annotations

from functools import partial
from os import PathLike

import h5py
import pandas as pd

from scfm.data.cell_table import CellTable
from scfm.data.h5_file import Hdf5File, check_dataset, locate, read_whole, reading
from scfm.data.h5_matrix import DenseInHdf5
from scfm.data.h5_table import decoded_array
from scfm.data.number_types import Array
from scfm.data.raw_counts import Candidate, choose_counts
from scfm.data.source import CellSource
from scfm.errors import FormatError

__all__ = ["open_loom"]

_GENE_NAMES = ("var_names", "Gene", "gene_name", "Accession", "ensembl_id")
_CELL_NAMES = ("CellID", "obs_names", "cell_id")


def open_loom(
    path: str | PathLike[str], *, layer: str | None = None, assume_counts: bool = False
) -> CellSource:
    """The cells of a .loom file, raw counts; ``dense`` is True.

    layer: "X" for the main matrix, or a layer's name. Raises as ``open_h5ad`` does.
    """
    file = Hdf5File(path)
    with file.opened() as handle:
        matrix = locate(handle, "matrix", path=file.path)
        if not isinstance(matrix, h5py.Dataset) or matrix.ndim != 2:
            raise FormatError(
                "/matrix, a table of genes x cells, is missing", path=file.path, hint="Is this a loom file?"
            )
        check_dataset(matrix, path=file.path)
        num_genes, num_cells = (int(length) for length in matrix.shape)
        layers = locate(handle, "layers", path=file.path)
        names = sorted(layers) if isinstance(layers, h5py.Group) else []
    genes = partial(_attributes, file, "row_attrs", num_genes, _GENE_NAMES)
    places = {f"layers[{name!r}]": f"layers/{name}" for name in names} | {"X": "matrix"}
    candidates = [
        Candidate(
            label,
            partial(
                DenseInHdf5,
                file,
                place,
                label=place,
                num_cells=num_cells,
                num_genes=num_genes,
                transposed=True,
            ),
            genes,
        )
        for label, place in places.items()
    ]
    choice = choose_counts(candidates, name=file.path, layer=layer, assume_counts=assume_counts)
    return CellSource(
        choice.matrix,
        counts_from=choice.candidate.label,
        genes=genes,
        obs=_CellAttributes(file, num_cells),
        is_counts=choice.is_counts,
        assume_counts=assume_counts,
    )


class _CellAttributes(CellTable):
    """The one-dimensional column attributes; wider ones (embeddings) are left out."""

    def __init__(self, file: Hdf5File, num_cells: int) -> None:
        self._file = file
        self._num_cells = num_cells

    def __call__(self) -> pd.DataFrame:
        return _attributes(self._file, "col_attrs", self._num_cells, _CELL_NAMES)

    def names(self) -> list[str]:
        with self._file.opened() as handle:
            return _names(handle, "col_attrs", self._file.path)

    def column(self, name: str) -> pd.Series | None:
        with self._file.opened() as handle:
            if name not in _names(handle, "col_attrs", self._file.path):
                return None
            values = _attribute(handle, f"col_attrs/{name}", self._num_cells, self._file.path)
        return pd.Series(values, name=name)


def _attributes(file: Hdf5File, place: str, length: int, index_names: tuple[str, ...]) -> pd.DataFrame:
    with file.opened() as handle:
        names = _names(handle, place, file.path)
        columns = {name: _attribute(handle, f"{place}/{name}", length, file.path) for name in names}
    table = pd.DataFrame(columns, index=pd.RangeIndex(length))
    chosen = next((name for name in index_names if name in columns), None)
    table.index = pd.Index(table[chosen].astype(str) if chosen else [str(i) for i in range(length)])
    return table


def _names(handle: h5py.File, place: str, path: str) -> list[str]:
    """The attributes of one dimension."""
    group = locate(handle, place, path=path)
    if not isinstance(group, h5py.Group):
        raise FormatError("is missing", path=path, where=place, hint="Is this a loom file?")
    with reading(path, place):
        nodes = {name: locate(handle, f"{place}/{name}", path=path) for name in group}
        return [name for name, node in nodes.items() if isinstance(node, h5py.Dataset) and node.ndim == 1]


def _attribute(handle: h5py.File, where: str, length: int, path: str) -> Array:
    node = locate(handle, where, path=path)
    return decoded_array(read_whole(node, path=path, where=where, num_values=length))
