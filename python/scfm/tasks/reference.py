"""A reference to map cells onto: embedding, labels, and what made the embedding.

It may be an AnnData with the embedding in ``obsm``, or a folder written by ``scfm embed``, read from its shards. Cells
without an embedding or without a label are left out of every vote, and counted. Two embeddings can be compared only if
the same weights, layer and pooling made them; where both say what made them, that is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.read import read
from scfm.embed.store import EmbeddingStore, open_store
from scfm.errors import IntegrityError, InvalidArgumentError, MissingFileError
from scfm.tasks.neighbor_search import Points

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Embedded", "Reference", "check_same_model", "embedded_cells", "is_anndata", "open_reference"]

# What must agree between two embeddings, by the names of the provenance.
_COMPARED = ("family", "weights_sha256", "layer", "pooling")


@dataclass(frozen=True)
class Embedded:
    """points: an embedding's good rows; dimensions; num_cells: all rows; made_by: provenance, empty where unknown."""

    points: Points
    dimensions: int
    num_cells: int
    made_by: Mapping[str, Any]
    name: str


@dataclass(frozen=True)
class Reference:
    """embedded: its labelled cells with an embedding; codes: int64 (num_cells,) into names, -1 for no label."""

    embedded: Embedded
    codes: NDArray[np.int64]
    names: list[str]
    num_unlabelled: int

    @property
    def cells_of_label(self) -> NDArray[np.int64]:
        """Voting cells with each label, int64 (labels,)."""
        return np.bincount(self.codes[self.embedded.points.rows], minlength=len(self.names)).astype(np.int64)


def is_anndata(cells: Any) -> TypeGuard[AnnData]:
    """Without importing anndata where nobody has."""
    return hasattr(cells, "obsm") and hasattr(cells, "uns")


def embedded_cells(adata: AnnData, key: str, name: str) -> Embedded:
    """``adata.obsm[key]``; raises InvalidArgumentError naming the argument ``name``."""
    if key not in adata.obsm:
        raise InvalidArgumentError(
            f"has no obsm[{key!r}]; there are {sorted(adata.obsm)}",
            where=name,
            hint="Run scfm.tl.embed first, or pass model=.",
        )
    array = np.asarray(adata.obsm[key])
    if array.ndim != 2 or array.dtype.kind != "f":
        raise InvalidArgumentError(
            f"has shape {array.shape} and type {array.dtype}; expected floating-point rows, one for each cell",
            where=f"{name}.obsm[{key!r}]",
        )
    made_by = adata.uns.get("scfm", {})
    made_by = made_by.get(key, {}) if isinstance(made_by, Mapping) else {}
    rows = np.flatnonzero(np.isfinite(array).all(axis=1))
    return Embedded(Points(lambda at: array[at], rows), array.shape[1], len(array), made_by, name)


def stored_cells(store: EmbeddingStore) -> Embedded:
    """A finished folder of embeddings; raises MissingFileError naming a shard that is not done."""
    good = np.ones(store.num_cells, dtype=bool)
    start = 0
    for _, block in store.blocks():
        good[start : start + len(block)] = np.isfinite(block).all(axis=1)
        start += len(block)
    made_by = {**store.plan.model, "layer": store.plan.layer, "pooling": store.plan.pooling}
    points = Points(store.read, np.flatnonzero(good), in_memory=False)
    return Embedded(points, store.hidden_size, store.num_cells, made_by, str(store.folder))


def open_reference(
    reference: AnnData | EmbeddingStore | str | Path, labels: str | Sequence[Any], *, key: str
) -> Reference:
    """labels: a column of the reference's obs (for a folder: of the files that it was made from), or one for each cell.

    Raises InvalidArgumentError, MissingFileError.
    """
    if isinstance(reference, str | Path):
        if not Path(reference).is_dir():
            raise MissingFileError(
                "no such folder of embeddings",
                path=reference,
                hint="scfm embed writes one; or give an AnnData.",
            )
        reference = open_store(reference)
    if isinstance(reference, EmbeddingStore):
        embedded = stored_cells(reference)
        column = _labels_of_store(reference, labels) if isinstance(labels, str) else labels
    elif is_anndata(reference):
        embedded = embedded_cells(reference, key, "reference")
        column = _column(reference, labels) if isinstance(labels, str) else labels
    else:
        raise InvalidArgumentError(
            f"is a {type(reference).__name__}; expected an AnnData or a folder of embeddings",
            where="reference",
        )
    codes, names = _encoded(column, embedded.num_cells)
    usable = embedded.points.rows
    voting = usable[codes[usable] >= 0]
    if not voting.size:
        raise InvalidArgumentError(
            f"no cell has both an embedding and a label ({embedded.num_cells:,} cells)", where=embedded.name
        )
    points = Points(embedded.points.read, voting, embedded.points.in_memory)
    voters = Embedded(points, embedded.dimensions, embedded.num_cells, embedded.made_by, embedded.name)
    return Reference(voters, codes, names, int((codes < 0).sum()))


def check_same_model(query: Embedded, reference: Embedded) -> bool:
    """Whether both say which weights made them. Raises InvalidArgumentError for other dimensions, IntegrityError for
    another model, layer or pooling.
    """
    if query.dimensions != reference.dimensions:
        raise InvalidArgumentError(
            f"{query.name} has {query.dimensions} dimensions, {reference.name} {reference.dimensions}",
            where="embedding",
            hint="Embed both with the same model.",
        )
    for fact in _COMPARED:
        here, there = query.made_by.get(fact, ""), reference.made_by.get(fact, "")
        if "" not in (here, there) and here != there:
            raise IntegrityError(
                f"the embeddings differ in {fact}: {query.name} {here!r}, {reference.name} {there!r}",
                where="embedding",
                hint="Embed both with the same model and settings; their distances mean nothing otherwise.",
            )
    return all(bool(side.made_by.get("weights_sha256")) for side in (query, reference))


def _column(adata: AnnData, labels: str) -> Any:
    if labels not in adata.obs:
        raise _no_column(labels, list(adata.obs.columns), "reference.obs")
    return adata.obs[labels]


def _labels_of_store(store: EmbeddingStore, labels: str) -> list[Any]:
    """The column in every input file, one after the other, as the store's rows lie."""
    found: list[Any] = []
    for file in store.plan.files:
        source = read(file.path, layer=file.counts_from, assume_counts=True)
        column = source.obs_column(labels)
        if column is None:
            raise _no_column(labels, source.obs_column_names, file.path)
        if len(column) != file.num_cells:
            raise IntegrityError(
                f"has {len(column):,} cells, and had {file.num_cells:,} when it was embedded",
                path=file.path,
                hint="Pass labels= as a list, one for each embedded cell.",
            )
        found += column.tolist()
    return found


def _no_column(labels: str, columns: Sequence[str], where: str) -> InvalidArgumentError:
    shown = ", ".join(repr(name) for name in columns[:8]) or "none"
    return InvalidArgumentError(
        f"no column {labels!r} among the {len(columns)}: {shown}{' ...' if len(columns) > 8 else ''}",
        where=where,
    )


def _encoded(labels: Any, num_cells: int) -> tuple[NDArray[np.int64], list[str]]:
    """Codes into sorted names; -1 where a label is missing."""
    values = pd.Series(np.asarray(labels, dtype=object))
    if len(values) != num_cells:
        raise InvalidArgumentError(
            f"{len(values):,} for {num_cells:,} cells of the reference", where="labels"
        )
    named = values.where(values.isna(), values.astype(str))
    categories = pd.Categorical(named)
    return categories.codes.astype(np.int64), [str(name) for name in categories.categories]
