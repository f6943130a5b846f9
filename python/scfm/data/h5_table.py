"""The tables of cells (obs) and genes (var) in an h5ad file, whole or a column at a time.

anndata's own reader does the decoding, which has grown over years (categoricals, nullable types, string
arrays); before it runs, everything under the table is checked to lie in this file, and whatever it raises
becomes an error that names the file and the table. Tables of very old files, stored as one compound
dataset, are read here.
"""

from __future__ import annotations

import warnings
from typing import Any

import h5py
import numpy as np
import pandas as pd

from scfm.data.cell_table import CellTable
from scfm.data.h5_file import Hdf5File, check_dataset, check_tree, locate, reading
from scfm.errors import FormatError, UnsafeFileError

__all__ = ["Hdf5Table", "decoded", "read_table", "table_length"]


class Hdf5Table(CellTable):
    """The table at ``place`` of an h5ad file."""

    def __init__(self, file: Hdf5File, place: str) -> None:
        self._file = file
        self._place = place

    def __call__(self) -> pd.DataFrame:
        return read_table(self._file, self._place)

    def names(self) -> list[str]:
        with self._file.opened() as handle:
            return self._names(self._node(handle))

    def column(self, name: str) -> pd.Series | None:
        path = self._file.path
        with self._file.opened() as handle:
            table = self._node(handle)
            if name not in self._names(table):
                return None
            if isinstance(table, h5py.Dataset):
                check_tree(table, path=path)
                with reading(path, f"{self._place}[{name!r}]"):
                    return pd.Series(decoded_array(table.fields(name)[()]), name=name)
            _check_name(name, table, path)
            where = f"{self._place}/{name}"
            element = locate(handle, where, path=path)
            if element is None:
                raise FormatError("is named in column-order, but missing", path=path, where=where)
            check_tree(element, path=path)
            _check_categories(element, path)
            with reading(path, where), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return pd.Series(_read_column(element), name=name)

    def _node(self, handle: h5py.File) -> h5py.Group | h5py.Dataset:
        node = locate(handle, self._place, path=self._file.path)
        if node is None:
            raise FormatError("is missing", path=self._file.path, where=self._place)
        return node

    def _names(self, table: h5py.Group | h5py.Dataset) -> list[str]:
        with reading(self._file.path, self._place):
            if isinstance(table, h5py.Dataset):
                fields = table.dtype.names
                if fields is None:
                    raise FormatError(
                        "is neither a group nor a compound dataset", path=self._file.path, where=self._place
                    )
                index = _record_index(fields)
                return [field for field in fields if field != index]
            return [decoded(name) for name in np.ravel(table.attrs["column-order"])]


def table_length(handle: h5py.File, place: str, *, path: str) -> int:
    """Rows of a table, without reading it. Raises FormatError when there is no such table."""
    node = locate(handle, place, path=path)
    if node is None:
        raise FormatError("is missing", path=path, where=place, hint="Is this an AnnData (.h5ad) file?")
    with reading(path, place):
        if isinstance(node, h5py.Group):
            node = _index(handle, node, path)
        check_dataset(node, path=path)
        if node.ndim != 1:
            raise FormatError(f"has an index of shape {node.shape}", path=path, where=place)
        return int(node.shape[0])


def _index(handle: h5py.File, table: h5py.Group, path: str) -> h5py.Dataset:
    """The dataset behind a table's index: plain text, or the values (codes) of a group that encodes them."""
    name = table.attrs.get("_index", "_index" if "_index" in table else "index")
    place = f"{table.name}/{decoded(name)}"
    node = locate(handle, place, path=path)
    if isinstance(node, h5py.Group):
        inner = "codes" if "codes" in node else "values"
        node = locate(handle, f"{place}/{inner}", path=path)
    if not isinstance(node, h5py.Dataset):
        raise FormatError("the index is missing", path=path, where=place)
    return node


def read_table(file: Hdf5File, place: str) -> pd.DataFrame:
    """obs, var or raw/var as a data frame. Raises FormatError, UnsafeFileError, ResourceError."""
    from anndata.io import read_elem

    with file.opened() as handle:
        node = locate(handle, place, path=file.path)
        if node is None:
            raise FormatError("is missing", path=file.path, where=place)
        check_tree(node, path=file.path)
        _check_named_columns(node, file.path)
        if isinstance(node, h5py.Group):
            for name in node:
                _check_categories(locate(handle, f"{place}/{name}", path=file.path), file.path)
        with reading(file.path, place), warnings.catch_warnings():
            # Old files lack encoding marks; that they are readable is all that matters here.
            warnings.simplefilter("ignore")
            table: Any = _from_records(node) if isinstance(node, h5py.Dataset) else read_elem(node)
    if not isinstance(table, pd.DataFrame):
        raise FormatError(f"is a {type(table).__name__}, expected a table", path=file.path, where=place)
    return table


def _check_named_columns(table: h5py.Group | h5py.Dataset, path: str) -> None:
    """Names of columns are followed by the reader like paths: one with a slash would leave the table."""
    named = [table.attrs.get("_index", "")]
    named.extend(np.ravel(table.attrs.get("column-order", [])))
    for name in map(decoded, named):
        _check_name(name, table, path)


def _check_name(name: str, table: h5py.Group | h5py.Dataset, path: str) -> None:
    if "/" in name:
        raise UnsafeFileError(f"names a column {name[:100]!r} outside the table", path=path, where=table.name)


def _check_categories(column: h5py.Group | h5py.Dataset | None, path: str) -> None:
    """Categories of files before anndata 0.8 hang on a reference: to a dataset of this file, or refused."""
    if not isinstance(column, h5py.Dataset):
        return
    with reading(path, str(column.name)):
        reference = column.attrs.get("categories")
        if reference is None:
            return
        target = column.file[reference] if isinstance(reference, h5py.Reference) else None
        if not isinstance(target, h5py.Dataset):
            raise UnsafeFileError(
                "has categories that are not a dataset of this file", path=path, where=str(column.name)
            )
        check_dataset(target, path=path)


def _read_column(element: h5py.Group | h5py.Dataset) -> Any:
    from anndata.io import read_elem

    reference = element.attrs.get("categories") if isinstance(element, h5py.Dataset) else None
    if reference is None:
        return read_elem(element)
    categories = element.file[reference]
    ordered = bool(categories.attrs.get("ordered", False))
    return pd.Categorical.from_codes(read_elem(element), read_elem(categories), ordered=ordered)


def _from_records(dataset: h5py.Dataset) -> pd.DataFrame:
    """A table of before anndata 0.7: one compound dataset, the index a field named index or _index."""
    records = dataset[()]
    if records.dtype.names is None:
        raise FormatError("is neither a group nor a compound dataset", where=str(dataset.name))
    columns = {name: decoded_array(records[name]) for name in records.dtype.names}
    index = _record_index(records.dtype.names)
    table = pd.DataFrame(columns)
    return table if index is None else table.set_index(index)


def _record_index(fields: tuple[str, ...]) -> str | None:
    return next((name for name in ("index", "_index") if name in fields), None)


def decoded(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def decoded_array(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Byte strings as text; other arrays as they are."""
    if values.dtype.kind not in "SO":
        return values
    out = np.empty(values.shape, dtype=object)
    out[...] = [decoded(value) if isinstance(value, bytes) else value for value in values.ravel()]
    return out
