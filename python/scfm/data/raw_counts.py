"""Finding the raw counts among an AnnData's matrices.

The models were trained on raw counts and give nonsense, silently, on anything else. Files keep counts in
raw.X, in layers["counts"] or in X. The first of these whose sampled cells hold only whole non-negative
numbers is taken; when there is none, the error says what each one looks like (log1p, CP10k, scaled, ...)
and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.matrix import CountMatrix
from scfm.data.number_types import Array
from scfm.errors import InvalidArgumentError, NotCountsError

__all__ = ["Candidate", "Choice", "Sample", "choose_counts", "describe", "sample_matrix"]

_CELLS_PER_PLACE = 64
_SAMPLED_VALUES = 200_000
# Row sums of normalised data agree to float32 rounding; those of counts never do over dozens of cells.
_EQUAL_SUMS = 1e-3


@dataclass(frozen=True)
class Candidate:
    """A matrix that may hold the counts. label: as users write it ("X", "raw.X", "layers['counts']")."""

    label: str
    matrix: Callable[[], CountMatrix]
    genes: Callable[[], pd.DataFrame]


@dataclass(frozen=True)
class Choice:
    candidate: Candidate
    matrix: CountMatrix
    is_counts: bool


@dataclass(frozen=True)
class Sample:
    """Stored values of some cells as float64. indptr: their cells, int64 from 0; None where rows are not
    cheap."""

    values: NDArray[np.float64]
    indptr: NDArray[np.int64] | None

    @property
    def finite(self) -> NDArray[np.float64]:
        return self.values[np.isfinite(self.values)]

    @property
    def is_integer(self) -> bool:
        """Every finite value is whole. NaN or infinity in single cells is for the cell check to report."""
        finite = self.finite
        return bool((np.trunc(finite) == finite).all()) and (len(finite) > 0 or len(self.values) == 0)

    @property
    def is_counts(self) -> bool:
        return self.is_integer and len(self.finite) == len(self.values) and bool((self.values >= 0).all())


def choose_counts(
    candidates: Sequence[Candidate], *, name: str, layer: str | None, assume_counts: bool
) -> Choice:
    """The matrix to read counts from.

    candidates: every matrix there is, in the order to try them. layer: the user's choice or None.
    Raises InvalidArgumentError (no such layer), NotCountsError (no matrix looks like counts).
    """
    if not candidates:
        raise NotCountsError("has no X, raw.X or layers", path=name)
    if layer is not None or assume_counts:
        asked = "X" if layer is None else layer
        return _asked_for(candidates, name=name, layer=asked, assume_counts=assume_counts)
    damaged: Choice | None = None
    looks: list[str] = []
    for candidate in [entry for entry in candidates if entry.label in _DEFAULT_ORDER]:
        matrix = candidate.matrix()
        sample = sample_matrix(matrix)
        if sample.is_counts:
            return Choice(candidate, matrix, True)
        if sample.is_integer and damaged is None:
            damaged = Choice(candidate, matrix, True)
        looks.append(f"{candidate.label}: {describe(sample)}")
    if damaged is not None:
        # Whole numbers with a few impossible ones: counts with bad cells, which reading them will name.
        return damaged
    raise NotCountsError(
        f"no raw counts found ({'; '.join(looks) or 'no X, raw.X or counts layer'})",
        path=name,
        hint=_remedy(_others(candidates, {entry.split(":")[0] for entry in looks})),
    )


_DEFAULT_ORDER = ("raw.X", "layers['counts']", "X")


def _asked_for(candidates: Sequence[Candidate], *, name: str, layer: str, assume_counts: bool) -> Choice:
    if not isinstance(layer, str):
        raise InvalidArgumentError(f"is {layer!r}, expected a name", where="layer")
    by_label = {candidate.label: candidate for candidate in candidates}
    labels = [layer, f"layers[{layer!r}]", *(["raw.X"] if layer in ("raw", "raw/X") else [])]
    chosen = next((by_label[label] for label in labels if label in by_label), None)
    if chosen is None:
        raise InvalidArgumentError(
            f"there is no {layer!r}; there are: {', '.join(by_label)}", path=name, where="layer"
        )
    matrix = chosen.matrix()
    sample = sample_matrix(matrix)
    if not assume_counts and not sample.is_integer:
        raise NotCountsError(
            f"does not hold raw counts: {describe(sample)}",
            path=name,
            where=chosen.label,
            hint=_remedy(_others(candidates, {chosen.label})),
        )
    return Choice(chosen, matrix, sample.is_integer)


def _others(candidates: Sequence[Candidate], seen: set[str]) -> list[str]:
    """Labels of the remaining matrices that do look like counts."""
    rest = [candidate for candidate in candidates if candidate.label not in seen]
    return [candidate.label for candidate in rest if sample_matrix(candidate.matrix()).is_counts]


def _remedy(others: list[str]) -> str:
    if others:
        return f"Whole numbers are in {', '.join(others)}: give layer= if these are the counts."
    return (
        "Give the file with the raw counts, or layer= where they are; assume_counts=True takes the values as "
        "they are (results will differ from the authors')."
    )


def sample_matrix(matrix: CountMatrix) -> Sample:
    """Values of cells at the start, in the middle and at the end."""
    if not matrix.cheap_rows:
        return Sample(matrix.sample_values(_SAMPLED_VALUES).astype(np.float64), None)
    parts = matrix.read(_sampled_rows(matrix.num_cells))
    return Sample(parts.data.astype(np.float64), parts.indptr)


def _sampled_rows(num_cells: int) -> NDArray[np.int64]:
    if num_cells <= 3 * _CELLS_PER_PLACE:
        return np.arange(num_cells, dtype=np.int64)
    middle = num_cells // 2
    starts = (0, middle - _CELLS_PER_PLACE // 2, num_cells - _CELLS_PER_PLACE)
    return np.unique(np.concatenate([np.arange(start, start + _CELLS_PER_PLACE) for start in starts]))


def describe(sample: Sample) -> str:
    """What the values look like, in a user's words: "87 % non-integer, max 6.3: log1p of CP10k"."""
    finite = sample.finite
    if not len(finite):
        return "no finite values" if len(sample.values) else "no values"
    fraction = float(np.mean(np.trunc(finite) != finite))
    low, high = float(finite.min()), float(finite.max())
    facts = [f"{fraction:.0%} non-integer".replace("%", " %"), f"max {high:.4g}"]
    if len(finite) < len(sample.values):
        facts.append("with NaN or infinite values")
    if low < 0:
        return f"{', '.join(facts)}, min {low:.4g}: negative values, so scaled, z-scored or residuals"
    if fraction == 0:
        return f"{', '.join(facts)}: whole numbers"
    return f"{', '.join(facts)}: {_guess(sample, finite, high)}"


