"""Label accuracy of a linear classifier on an embedding: can labels be read off it by a plane?

Logistic regression on standardised dimensions, with the same penalty for every embedding. It and the vote of the
nearest cells (neighbors.py) part ways where labels are directions rather than neighbourhoods, so both are shown.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm.errors import InvalidArgumentError, MissingDependencyError
from scfm.evaluate.arrays import check_embedding, check_split, encode_labels
from scfm.evaluate.neighbors import macro_f1

__all__ = ["LinearScore", "linear_label_score"]

MOST_ITERATIONS = 500


@dataclass(frozen=True)
class LinearScore:
    """Label prediction of the test cells. ``correct``: bool (test cells,), for paired comparisons."""

    accuracy: float
    macro_f1: float
    correct: NDArray[np.bool_]
    num_train: int
    num_test: int


def linear_label_score(
    embedding: ArrayLike,
    labels: Sequence[Any] | NDArray[Any],
    train: ArrayLike,
    test: ArrayLike,
    *,
    penalty: float = 1.0,
) -> LinearScore:
    """Predict each test cell's label by logistic regression on the train cells.

    embedding: (cells, dimensions); train, test: positions or masks without overlap (checked); penalty: of the squared
    weights, over that of the losses' sum. Raises MissingDependencyError without scikit-learn.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingDependencyError(
            "the linear probe needs scikit-learn", hint="pip install 'scfm[evaluate]'."
        ) from error
    points = check_embedding(embedding, "linear_label_score")
    codes, _ = encode_labels(labels, len(points), "linear_label_score")
    train_rows, test_rows = check_split(train, test, len(points), "linear_label_score")
    if len(np.unique(codes[train_rows])) < 2:
        raise InvalidArgumentError("the train cells have one label", where="linear_label_score")
    mean, deviation = points[train_rows].mean(axis=0), points[train_rows].std(axis=0)
    scaled = (points - mean) / np.where(deviation > 0.0, deviation, 1.0)
    model = LogisticRegression(C=1.0 / penalty, max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the same limit for every embedding
        model.fit(scaled[train_rows], codes[train_rows])
    predicted = np.asarray(model.predict(scaled[test_rows]), dtype=np.int64)
    correct = predicted == codes[test_rows]
    return LinearScore(
        accuracy=float(correct.mean()),
        macro_f1=macro_f1(codes[test_rows], predicted),
        correct=correct,
        num_train=train_rows.size,
        num_test=test_rows.size,
    )
