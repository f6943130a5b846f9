"""``scfm.read``: whatever holds counts becomes a CellSource."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scfm.data.anndata_source import open_anndata
from scfm.data.h5ad import open_h5ad
from scfm.data.loom import open_loom
from scfm.data.source import CellSource
from scfm.errors import InvalidArgumentError

__all__ = ["read"]

_READERS = {".h5ad": open_h5ad, ".loom": open_loom}
_ACCEPTED = "an AnnData, a path to an .h5ad or .loom file, or a CellSource"


def read(x: Any, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
    """Raw counts of cells, ready to be read block by block.

    x: an AnnData (in memory, view or backed), a path to an .h5ad or .loom file, or a CellSource (returned
    as is). layer: "X", "raw.X" or a layer's name; None takes the first of raw.X, layers["counts"] and X
    that holds raw counts (``.counts_from`` says which). assume_counts: take ``layer``, or X, without
    asking whether its values are whole numbers. Raises InvalidArgumentError, MissingFileError,
    FormatError, NotCountsError.
    """
    if isinstance(x, CellSource):
        if layer is not None or assume_counts:
            raise InvalidArgumentError(
                "layer and assume_counts cannot be given with a CellSource: it has chosen already",
                where="read",
            )
        return x
    if isinstance(x, str | os.PathLike):
        return _read_path(Path(os.fsdecode(x)), layer, assume_counts)
    from anndata import AnnData

    if isinstance(x, AnnData):
        return open_anndata(x, layer=layer, assume_counts=assume_counts)
    raise InvalidArgumentError(
        f"got {type(x).__module__}.{type(x).__qualname__}; accepted are {_ACCEPTED}",
        where="read",
        hint="Lists of data sets, zarr stores and 10x files come in a later version.",
    )


def _read_path(path: Path, layer: str | None, assume_counts: bool) -> CellSource:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        ending = f"the ending {path.suffix!r}" if path.suffix else "no ending"
        raise InvalidArgumentError(
            f"has {ending}; accepted are {_ACCEPTED}",
            path=path,
            hint="zarr stores and 10x files come in a later version: read them with anndata or scanpy and "
            "pass the AnnData.",
        )
    return reader(path, layer=layer, assume_counts=assume_counts)
