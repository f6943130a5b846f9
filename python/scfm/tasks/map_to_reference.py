"""``scfm.tl.map_to_reference``: labels of a reference for new cells, by the vote of their nearest reference cells.

Exact search over embeddings of one model (neighbor_search.py), votes (label_votes.py), and for every cell how many of
the votes its label had and how far its neighbours were: a label without these is a guess that looks like a fact. Cells
too far away, or too divided, can be left "Unassigned".
Source: scGPT's reference mapping (Cui et al. 2024): 10 neighbours, L2 on unit embeddings, majority.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.embed.store import EmbeddingStore
from scfm.errors import BadCellError, InvalidArgumentError, ScfmWarning
from scfm.models.base import FoundationModel
from scfm.tasks.embed import embed
from scfm.tasks.label_votes import Ties, Weights, vote
from scfm.tasks.neighbor_search import Backend, Metric, nearest_cells
from scfm.tasks.reference import (
    Embedded,
    Reference,
    check_same_model,
    embedded_cells,
    is_anndata,
    open_reference,
)

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["UNASSIGNED", "MappedCells", "map_cells", "map_to_reference"]

UNASSIGNED = "Unassigned"
_DEFAULT_REP = "X_scgpt"


@dataclass(frozen=True)
class MappedCells:
    """One entry a query cell. labels: names of the reference's or UNASSIGNED; confidence: float32, the label's share
    of the votes, NaN for a cell without an embedding; neighbors: int64 (cells, k), rows of the reference, nearest
    first, -1 for such a cell; distances: float32 (cells, k). checked: whether both embeddings said
    which weights made them.
    """

    labels: list[str]
    confidence: NDArray[np.float32]
    neighbors: NDArray[np.int64]
    distances: NDArray[np.float32]
    checked: bool


def map_to_reference(
    adata: AnnData,
    reference: AnnData | EmbeddingStore | str | Path,
    *,
    labels: str | Sequence[Any],
    model: FoundationModel | None = None,
    use_rep: str | None = None,
    num_neighbors: int = 10,
    metric: Metric = "l2",
    weights: Weights = "uniform",
    ties: Ties = "nearest",
    max_distance: float | None = None,
    min_confidence: float | None = None,
    backend: Backend = "auto",
    on_bad_cell: Literal["error", "nan"] = "error",
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Give every cell of ``adata`` a label of ``reference``.

    reference: an AnnData with ``obsm[use_rep]``, or a folder written by ``scfm embed`` (its rows then are those of the
    embedded files, one after another). labels: the column of its obs, or one label for each of its cells; cells without
    one are left out, with a warning. use_rep: default "X_scgpt", or "X_<family>" of ``model``, which embeds what has no
    such entry yet (and writes it there). metric: "l2" (Euclidean) or "cosine" (1 - cos). weights: see label_votes.py.
    max_distance: cells whose nearest neighbour is farther, and min_confidence: cells whose label has a smaller share of
    the votes, become "Unassigned". backend: "exact", "faiss" or "auto"; the result is the same. on_bad_cell: a cell of
    ``adata`` without an embedding raises BadCellError, or ("nan") is "Unassigned".

    Writes, with key = ``key_added`` or "mapped_<labels>": categorical ``obs[key]``; ``obs[f"{key}_confidence"]``,
    float32, the label's share of the votes (of all of them, also where the cell is "Unassigned");
    ``obsm[f"{key}_neighbors"]``, int64 rows of the reference, and ``obsm[f"{key}_distances"]``, float32, both (cells,
    num_neighbors), nearest first; settings in ``uns["scfm"][key]``.
    Raises InvalidArgumentError (no such column or embedding, other dimensions), IntegrityError (embeddings of different
    models), BadCellError. Returns None, or the copy with ``copy=True``.
    """
    target = adata.copy() if copy else adata
    if not isinstance(target.uns.get("scfm", {}), Mapping):
        raise InvalidArgumentError(
            f"is a {type(target.uns['scfm']).__name__}; expected a mapping to add provenance to",
            where="adata.uns['scfm']",
        )
    rep = use_rep or (f"X_{model.family}" if model is not None else _DEFAULT_REP)
    key = key_added or (f"mapped_{labels}" if isinstance(labels, str) else "mapped_label")
    if model is not None:
        for cells in (target, reference):
            if is_anndata(cells) and rep not in cells.obsm:
                embed(cells, model, key_added=rep, on_bad_cell="nan")
    opened = open_reference(reference, labels, key=rep)
    if opened.num_unlabelled:
        warnings.warn(
            f"{opened.num_unlabelled:,} of {len(opened.codes):,} reference cells have no label and do not vote",
            ScfmWarning,
            stacklevel=2,
        )
    mapped = map_cells(
        embedded_cells(target, rep, "adata"),
        opened,
        num_neighbors=num_neighbors,
        metric=metric,
        weights=weights,
        ties=ties,
        max_distance=max_distance,
        min_confidence=min_confidence,
        backend=backend,
        on_bad_cell=on_bad_cell,
    )
    used = [*opened.names, *([UNASSIGNED] if UNASSIGNED in mapped.labels else [])]
    target.obs[key] = pd.Categorical(mapped.labels, categories=list(dict.fromkeys(used)))
    target.obs[f"{key}_confidence"] = mapped.confidence
    target.obsm[f"{key}_neighbors"] = mapped.neighbors
    target.obsm[f"{key}_distances"] = mapped.distances
    facts = _facts(opened, mapped, labels, rep, num_neighbors, metric, weights, ties)
    facts |= {"max_distance": max_distance, "min_confidence": min_confidence}
    facts = {name: fact for name, fact in facts.items() if fact is not None}  # AnnData's uns takes no None
    target.uns["scfm"] = {**target.uns.get("scfm", {}), key: facts}
    return target if copy else None


