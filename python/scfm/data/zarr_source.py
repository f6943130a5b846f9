"""Reading AnnData zarr stores (formats 2 and 3, sharded or not, folders or zip files), trusting nothing.

The same candidates in the same order as for .h5ad. A collection, as annbatch writes it (groups dataset_0,
dataset_1, ...), is read as the list of its members.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path

from scfm.data.matrix import CountMatrix
from scfm.data.raw_counts import Candidate, choose_counts
from scfm.data.source import CellSource
from scfm.data.source_list import SourceList
from scfm.data.zarr_matrix import CscInZarr, CsrInZarr, DenseInZarr
from scfm.data.zarr_store import ZarrStore
from scfm.data.zarr_table import ZarrTable
from scfm.errors import FormatError

__all__ = ["open_zarr"]

_MEMBER = re.compile(r"dataset_(\d+)")


def open_zarr(
    path: str | PathLike[str], *, layer: str | None = None, assume_counts: bool = False
) -> CellSource:
    """The cells of an AnnData zarr store, raw counts; of a collection, a list of its members' cells.

    layer: "X", "raw.X" or a layer's name; None finds the raw counts. Raises MissingFileError, FormatError,
    UnsafeFileError, NotCountsError, InvalidArgumentError, ResourceError.
    """
    store = ZarrStore(path)
    names = store.children("")
    if {"obs", "var"} <= set(names):
        return _open_group(store, layer, assume_counts)
    members = sorted(
        (name for name in names if _MEMBER.fullmatch(name)), key=lambda name: int(name.rpartition("_")[2])
    )
    if not members or not store.is_folder:
        raise FormatError(
            f"is not an AnnData store; at its top are: {', '.join(names[:8]) or 'nothing'}",
            path=store.path,
            hint="Expected a store as AnnData.write_zarr makes it, with X, obs and var.",
        )
    stores = [ZarrStore(Path(path) / name) for name in members]
    return SourceList([_open_group(member, layer, assume_counts) for member in stores])


def _open_group(store: ZarrStore, layer: str | None, assume_counts: bool) -> CellSource:
    choice = choose_counts(_candidates(store), name=store.path, layer=layer, assume_counts=assume_counts)
    return CellSource(
        choice.matrix,
        counts_from=choice.candidate.label,
        genes=choice.candidate.genes,
        obs=ZarrTable(store, "obs"),
        is_counts=choice.is_counts,
        assume_counts=assume_counts,
    )


def _candidates(store: ZarrStore) -> list[Candidate]:
    """Every matrix of cells x genes in the store: raw.X, the layers (counts first), X."""
    num_cells = len(ZarrTable(store, "obs"))
    var = ZarrTable(store, "var")
    found: list[Candidate] = []

    def add(label: str, place: str, genes: ZarrTable) -> None:
        matrix = partial(_matrix_at, store, place, label=label, num_cells=num_cells, num_genes=len(genes))
        found.append(Candidate(label, matrix, genes))

    if store.metadata("raw/X") is not None:
        add("raw.X", "raw/X", ZarrTable(store, "raw/var"))
    layers = store.children("layers")
    for layer in sorted(layers, key=lambda entry: entry != "counts"):
        add(f"layers[{layer!r}]", f"layers/{layer}", var)
    if store.metadata("X") is not None:
        add("X", "X", var)
    if not found:
        raise FormatError("holds no counts: X, raw/X and layers are missing", path=store.path)
    return found


def _matrix_at(store: ZarrStore, place: str, *, label: str, num_cells: int, num_genes: int) -> CountMatrix:
    """The matrix stored at ``place``, its shape compared with the tables before anything is allocated."""
    found = store.metadata(place)
    if found is None:
        raise FormatError("is missing", path=store.path, where=place)
    kind = "dense"
    if found["node_type"] == "group":
        attributes = found["attributes"]
        encoding = str(attributes.get("encoding-type", attributes.get("h5sparse_format", "")))
        kind = encoding.removesuffix("_matrix")
        if kind not in ("csr", "csc"):
            raise FormatError(
                f"is a group with encoding-type {encoding[:60]!r}; expected csr_matrix, csc_matrix or a dense "
                "array",
                path=store.path,
                where=place,
            )
        shape = attributes.get("shape", attributes.get("h5sparse_shape"))
        if shape is not None and shape != [num_cells, num_genes]:
            raise FormatError(
                f"has shape {shape!s:.60}; obs and var describe {(num_cells, num_genes)} (cells, genes)",
                path=store.path,
                where=place,
                hint="The store is damaged; write it again.",
            )
    readers: dict[str, Callable[..., CountMatrix]] = {
        "csr": CsrInZarr,
        "csc": CscInZarr,
        "dense": DenseInZarr,
    }
    return readers[kind](store, place, label=label, num_cells=num_cells, num_genes=num_genes)
