"""The tables of cells (obs) and genes (var) in an h5ad file.

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

from scfm.data.h5_file import Hdf5File, check_dataset, check_tree, locate, reading
from scfm.errors import FormatError, UnsafeFileError

__all__ = ["decoded", "read_table", "table_length"]


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
        if "/" in name:
            raise UnsafeFileError(
                f"names a column {name[:100]!r} outside the table", path=path, where=table.name
            )


def _from_records(dataset: h5py.Dataset) -> pd.DataFrame:
    """A table of before anndata 0.7: one compound dataset, the index a field named index or _index."""
    records = dataset[()]
    if records.dtype.names is None:
        raise FormatError("is neither a group nor a compound dataset", where=str(dataset.name))
    columns = {name: decoded_array(records[name]) for name in records.dtype.names}
    index = next((name for name in ("index", "_index") if name in columns), None)
    table = pd.DataFrame(columns)
    return table if index is None else table.set_index(index)


def decoded(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def decoded_array(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Byte strings as text; other arrays as they are."""
    if values.dtype.kind not in "SO":
        return values
    out = np.empty(values.shape, dtype=object)
    out[...] = [decoded(value) if isinstance(value, bytes) else value for value in values.ravel()]
    return out
