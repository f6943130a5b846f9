"""Reading .loom files: a dense matrix, genes x cells, with attributes of rows (genes) and columns (cells).

Read-only and block by block; the file is never written to. Loom's names are kept, and the usual ones
become the indices of the two tables (Gene or var_names, CellID or obs_names).
"""

from __future__ import annotations

from functools import partial
from os import PathLike

import h5py
import pandas as pd

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
        obs=partial(_attributes, file, "col_attrs", num_cells, _CELL_NAMES),
        is_counts=choice.is_counts,
        assume_counts=assume_counts,
    )


def _attributes(file: Hdf5File, place: str, length: int, index_names: tuple[str, ...]) -> pd.DataFrame:
    """The one-dimensional attributes as a table; wider ones (embeddings) are left out."""
    columns: dict[str, Array] = {}
    with file.opened() as handle:
        group = locate(handle, place, path=file.path)
        if not isinstance(group, h5py.Group):
            raise FormatError("is missing", path=file.path, where=place, hint="Is this a loom file?")
        with reading(file.path, place):
            names = list(group)
        for name in names:
            where = f"{place}/{name}"
            node = locate(handle, where, path=file.path)
            if isinstance(node, h5py.Dataset) and node.ndim == 1:
                values = read_whole(node, path=file.path, where=where, num_values=length)
                columns[name] = decoded_array(values)
    table = pd.DataFrame(columns, index=pd.RangeIndex(length))
    chosen = next((name for name in index_names if name in columns), None)
    table.index = pd.Index(table[chosen].astype(str) if chosen else [str(i) for i in range(length)])
    return table
