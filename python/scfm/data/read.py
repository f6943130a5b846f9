"""``scfm.read``: whatever holds counts becomes a CellSource."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scfm.data.anndata_source import open_anndata
from scfm.data.h5_file import Hdf5File, reading
from scfm.data.h5ad import open_h5ad
from scfm.data.loom import open_loom
from scfm.data.remote import open_remote_h5ad
from scfm.data.soma import is_experiment, is_soma, open_soma
from scfm.data.source import CellSource
from scfm.data.source_list import SourceList
from scfm.data.tenx_h5 import is_tenx, open_tenx_h5
from scfm.data.tenx_mtx import find_mtx, is_mtx_name, open_tenx_mtx
from scfm.data.zarr_source import open_zarr
from scfm.data.zarr_store import is_zarr
from scfm.errors import FormatError, InvalidArgumentError, MissingFileError

__all__ = ["is_data_path", "read"]

_Reader = Callable[..., CellSource]

_HDF5_ENDINGS = (".h5", ".hdf5")
_READERS: dict[str, _Reader] = {".h5ad": open_h5ad, ".loom": open_loom, ".zarr": open_zarr}
_ACCEPTED = (
    "an AnnData, a CellSource, a tiledbsoma.Experiment, a list of these, or a path: .h5ad, .zarr, .h5 (10x), "
    ".loom, .mtx or a 10x folder"
)


def read(x: Any, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
    """Raw counts of cells, ready to be read block by block.

    x: an AnnData (in memory, view or backed), a path, a CellSource (returned as is), a tiledbsoma.Experiment,
    or a list of any of these, read one after another. A path: an .h5ad file, an AnnData zarr store (folder or
    zip file), a 10x .h5 file, a 10x folder with matrix.mtx or the matrix file itself, a .loom file, a SOMA
    experiment ("soma://..."), or the URL of an .h5ad file ("https://...", "s3://...").
    layer: "X", "raw.X" or a layer's name (10x: the genome); None takes the first of raw.X, layers["counts"]
    and X that holds raw counts (``.counts_from`` says which). assume_counts: take ``layer``, or X, without
    asking whether its values are whole numbers. Raises InvalidArgumentError, MissingFileError,
    FormatError, NotCountsError, MissingDependencyError.
    """
    if isinstance(x, CellSource):
        if layer is not None or assume_counts:
            raise InvalidArgumentError(
                "layer and assume_counts cannot be given with a CellSource: it has chosen already",
                where="read",
            )
        return x
    if isinstance(x, list | tuple):
        if not x:
            raise InvalidArgumentError(f"got an empty list; accepted are {_ACCEPTED}", where="read")
        return SourceList([read(entry, layer=layer, assume_counts=assume_counts) for entry in x])
    if isinstance(x, str | os.PathLike):
        text = os.fsdecode(x)
        reader = _reader_of_url(text) if "://" in text else _reader_of_path(Path(text))
        return reader(text, layer=layer, assume_counts=assume_counts)
    if is_experiment(x):
        return open_soma(x, layer=layer, assume_counts=assume_counts)
    from anndata import AnnData

    if isinstance(x, AnnData):
        return open_anndata(x, layer=layer, assume_counts=assume_counts)
    raise InvalidArgumentError(
        f"got {type(x).__module__}.{type(x).__qualname__}; accepted are {_ACCEPTED}", where="read"
    )


def is_data_path(path: str) -> bool:
    """Whether a path, by its ending or by what the folder holds, is data rather than a model."""
    if "://" in path or Path(path).suffix.lower() in (*_READERS, *_HDF5_ENDINGS) or is_mtx_name(path):
        return True
    folder = Path(path)
    return folder.is_dir() and (is_zarr(folder) or is_soma(folder) or find_mtx(folder) is not None)


def _reader_of_url(url: str) -> _Reader:
    if url.startswith("soma://"):
        return open_soma
    if url.split("?")[0].lower().endswith((".h5ad", ".h5", ".hdf5")):
        return open_remote_h5ad
    raise InvalidArgumentError(
        "of remote data only .h5ad files and SOMA experiments (soma://...) can be read", path=url
    )


def _reader_of_path(path: Path) -> _Reader:
    """By what a folder holds, or by the ending of a file."""
    if _is_folder(path) and path.suffix.lower() not in (".h5ad", ".loom", *_HDF5_ENDINGS):
        return _reader_of_folder(path)
    if is_mtx_name(path.name):
        return open_tenx_mtx
    if path.suffix.lower() in _HDF5_ENDINGS:
        return _reader_of_hdf5(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None and _is_regular(path) and is_zarr(path):
        reader = open_zarr
    if reader is None:
        ending = f"the ending {path.suffix!r}" if path.suffix else "no ending"
        raise InvalidArgumentError(f"has {ending}; accepted are {_ACCEPTED}", path=path)
    return reader


def _is_folder(path: Path) -> bool:
    """What cannot be looked at is no folder; its reader will say why."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _reader_of_folder(folder: Path) -> _Reader:
    try:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    except PermissionError as error:
        raise InvalidArgumentError("permission denied", path=folder) from error
    if is_soma(folder):
        return open_soma
    if is_zarr(folder) or folder.suffix.lower() == ".zarr":
        return open_zarr
    matrix = find_mtx(folder)
    if matrix is None:
        raise InvalidArgumentError(
            f"is a folder with {names}: neither a zarr store (zarr.json or .zgroup), nor a 10x folder "
            "(matrix.mtx), nor a SOMA experiment",
            path=folder,
        )
    return lambda _, **options: open_tenx_mtx(matrix, **options)


def _reader_of_hdf5(path: Path) -> _Reader:
    """.h5 says little: the groups inside decide."""
    if not path.exists():
        raise MissingFileError("no such file", path=path)
    file = Hdf5File(path)
    with file.opened() as handle:
        if is_tenx(handle, file.path):
            return open_tenx_h5
        with reading(file.path, "/"):
            names = {str(name) for name in handle}  # bytes where a name is no UTF-8
    if {"matrix", "row_attrs", "col_attrs"} <= names:
        return open_loom
    if {"obs", "var"} <= names:
        return open_h5ad
    found = ", ".join(sorted(names)[:8]) or "nothing"
    raise FormatError(
        f"is neither a 10x nor an AnnData file; at its top are: {found}",
        path=path,
        hint="Expected a feature-barcode matrix of Cell Ranger, or X, obs and var of AnnData.",
    )
