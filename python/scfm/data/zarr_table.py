"""The tables of cells (obs) and genes (var) in a zarr store, a column at a time.

anndata's reader decodes each column, after every array under it has been found to hold plain numbers or text
and to fit into memory. Writers leave out chunks that hold only the fill value, so a missing chunk is legal
here; where it stands for numbers a warning says so, and an index is never made up.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd

from scfm.data.available_memory import require_memory
from scfm.data.cell_table import CellTable
from scfm.data.h5_file import reading
from scfm.data.zarr_chunks import check_shards
from scfm.data.zarr_matrix import blosc_keys
from scfm.data.zarr_metadata import ArrayLayout, array_layout
from scfm.data.zarr_store import ZarrStore
from scfm.errors import FormatError, ScfmWarning, UnsafeFileError

__all__ = ["ZarrTable"]

_MAX_DEPTH = 8


class ZarrTable(CellTable):
    """The table at ``place``: a group of columns as anndata writes it."""

    def __init__(self, store: ZarrStore, place: str) -> None:
        self._store = store
        self._place = place

    def __len__(self) -> int:
        """Rows, told from the metadata of the index."""
        place = self._index_place()
        found = self._store.metadata(place)
        if found is None:
            raise FormatError("the index is missing", path=self._store.path, where=place)
        if found["node_type"] == "group":
            names = self._store.children(place)
            place = f"{place}/{'codes' if 'codes' in names else 'values'}"
        shape = array_layout(self._store, place).shape
        if len(shape) != 1:
            raise FormatError(f"has an index of shape {shape}", path=self._store.path, where=self._place)
        return shape[0]

    def __call__(self) -> pd.DataFrame:
        index_place = self._index_place()
        index = pd.Index(self._decoded(index_place, strict=True))
        columns = {name: self._decoded(self._column_place(name), strict=False) for name in self.names()}
        with reading(self._store.path, self._place):
            table = pd.DataFrame(columns, index=index)
        name = index_place.rpartition("/")[2]
        table.index.name = None if name == "_index" else name
        return table

    def names(self) -> list[str]:
        found = self._attributes().get("column-order")
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise FormatError(
                "has no list of columns (column-order)", path=self._store.path, where=self._place
            )
        return found

    def column(self, name: str) -> pd.Series | None:
        if name not in self.names():
            return None
        place = self._column_place(name)
        values = self._decoded(place, strict=False)
        with reading(self._store.path, place):
            return pd.Series(values, name=name)

    def _attributes(self) -> dict[str, Any]:
        found = self._store.metadata(self._place)
        if found is None or found["node_type"] != "group":
            raise FormatError(
                "is missing or not a group",
                path=self._store.path,
                where=self._place,
                hint="Expected a store as AnnData.write_zarr makes it.",
            )
        attributes: dict[str, Any] = found["attributes"]
        return attributes

    def _index_place(self) -> str:
        return self._column_place(str(self._attributes().get("_index", "_index")))

    def _column_place(self, name: str) -> str:
        """Names are followed like paths: one with a slash would leave the table."""
        if "/" in name or name in ("", ".", ".."):
            raise UnsafeFileError(
                f"names a column {name[:100]!r} outside the table", path=self._store.path, where=self._place
            )
        return f"{self._place}/{name}"

    def _decoded(self, place: str, *, strict: bool) -> Any:
        """The column stored at ``place``, as anndata decodes it."""
        from anndata.io import read_elem

        found = self._store.metadata(place)
        if found is None:
            raise FormatError("is named in column-order, but missing", path=self._store.path, where=place)
        layouts = _layouts(self._store, place, _MAX_DEPTH)
        require_memory(
            sum(layout.num_bytes for layout in layouts),
            purpose="reading this column",
            name=self._store.path,
            where=place,
            hint="The store claims to hold more than fits; check where it comes from.",
        )
        with self._store.opened(strict=strict, blosc=blosc_keys(*layouts)) as store:
            with reading(self._store.path, place), warnings.catch_warnings():
                # Old files lack encoding marks; that they are readable is all that matters here.
                warnings.simplefilter("ignore")
                is_array = found["node_type"] == "array"
                values = read_elem(store.array(place) if is_array else store.group(place))
            if store.missing and is_array and np.asarray(values).dtype.kind in "iuf":
                warnings.warn(
                    f"{self._store.path}: {place}: {len(store.missing)} chunks are not in the store and were "
                    "taken to hold its fill value; writers leave out chunks of zeros.",
                    ScfmWarning,
                    stacklevel=5,
                )
        categories = found["attributes"].get("categories") if is_array else None
        if categories is None:
            return values
        return self._categorical(values, str(categories))

    def _categorical(self, codes: Any, categories_place: str) -> pd.Categorical:
        """Categories of stores before anndata 0.8 lie elsewhere in the table."""
        place = "/".join([self._place, *categories_place.strip("/").split("/")])
        categories = self._decoded(place, strict=True)
        found = self._store.metadata(place) or {"attributes": {}}
        with reading(self._store.path, place):
            return pd.Categorical.from_codes(
                codes, categories, ordered=bool(found["attributes"].get("ordered", False))
            )


def _layouts(store: ZarrStore, place: str, depth: int) -> list[ArrayLayout]:
    """Of all arrays at and under ``place``, each of them found to be harmless."""
    found = store.metadata(place)
    if found is None:
        raise FormatError("is missing", path=store.path, where=place)
    if found["node_type"] == "array":
        layout = array_layout(store, place)
        if layout.ends_in_blosc and layout.inner is not None:
            check_shards(store, layout)
        return [layout]
    if depth == 0:
        raise FormatError("is nested too deeply for a table", path=store.path, where=place)
    below = (_layouts(store, f"{place}/{name}", depth - 1) for name in store.children(place))
    return [layout for layouts in below for layout in layouts]
