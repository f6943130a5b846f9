"""The nearest reference cells of every query cell: exact, in bounded memory, the same whatever the blocks were.

Blocks of queries meet blocks of the reference in matrix products, which find candidates; what is reported is computed
again from the two rows alone, in float64:

    1. products in float32 (|r|^2 - 2 q.r, or -q.r of unit rows) keep the best few dozen cells of each query
    2. their distances from the rows themselves decide, equal ones by the reference's order
    3. a cell not kept is farther than the last one kept, give or take what rounding can do to a product of this length.
       Queries for which that does not prove the result do step 1 again in float64; what is left after that are ties
       among more cells than were kept, and all their distances are computed directly.

faiss, where asked for, takes the place of step 1 and nothing else, so it cannot change a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from scfm.errors import InvalidArgumentError, MissingDependencyError

__all__ = ["Backend", "Metric", "Points", "nearest_cells"]

Metric = Literal["l2", "cosine"]
Backend = Literal["auto", "exact", "faiss"]
# Reads rows by position: int64 (n,) -> (n, dimensions).
ReadRows = Callable[[NDArray[np.int64]], NDArray[Any]]

_SPARE = 22  # candidates beyond the neighbours asked for
_QUERIES_IN_HAND = 16_384  # for so many the reference is read once
_QUERIES_AT_ONCE = 1024
_REFERENCES_AT_ONCE = 8192
_DIRECT_AT_ONCE = 64


@dataclass(frozen=True)
class Points:
    """Rows of an embedding, wherever they lie. read: rows by position; rows: int64 (n,), the positions that take part,
    ascending; in_memory: whether reading costs nothing.
    """

    read: ReadRows
    rows: NDArray[np.int64]
    in_memory: bool = True

    @classmethod
    def of(cls, array: NDArray[Any]) -> Points:
        return cls(lambda rows: array[rows], np.arange(len(array), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """float32 (up to stop - start, dimensions)."""
        return np.ascontiguousarray(self.read(self.rows[start:stop]), dtype=np.float32)

    def blocks(self, size: int = _REFERENCES_AT_ONCE) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for start in range(0, len(self), size):
            yield start, self.block(start, start + size)


def nearest_cells(
    queries: NDArray[np.float32],
    reference: Points,
    *,
    num_neighbors: int,
    metric: Metric = "l2",
    backend: Backend = "auto",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Positions (``reference.rows``) and distances of each query's nearest cells, nearest first: (queries, k) each.

    queries: float32 (queries, dimensions), finite, as the reference's rows must be. metric: "l2", Euclidean distance
    (faiss's IndexFlatL2 reports its square), or "cosine", 1 - cos, which is 1 where a row is zero. backend: "faiss"
    needs faiss; "auto" takes it where it is installed and the reference is in memory. Raises InvalidArgumentError,
    MissingDependencyError.
    """
    if metric not in ("l2", "cosine"):
        raise InvalidArgumentError(f'{metric!r}; expected "l2" or "cosine"', where="metric")
    if not 1 <= num_neighbors <= len(reference):
        raise InvalidArgumentError(
            f"{num_neighbors}; the reference has {len(reference)} usable cells", where="num_neighbors"
        )
    found = np.empty((len(queries), num_neighbors), dtype=np.int64)
    scores = np.empty((len(queries), num_neighbors))
    searches = (_chosen_search(backend, reference), _products_in(torch.float64))
    longest = _longest(reference, metric) if len(queries) else 0.0
    for start in range(0, len(queries), _QUERIES_IN_HAND):
        asked = np.ascontiguousarray(queries[start : start + _QUERIES_IN_HAND], dtype=np.float32)
        here = slice(start, start + len(asked))
        found[here], scores[here] = _proven(asked, reference, searches, longest, num_neighbors, metric)
    return reference.rows[found], np.sqrt(scores) if metric == "l2" else scores


# A search gives candidates, int64 (queries, m), -1 for none, and the score that nothing left out can be below by more
# than rounding, float64 (queries,), infinite where nothing was left out.
Search = Callable[[NDArray[np.float32], Points, int, Metric], tuple[NDArray[np.int64], NDArray[np.float64]]]


