"""Reading 10x Genomics .h5 files: Cell Ranger's feature-barcode matrices, versions 2 and 3, and probe files.

They store genes x cells by column, which is cells x genes by row: the CSR reader of h5ad takes them as they
are. Version 3 has one group "matrix" with a table of features, of which those of type "Gene Expression" are
the genes; version 2 has a group for each genome. Sources: Cell Ranger's documented HDF5 layouts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from os import PathLike

import h5py
import numpy as np
import pandas as pd

from scfm.data.cell_table import LoadedTable
from scfm.data.h5_file import Hdf5File, locate, read_whole, reading
from scfm.data.h5_matrix import CsrInHdf5
from scfm.data.h5_table import decoded_array
from scfm.data.matrix import CountMatrix
from scfm.data.matrix_subset import ChosenColumns
from scfm.data.number_types import Array, plain_indices
from scfm.data.raw_counts import Candidate, choose_counts
from scfm.data.source import CellSource
from scfm.errors import FormatError, InvalidArgumentError, ScfmWarning

__all__ = ["choose_genes", "is_tenx", "open_tenx_h5"]

GENE_EXPRESSION = "Gene Expression"


def is_tenx(handle: h5py.File, path: str) -> bool:
    """Whether the file has the group "matrix" of version 3, or a genome's group of version 2."""
    return bool(_groups(handle, path))


def open_tenx_h5(
    path: str | PathLike[str], *, layer: str | None = None, assume_counts: bool = False
) -> CellSource:
    """The cells (barcodes) of a 10x .h5 file, raw counts of its gene-expression features.

    layer: the genome, needed where the file has several. The table of genes has the gene ids as index and
    the column gene_name. Raises as ``open_h5ad`` does.
    """
    file = Hdf5File(path)
    with file.opened() as handle:
        groups = _groups(handle, file.path)
        if not groups:
            raise FormatError(
                "is not a 10x file: there is no group with barcodes, data, indices and indptr",
                path=file.path,
                hint="Expected a feature-barcode matrix as Cell Ranger writes it.",
            )
        # "matrix" is version 3, whose genomes stand in the table of features.
        if "matrix" in groups:
            place, genome = "matrix", layer
        else:
            place, genome = _chosen_genome(groups, layer, file.path), None
        num_genes, num_cells = _shape(handle, place, file.path)
        features = _features(handle, place, num_genes, file.path)
    columns, genes = choose_genes(features, genome=genome, path=file.path)

    def counts() -> CountMatrix:
        matrix = CsrInHdf5(file, place, label=place, num_cells=num_cells, num_genes=num_genes)
        return matrix if len(columns) == num_genes else ChosenColumns(matrix, columns)

    genes_table = LoadedTable(genes)
    candidate = Candidate("X", counts, genes_table)
    choice = choose_counts([candidate], name=file.path, layer="X", assume_counts=assume_counts)
    return CellSource(
        choice.matrix,
        counts_from=place,
        genes=genes_table,
        obs=partial(_barcodes, file, place, num_cells),
        is_counts=choice.is_counts,
        assume_counts=assume_counts,
    )


def _groups(handle: h5py.File, path: str) -> list[str]:
    """Groups at the top that hold a feature-barcode matrix."""
    with reading(path, "/"):
        nodes = {name: locate(handle, name, path=path) for name in handle}
        needed = {"barcodes", "data", "indices", "indptr", "shape"}
        return [name for name, node in nodes.items() if isinstance(node, h5py.Group) and needed <= set(node)]


def _chosen_genome(genomes: Sequence[str], layer: str | None, path: str) -> str:
    """The one genome there is, or the one asked for."""
    if layer is not None and layer in genomes:
        return layer
    if len(genomes) == 1 and layer in (None, "X"):
        return genomes[0]
    if layer is None:
        raise InvalidArgumentError(
            f"holds counts of {len(genomes)} genomes: {', '.join(genomes)}",
            path=path,
            where="layer",
            hint=f"Choose one with layer=, for example layer={genomes[0]!r}.",
        )
    raise InvalidArgumentError(
        f"there is no {layer!r}; the genomes are: {', '.join(genomes)}", path=path, where="layer"
    )