def map_cells(
    query: Embedded,
    reference: Reference,
    *,
    num_neighbors: int = 10,
    metric: Metric = "l2",
    weights: Weights = "uniform",
    ties: Ties = "nearest",
    max_distance: float | None = None,
    min_confidence: float | None = None,
    backend: Backend = "auto",
    on_bad_cell: Literal["error", "nan"] = "error",
) -> MappedCells:
    """As map_to_reference, of embeddings wherever they lie."""
    if on_bad_cell not in ("error", "nan"):
        raise InvalidArgumentError(f'{on_bad_cell!r}; expected "error" or "nan"', where="on_bad_cell")
    for name, limit in (("max_distance", max_distance), ("min_confidence", min_confidence)):
        if limit is not None and not (isfinite(limit) and limit >= 0):
            raise InvalidArgumentError(f"{limit!r}; expected a number of 0 or more", where=name)
    checked = check_same_model(query, reference.embedded)
    good = query.points.rows
    if len(good) < query.num_cells and on_bad_cell == "error":
        bad = np.setdiff1d(np.arange(query.num_cells), good)
        raise BadCellError(
            f"{len(bad):,} of {query.num_cells:,} cells have NaN or infinity in their embedding, the first is row "
            f"{bad[0]}",
            where=query.name,
            hint='Pass on_bad_cell="nan" to leave them Unassigned.',
        )
    rows, distances = nearest_cells(
        query.points.block(0, len(good)),
        reference.embedded.points,
        num_neighbors=num_neighbors,
        metric=metric,
        backend=backend,
    )
    winner, share = vote(
        reference.codes[rows], distances, reference.cells_of_label, weights=weights, ties=ties
    )
    certain = np.ones(len(good), dtype=bool)
    if max_distance is not None:
        certain &= distances[:, 0] <= max_distance
    if min_confidence is not None:
        certain &= share >= min_confidence
    names = [UNASSIGNED] * query.num_cells
    for cell, code in zip(good[certain].tolist(), winner[certain].tolist(), strict=True):
        names[cell] = reference.names[code]
    shape = (query.num_cells, num_neighbors)
    found = MappedCells(
        names,
        np.full(query.num_cells, np.nan, dtype=np.float32),
        np.full(shape, -1, dtype=np.int64),
        np.full(shape, np.nan, dtype=np.float32),
        checked,
    )
    found.confidence[good], found.neighbors[good], found.distances[good] = share, rows, distances
    return found


def _facts(
    reference: Reference,
    mapped: MappedCells,
    labels: str | Sequence[Any],
    rep: str,
    num_neighbors: int,
    metric: str,
    weights: str,
    ties: str,
) -> dict[str, Any]:
    made_by = reference.embedded.made_by
    return {
        "task": "map_to_reference",
        "use_rep": rep,
        "labels": labels if isinstance(labels, str) else "given",
        "num_neighbors": num_neighbors,
        "metric": metric,
        "weights": weights,
        "ties": ties,
        "reference": reference.embedded.name,
        "num_reference_cells": len(reference.embedded.points),
        "num_unassigned": mapped.labels.count(UNASSIGNED),
        "same_model_checked": mapped.checked,
        "weights_sha256": str(made_by.get("weights_sha256", "")),
        "family": str(made_by.get("family", "")),
    }
