"""Reading .h5ad files straight from HDF5, block by block, trusting nothing in them.

Takes the layouts of anndata 0.5 to today: counts as CSR, CSC or dense under X, raw/X or layers/NAME;
tables as groups or compound datasets. A file larger than memory is no obstacle unless its counts are
stored by column (CSC).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike

import h5py
import numpy as np

from scfm.data.h5_file import Hdf5File, check_dataset, locate, reading
from scfm.data.h5_matrix import CscInHdf5, CsrInHdf5, DenseInHdf5
from scfm.data.h5_table import Hdf5Table, decoded, read_table, table_length
from scfm.data.matrix import CountMatrix
from scfm.data.raw_counts import Candidate, choose_counts
from scfm.data.source import CellSource
from scfm.errors import FormatError

__all__ = ["h5ad_source", "matrix_at", "open_h5ad"]


def open_h5ad(
    path: str | PathLike[str], *, layer: str | None = None, assume_counts: bool = False
) -> CellSource:
    """The cells of an .h5ad file, raw counts. Nothing but row pointers and a sample of cells is read.

    layer: "X", "raw.X" or a layer's name; None finds the raw counts. Raises MissingFileError, FormatError,
    UnsafeFileError, NotCountsError, InvalidArgumentError, ResourceError.
    """
    return h5ad_source(Hdf5File(path), layer=layer, assume_counts=assume_counts)


def h5ad_source(file: Hdf5File, *, layer: str | None, assume_counts: bool) -> CellSource:
    """The same from a file that may be open already."""
    choice = choose_counts(_candidates(file), name=file.path, layer=layer, assume_counts=assume_counts)
    return CellSource(
        choice.matrix,
        counts_from=choice.candidate.label,
        genes=choice.candidate.genes,
        obs=Hdf5Table(file, "obs"),
        is_counts=choice.is_counts,
        assume_counts=assume_counts,
    )


def _candidates(file: Hdf5File) -> list[Candidate]:
    """Every matrix of cells x genes in the file: raw.X, the layers (counts first), X."""
    with file.opened() as handle:
        _expect_anndata(handle, file.path)
        num_cells = table_length(handle, "obs", path=file.path)
        num_genes = table_length(handle, "var", path=file.path)
        found: list[Candidate] = []

        def add(label: str, place: str, table: str, genes: int) -> None:
            found.append(
                Candidate(
                    label,
                    partial(matrix_at, file, place, label=label, num_cells=num_cells, num_genes=genes),
                    partial(read_table, file, table),
                )
            )

        # anndata before 0.7 wrote raw as two entries of the root.
        for place, table in (("raw/X", "raw/var"), ("raw.X", "raw.var")):
            if locate(handle, place, path=file.path) is not None:
                add("raw.X", place, table, table_length(handle, table, path=file.path))
        layers = locate(handle, "layers", path=file.path)
        names = list(layers) if isinstance(layers, h5py.Group) else []
        for name in sorted(names, key=lambda entry: entry != "counts"):
            add(f"layers[{name!r}]", f"layers/{name}", "var", num_genes)
        if locate(handle, "X", path=file.path) is not None:
            add("X", "X", "var", num_genes)
    if not found:
        raise FormatError("holds no counts: X, raw/X and layers are missing", path=file.path)
    return found


def _expect_anndata(handle: h5py.File, path: str) -> None:
    with reading(path, "/"):
        names = {decoded(name) for name in handle}  # h5py gives bytes where a name is no UTF-8
    if {"obs", "var"} <= names:
        return
    if {"matrix", "row_attrs", "col_attrs"} <= names:
        hint = "This is a loom file: give it the ending .loom."
    elif "matrix" in names:
        hint = "This looks like a 10x .h5 file: give it the ending .h5."
    else:
        hint = "Expected an .h5ad file as anndata writes it, with X, obs and var."
    found = ", ".join(sorted(names)[:8]) or "nothing"
    raise FormatError(f"is not an AnnData file; at its top are: {found}", path=path, hint=hint)


def matrix_at(file: Hdf5File, place: str, *, label: str, num_cells: int, num_genes: int) -> CountMatrix:
    """The matrix stored at ``place``, its shape compared with the tables before anything is allocated."""
    with file.opened() as handle:
        node = locate(handle, place, path=file.path)
        if node is None:
            raise FormatError("is missing", path=file.path, where=place)
        if isinstance(node, h5py.Dataset):
            check_dataset(node, path=file.path)
            kind = "dense"
        else:
            kind = _sparse_format(node, file.path)
            _compare_shape(node, (num_cells, num_genes), file.path)
    readers: dict[str, Callable[..., CountMatrix]] = {
        "csr": CsrInHdf5,
        "csc": CscInHdf5,
        "dense": DenseInHdf5,
    }
    return readers[kind](file, place, label=label, num_cells=num_cells, num_genes=num_genes)


def _sparse_format(group: h5py.Group, path: str) -> str:
    with reading(path, str(group.name)):
        encoding = decoded(group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "")))
    kind = encoding.removesuffix("_matrix")
    if kind not in ("csr", "csc"):
        raise FormatError(
            f"is a group with encoding-type {encoding!r}; expected csr_matrix, csc_matrix or a dense array",
            path=path,
            where=str(group.name),
        )
    return kind


def _compare_shape(group: h5py.Group, expected: tuple[int, int], path: str) -> None:
    with reading(path, str(group.name)):
        stored = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
        if stored is None:
            return
        shape = tuple(int(length) for length in np.atleast_1d(stored))
    if shape != expected:
        raise FormatError(
            f"has shape {shape}; obs and var describe {expected} (cells, genes)",
            path=path,
            where=str(group.name),
            hint="The file is damaged; write it again.",
        )
