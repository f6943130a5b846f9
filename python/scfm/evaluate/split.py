"""Train and test cells: a random split that keeps every label on both sides.

Cells of one data set share donor and batch, so a random-cell split is optimistic about new data; a report
names its split rule for that reason. A cell's draw depends on (seed, position of the cell) only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import InvalidArgumentError
from scfm.evaluate.arrays import encode_labels

__all__ = ["keyed_generator", "stratified_split"]


def keyed_generator(seed: int, purpose: str) -> np.random.Generator:
    """A counter-based generator (Philox) whose stream belongs to (seed, purpose)."""
    words = np.frombuffer(purpose.encode().ljust(8, b"\0")[:8], dtype="<u8")
    key = np.array([np.uint64(seed & 0xFFFF_FFFF_FFFF_FFFF), words[0]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def stratified_split(
    labels: Sequence[Any] | NDArray[Any], *, test_fraction: float = 0.2, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the train and of the test cells, each ascending.

    Of each label with ``n`` cells, ``round(n * test_fraction)`` cells go to test, at least one if ``n >=
    2``, and at least one stays in train. Raises InvalidArgumentError for a fraction outside (0, 1) or
    missing labels.
    """
    if not 0.0 < test_fraction < 1.0:
        raise InvalidArgumentError(f"test_fraction is {test_fraction}, expected between 0 and 1")
    codes, names = encode_labels(labels, len(labels), "stratified_split")
    draw = keyed_generator(seed, "split").random(codes.size)
    in_test = np.zeros(codes.size, dtype=bool)
    for label in range(len(names)):
        cells = np.flatnonzero(codes == label)
        wanted = min(max(round(cells.size * test_fraction), 1), cells.size - 1)
        in_test[cells[np.argsort(draw[cells], kind="stable")[:wanted]]] = True
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)
