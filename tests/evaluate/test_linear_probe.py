"""The linear probe reads labels that are directions, and is not fooled by a dimension's scale."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.errors import InvalidArgumentError
from scfm.evaluate import knn_label_score, linear_label_score, stratified_split

pytest.importorskip("sklearn")


def cells(num_cells: int = 600, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One direction among 20 tells the label; the others are noise."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, num_cells)
    points = draw.normal(size=(num_cells, 20))
    points[:, 0] += 4.0 * labels
    return points, np.array(["a", "b", "c"])[labels]


def test_a_direction_is_found() -> None:
    points, labels = cells()
    train, test = stratified_split(labels, seed=1)
    score = linear_label_score(points, labels, train, test)
    assert score.accuracy > 0.93 > 0.4 and score.macro_f1 > 0.93
    assert score.accuracy == score.correct.mean()
    assert (score.num_train, score.num_test) == (len(train), len(test))
    assert score.accuracy > knn_label_score(points, labels, train, test).accuracy
    scaled = points * np.geomspace(1e-3, 1e3, 20)
    assert linear_label_score(scaled, labels, train, test).accuracy == pytest.approx(score.accuracy)


def test_noise_says_nothing() -> None:
    points, labels = cells()
    train, test = stratified_split(labels, seed=1)
    assert linear_label_score(points[:, 1:], labels, train, test).accuracy < 0.5


def test_what_cannot_be_scored_is_named() -> None:
    points, labels = cells()
    with pytest.raises(InvalidArgumentError, match="one label"):
        linear_label_score(points, labels, np.flatnonzero(labels == "a"), np.flatnonzero(labels == "b"))
    with pytest.raises(InvalidArgumentError, match="in train and in test"):
        linear_label_score(points, labels, [0, 1, 2], [2, 3])