def _proven(
    queries: NDArray[np.float32],
    reference: Points,
    searches: tuple[Search, Search],
    longest: float,
    num_neighbors: int,
    metric: Metric,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps 1 to 3: places within ``reference.rows`` and scores. searches: the second is the more exact one."""
    found = np.empty((len(queries), num_neighbors), dtype=np.int64)
    scores = np.empty((len(queries), num_neighbors))
    pending = np.arange(len(queries))
    for search, roundoff in zip(searches, (2.0**-24, 2.0**-53), strict=True):
        asked = queries[pending]
        candidates, last = search(asked, reference, num_neighbors + _SPARE, metric)
        found[pending], scores[pending] = _reranked(asked, reference, candidates, num_neighbors, metric)
        margin = roundoff * _roundings(asked, longest, metric)
        pending = pending[~(scores[pending, -1] < last - margin)]
        if not pending.size:
            return found, scores
    found[pending], scores[pending] = _direct(queries[pending], reference, num_neighbors, metric)
    return found, scores


def _chosen_search(backend: str, reference: Points) -> Search:
    if backend not in ("auto", "exact", "faiss"):
        raise InvalidArgumentError(f'{backend!r}; expected "auto", "exact" or "faiss"', where="backend")
    installed = _is_installed("faiss")
    if backend == "faiss" and not installed:
        raise MissingDependencyError("faiss is not installed", where="backend", hint="pip install faiss-cpu")
    if installed and (backend == "faiss" or (backend == "auto" and reference.in_memory)):
        return _faiss_search
    return _products_in(torch.float32)


def _is_installed(package: str) -> bool:
    """Whether it can be imported; a mere folder of that name, which Python takes for a package too, does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _products_in(dtype: torch.dtype) -> Search:
    def search(
        queries: NDArray[np.float32], reference: Points, count: int, metric: Metric
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        asked = torch.from_numpy(_prepared(queries, metric)).to(dtype)
        best = torch.full((len(asked), count), torch.inf, dtype=dtype)
        ids = torch.full((len(asked), count), -1, dtype=torch.int64)
        for start, block in reference.blocks():
            rows = _prepared(block, metric)
            squares = torch.from_numpy((rows**2).sum(axis=1)).to(dtype) if metric == "l2" else None
            towards = torch.from_numpy(rows).to(dtype).T
            for first in range(0, len(asked), _QUERIES_AT_ONCE):
                here = slice(first, first + _QUERIES_AT_ONCE)
                products = asked[here] @ towards
                score = -products if squares is None else torch.sub(squares, products, alpha=2)
                near, columns = score.topk(min(count, score.shape[1]), dim=1, largest=False, sorted=False)
                near, chosen = torch.cat([best[here], near], 1).topk(
                    count, dim=1, largest=False, sorted=False
                )
                ids[here] = torch.cat([ids[here], columns + start], 1).gather(1, chosen)
                best[here] = near
        offset = (_prepared(queries, metric) ** 2).sum(axis=1) if metric == "l2" else 1.0
        return ids.numpy(), best.max(dim=1).values.double().numpy() + offset

    return search


def _faiss_search(
    queries: NDArray[np.float32], reference: Points, count: int, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    faiss = import_module("faiss")
    index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(queries.shape[1])
    for _, block in reference.blocks():
        index.add(_prepared(block, metric).astype(np.float32))
    scores, ids = index.search(_prepared(queries, metric).astype(np.float32), count)
    last = scores.max(axis=1) if metric == "l2" else 1.0 - scores.min(axis=1)
    return ids.astype(np.int64), np.where((ids < 0).any(axis=1), np.inf, last.astype(np.float64))


def _prepared(rows: NDArray[np.float32], metric: Metric) -> NDArray[np.float64]:
    """float64 rows, of unit length for "cosine"; a zero row stays zero."""
    exact = rows.astype(np.float64)
    if metric == "cosine":
        length = np.sqrt((exact**2).sum(axis=1, keepdims=True))
        exact /= np.where(length > 0.0, length, 1.0)
    return exact


def _scores(query: NDArray[np.float64], rows: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    """Squared distance or 1 - cos of prepared rows, one sum a pair: its bits depend on nothing else."""
    if metric == "l2":
        return np.asarray(((rows - query) ** 2).sum(axis=-1))
    return np.asarray(1.0 - (rows * query).sum(axis=-1))


def _longest(reference: Points, metric: Metric) -> float:
    """Length of the longest row."""
    if metric == "cosine":
        return 1.0
    return max(
        float(np.sqrt((block.astype(np.float64) ** 2).sum(axis=1)).max()) for _, block in reference.blocks()
    )


def _roundings(queries: NDArray[np.float32], longest: float, metric: Metric) -> NDArray[np.float64]:
    """How many units of rounding a score from products can be off, at most: float64 (queries,)."""
    dimensions = queries.shape[1]
    if metric == "cosine":
        return np.full(len(queries), dimensions + 8.0)
    lengths = np.sqrt((queries.astype(np.float64) ** 2).sum(axis=1))
    # Twice a product is off by 2 d |q| |r| units, and 4 |q| |r| is at most (|q| + |r|)^2.
    return np.asarray((0.5 * dimensions + 8.0) * (lengths + longest) ** 2)


def _reranked(
    queries: NDArray[np.float32],
    reference: Points,
    candidates: NDArray[np.int64],
    num_neighbors: int,
    metric: Metric,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    ids = np.empty((len(queries), num_neighbors), dtype=np.int64)
    scores = np.empty((len(queries), num_neighbors))
    for start in range(0, len(queries), _DIRECT_AT_ONCE):
        here = slice(start, start + _DIRECT_AT_ONCE)
        near = np.sort(candidates[here], axis=1)  # in the reference's order, so that a stable sort keeps it
        read = reference.read(reference.rows[np.maximum(near, 0).ravel()]).astype(np.float32)
        rows = _prepared(read, metric).reshape(*near.shape, -1)
        score = _scores(_prepared(queries[here], metric)[:, None], rows, metric)
        score[near < 0] = np.inf
        order = np.argsort(score, axis=1, kind="stable")[:, :num_neighbors]
        ids[here] = np.take_along_axis(near, order, axis=1)
        scores[here] = np.take_along_axis(score, order, axis=1)
    return ids, scores


def _direct(
    queries: NDArray[np.float32], reference: Points, num_neighbors: int, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Every distance of a few queries: for those that tie with more cells than were kept."""
    ids = [np.empty(0, dtype=np.int64)] * len(queries)
    scores = [np.empty(0)] * len(queries)
    asked = _prepared(np.ascontiguousarray(queries, dtype=np.float32), metric)
    for start, block in reference.blocks():
        rows = _prepared(block, metric)
        for number, query in enumerate(asked):
            score = np.concatenate([scores[number], _scores(query, rows, metric)])
            place = np.concatenate([ids[number], np.arange(start, start + len(rows))])
            order = np.argsort(score, kind="stable")[:num_neighbors]  # earlier cells stand before later ones
            ids[number], scores[number] = place[order], score[order]
    return np.stack(ids), np.stack(scores)