def _shape(handle: h5py.File, place: str, path: str) -> tuple[int, int]:
    """(genes, cells), the table of barcodes agreeing."""
    where = f"{place}/shape"
    shape = plain_indices(
        read_whole(locate(handle, where, path=path), path=path, where=where, num_values=2),
        name=path,
        dataset=where,
    )
    barcodes = locate(handle, f"{place}/barcodes", path=path)
    found = barcodes.shape if isinstance(barcodes, h5py.Dataset) else None
    if int(shape.min()) < 0 or found != (int(shape[1]),):
        raise FormatError(
            f"is {tuple(shape.tolist())} (genes, cells); barcodes has shape {found}",
            path=path,
            where=where,
            hint="The file is damaged; write it again.",
        )
    return int(shape[0]), int(shape[1])


def _features(handle: h5py.File, place: str, num_genes: int, path: str) -> pd.DataFrame:
    """Columns id, gene_name and, where the file has them, feature_type and genome."""

    def column(name: str) -> Array | None:
        node = locate(handle, f"{place}/{name}", path=path)
        if node is None:
            return None
        values = read_whole(node, path=path, where=f"{place}/{name}", num_values=num_genes)
        return decoded_array(values).astype(object)

    version_3 = locate(handle, f"{place}/features", path=path) is not None
    names = (
        {"id": "features/id", "gene_name": "features/name"}
        if version_3
        else {"id": "genes", "gene_name": "gene_names"}
    )
    found = {name: column(where) for name, where in names.items()}
    for name, values in found.items():
        if values is None:
            raise FormatError("is missing", path=path, where=f"{place}/{names[name]}")
    if version_3:
        probed = column("features/gene_id")
        if probed is not None:  # features of probe files are probes of genes
            found = {**found, "id": probed, "probe_id": found["id"]}
        found |= {name: column(f"features/{name}") for name in ("feature_type", "genome")}
    return pd.DataFrame({name: values for name, values in found.items() if values is not None})


def choose_genes(features: pd.DataFrame, *, genome: str | None, path: str) -> tuple[Array, pd.DataFrame]:
    """Which features are the genes asked for, as ascending positions, and their table.

    features: id, gene_name and maybe feature_type and genome; genome: None or "X": the only one. Others
    (antibodies, guides, tags) are left out with a warning. Where Cell Ranger prefixed the genome to the
    names of several genomes' genes, the chosen one's prefix is taken off.
    """
    kept = np.ones(len(features), dtype=bool)
    if "feature_type" in features:
        kept = (features["feature_type"] == GENE_EXPRESSION).to_numpy()
        if len(kept) and not kept.any():
            found = ", ".join(map(repr, features["feature_type"].unique()[:5]))
            raise FormatError(
                f"no feature has the type {GENE_EXPRESSION!r}; there are {found}", path=path, where="features"
            )
        if not kept.all():
            kinds = features["feature_type"][~kept].value_counts()
            listed = ", ".join(f"{number:,} of type {kind}" for kind, number in kinds.items())
            warnings.warn(f"{path}: features that are not genes were left out: {listed}.", ScfmWarning, 3)
    genomes = [str(name) for name in features["genome"][kept].unique()] if "genome" in features else ["X"]
    chosen = _chosen_genome(genomes or ["X"], genome, path)
    if len(genomes) > 1:
        kept &= (features["genome"] == chosen).to_numpy()
    genes = features[kept]
    if len(genomes) > 1:
        genes = genes.assign(**{name: _without(genes[name], f"{chosen}_") for name in ("id", "gene_name")})
    index = pd.Index(genes["id"].astype(str), name="gene_id")
    return np.flatnonzero(kept), genes.drop(columns="id").set_index(index)


def _without(names: pd.Series, prefix: str) -> pd.Series:
    whole = names.astype(str)
    return whole.str.removeprefix(prefix) if whole.str.startswith(prefix).all() else names


def _barcodes(file: Hdf5File, place: str, num_cells: int) -> pd.DataFrame:
    where = f"{place}/barcodes"
    with file.opened() as handle:
        node = locate(handle, where, path=file.path)
        values = read_whole(node, path=file.path, where=where, num_values=num_cells)
    return pd.DataFrame(index=pd.Index(decoded_array(values).astype(str)))
