"""Checks that every score shares: shapes that fit, finite numbers, labels known, train and test kept apart.

A score computed from arrays that do not belong together is worse than an error, so each metric calls these
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm.errors import InvalidArgumentError

__all__ = ["check_embedding", "check_split", "encode_labels"]


def check_embedding(embedding: ArrayLike, where: str) -> NDArray[np.float64]:
    """``embedding`` as float64 (cells, dimensions). Raises InvalidArgumentError naming the first bad cell."""
    array = np.asarray(embedding, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise InvalidArgumentError(
            f"an embedding has shape (cells, dimensions), found {array.shape}", where=where
        )
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        cell = int(np.flatnonzero(~finite)[0])
        raise InvalidArgumentError(
            f"{int((~finite).sum())} of {len(array)} cells have NaN or infinite values, first cell {cell}",
            where=where,
            hint="Leave those cells out; embed writes NaN for cells without any known gene.",
        )
    return array


def encode_labels(
    labels: Sequence[Any] | NDArray[Any], num_cells: int, where: str
) -> tuple[NDArray[np.int64], list[str]]:
    """Integer code of each cell's label and the label names in sorted order.

    Raises InvalidArgumentError when a label is missing (None, NaN) or their number is not ``num_cells``.
    """
    values = np.asarray(labels, dtype=object)
    if values.shape != (num_cells,):
        raise InvalidArgumentError(
            f"{num_cells} cells need as many labels, found shape {values.shape}", where=where
        )
    missing = [i for i, value in enumerate(values) if value is None or value != value]
    if missing:
        raise InvalidArgumentError(
            f"{len(missing)} cells have no label, the first is cell {missing[0]}",
            where=where,
            hint="Score only the labelled cells.",
        )
    names, codes = np.unique(values.astype(str), return_inverse=True)
    return codes.astype(np.int64), [str(name) for name in names]


def check_split(
    train: ArrayLike, test: ArrayLike, num_cells: int, where: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both sides as positions; a cell on both sides is refused, because that score would be leakage."""
    sides = []
    for name, side in (("train", train), ("test", test)):
        rows = np.asarray(side)
        if rows.dtype == bool:
            if rows.shape != (num_cells,):
                raise InvalidArgumentError(
                    f"mask {name} has shape {rows.shape}, expected ({num_cells},)", where=where
                )
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or rows.size == 0 or rows.dtype.kind not in "iu":
            raise InvalidArgumentError(f"{name} must be a non-empty list of cell positions", where=where)
        if rows.min() < 0 or rows.max() >= num_cells:
            raise InvalidArgumentError(
                f"{name} reaches from {rows.min()} to {rows.max()}; there are {num_cells} cells", where=where
            )
        if np.unique(rows).size != rows.size:
            raise InvalidArgumentError(f"{name} names a cell twice", where=where)
        sides.append(rows.astype(np.int64))
    shared = np.intersect1d(sides[0], sides[1])
    if shared.size:
        raise InvalidArgumentError(
            f"{shared.size} cells are in train and in test, the first is cell {shared[0]}",
            where=where,
            hint="Split the cells so that no cell is on both sides.",
        )
    return sides[0], sides[1]