def _guess(sample: Sample, finite: Array, high: float) -> str:
    total = _common_sum(sample, lambda values: values)
    if total is not None:
        kind = {10_000: "CP10k", 1_000_000: "CPM or TPM"}.get(round(total), "normalised to equal depth")
        return f"row sums all about {total:,.0f}: {kind}"
    logged: list[tuple[str, Callable[[Array], Array]]] = [
        ("log1p", np.expm1),
        ("log2(x + 1)", lambda values: np.exp2(values) - 1),
    ]
    if high < 60:
        for label, undo in logged:
            total = _common_sum(sample, undo)
            if total is not None:
                return f"{label} of counts normalised to {total:,.0f} a cell"
        squares = finite**2
        if np.allclose(squares, np.round(squares), atol=1e-3):
            return "square roots of counts"
    if high <= 1:
        return "scaled to at most 1"
    if high < 20:
        return "log-transformed, or scaled"
    return "normalised or otherwise transformed"


def _common_sum(sample: Sample, undo: Callable[[Array], Array]) -> float | None:
    """The sum that every sampled cell shares after ``undo``, if they do."""
    if sample.indptr is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        running = np.concatenate([[0.0], np.cumsum(undo(sample.values))])
        sums = np.diff(running[sample.indptr])
    sums = sums[sums != 0]
    if len(sums) < 2 or not np.isfinite(sums).all():
        return None
    middle = float(np.median(sums))
    return middle if bool((np.abs(sums - middle) <= _EQUAL_SUMS * abs(middle)).all()) else None
