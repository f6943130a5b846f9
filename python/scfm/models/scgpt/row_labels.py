"""Batch labels of the rows being embedded.

They travel beside the embedding engine, which hands batches of cells to a model in whatever order it likes and knows
them by their row only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from torch import Tensor

from scfm.errors import InvalidArgumentError

_LABELS: ContextVar[np.ndarray | None] = ContextVar("scgpt_row_labels", default=None)


@contextmanager
def row_labels(labels: Any) -> Iterator[None]:
    """Within: row r of what is embedded has batch label ``labels[r]``; None for no labels."""
    found = None if labels is None else np.asarray(labels)
    if found is not None and (found.ndim != 1 or found.dtype.kind not in "iu"):
        raise InvalidArgumentError(
            f"{found.dtype} {found.shape}; expected whole numbers, one for each cell",
            where="batch_labels",
            hint="Categories have their numbers in .cat.codes.",
        )
    token = _LABELS.set(found)
    try:
        yield
    finally:
        _LABELS.reset(token)


def row_labels_known() -> bool:
    return _LABELS.get() is not None


def labels_of(rows: Tensor) -> np.ndarray | None:
    """Labels of the given rows, int64 (C,), or None where there are none."""
    labels = _LABELS.get()
    if labels is None:
        return None
    positions = rows.cpu().numpy()
    if positions.size and positions.max() >= len(labels):
        raise InvalidArgumentError(
            f"{len(labels)} labels, and a cell has row {positions.max()}; expected one for each cell",
            where="batch_labels",
        )
    found: np.ndarray = labels[positions].astype(np.int64)
    return found
