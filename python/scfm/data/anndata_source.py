"""Reading an AnnData object: in memory, a view, or backed by a file.

Arrays are used where they lie; nothing is copied but the block being read. A backed object's X is read
from its own open file with the checks that any file gets, since anndata itself does none; so are the rows of
a backed view.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scfm.data.h5_file import Hdf5File
from scfm.data.h5ad import matrix_at
from scfm.data.matrix import CountMatrix, CscInMemory, CsrInMemory, DenseInMemory
from scfm.data.matrix_subset import ChosenRows
from scfm.data.raw_counts import Candidate, choose_counts
from scfm.data.source import CellSource
from scfm.errors import FormatError, InvalidArgumentError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["open_anndata"]

_NAME = "AnnData"


def open_anndata(adata: AnnData, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
    """The cells of an AnnData, raw counts; rows are positions in this object (in the view, if it is one).

    layer: "X", "raw.X" or a layer's name; None finds the raw counts. Raises FormatError, NotCountsError,
    InvalidArgumentError.
    """
    choice = choose_counts(_candidates(adata), name=_NAME, layer=layer, assume_counts=assume_counts)
    return CellSource(
        choice.matrix,
        counts_from=choice.candidate.label,
        genes=choice.candidate.genes,
        obs=partial(getattr, adata, "obs"),
        is_counts=choice.is_counts,
        assume_counts=assume_counts,
    )


def _candidates(adata: AnnData) -> list[Candidate]:
    genes: Callable[[], pd.DataFrame] = partial(getattr, adata, "var")
    # What anndata cuts out of a file by columns is small enough to be looked at.
    file = _backing(adata) if adata.isbacked and not _cuts_columns(adata) else None
    whole = adata._adata_ref if adata.is_view else adata
    found: list[Candidate] = []

    def add(label: str, place: str, load: Callable[[], Any], table: Callable[[], pd.DataFrame]) -> None:
        shape = adata.n_obs, len(table())
        opened = partial(_in_memory, load, shape, label)
        if file is not None and place:
            stored = partial(matrix_at, file, place, label=label, num_cells=whole.n_obs, num_genes=shape[1])
            opened = partial(_rows_of_view, stored, adata) if adata.is_view else stored
        found.append(Candidate(label, opened, table))

    if adata.raw is not None:
        raw = adata.raw
        place = "raw/X" if file is not None and "raw/X" in adata.file._file else ""
        add("raw.X", place, partial(getattr, raw, "X"), partial(getattr, raw, "var"))
    for name in sorted(adata.layers, key=lambda entry: entry != "counts"):
        add(f"layers[{name!r}]", "", partial(adata.layers.__getitem__, name), genes)
    if adata.isbacked or adata.X is not None:
        add("X", "X", partial(getattr, adata, "X"), genes)
    return found


def _cuts_columns(adata: AnnData) -> bool:
    return adata.is_view and (
        adata.n_vars != adata._adata_ref.n_vars
        or not np.array_equal(adata.var_names, adata._adata_ref.var_names)
    )


def _rows_of_view(stored: Callable[[], CountMatrix], view: AnnData) -> CountMatrix:
    """The view's rows of the file behind the object that it is a view of."""
    chosen = np.arange(view._adata_ref.n_obs, dtype=np.int64)[view._oidx]
    return ChosenRows(stored(), chosen)


def _backing(adata: AnnData) -> Hdf5File | None:
    """The file of a backed AnnData through the handle that it holds open."""
    handle = adata.file._file if adata.file.is_open else None
    if handle is None:
        raise InvalidArgumentError("is backed by a file that is closed", where=_NAME)
    return Hdf5File(str(adata.filename), handle=handle)


def _in_memory(load: Callable[[], Any], shape: tuple[int, int], label: str) -> CountMatrix:
    values: Any = load()
    is_sparse = sparse.issparse(values)
    if not hasattr(values, "shape") or tuple(values.shape) != shape:
        raise FormatError(
            f"has shape {getattr(values, 'shape', None)}; obs and var describe {shape} (cells, genes)",
            path=_NAME,
            where=label,
        )
    if is_sparse:
        if values.format not in ("csr", "csc"):
            raise InvalidArgumentError(
                f"is a sparse matrix of format {values.format!r}; expected csr, csc or a dense array",
                path=_NAME,
                where=label,
                hint="Convert it with .tocsr().",
            )
        reader = CsrInMemory if values.format == "csr" else CscInMemory
        return reader(
            values.indptr,
            values.indices,
            values.data,
            num_cells=shape[0],
            num_genes=shape[1],
            name=_NAME,
            dataset=label,
        )
    if isinstance(values, np.ndarray):
        # np.matrix and anndata's array views index differently from plain arrays.
        return DenseInMemory(values.view(np.ndarray), name=_NAME, dataset=label)
    raise InvalidArgumentError(
        f"is a {type(values).__module__}.{type(values).__qualname__}; expected a numpy array or a scipy "
        "CSR or CSC matrix",
        path=_NAME,
        where=label,
        hint="Bring it into memory first, e.g. with adata.to_memory().",
    )
