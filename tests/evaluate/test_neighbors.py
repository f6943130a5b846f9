"""kNN scores against scikit-learn, on planted labels, with ties, and against leakage."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.errors import InvalidArgumentError
from scfm.evaluate import knn_label_score, macro_f1, nearest_neighbors, stratified_split


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_neighbors_equal_sklearn(metric, chunk):
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(0)
    reference, query = rng.normal(size=(90, 6)), rng.normal(size=(40, 6))
    expected_distance, expected = (
        NearestNeighbors(n_neighbors=9, metric=metric, algorithm="brute").fit(reference).kneighbors(query)
    )
    positions, distances = nearest_neighbors(query, reference, k=9, metric=metric, chunk_cells=chunk)
    assert np.array_equal(positions, expected)
    np.testing.assert_allclose(distances, expected_distance, atol=1e-7)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_scores_equal_sklearn_when_votes_cannot_tie(metric):
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(1)
    labels = np.array(["a", "b"])[rng.integers(0, 2, 300)]
    points = rng.normal(size=(300, 5)) + (labels == "a")[:, None]
    train, test = stratified_split(labels, seed=3)
    oracle = KNeighborsClassifier(15, metric=metric, algorithm="brute").fit(points[train], labels[train])
    predicted = oracle.predict(points[test])
    score = knn_label_score(points, labels, train, test, metric=metric)
    assert score.predictions == predicted.tolist()
    assert score.accuracy == accuracy_score(labels[test], predicted)
    assert score.macro_f1 == pytest.approx(f1_score(labels[test], predicted, average="macro"))
    assert (score.num_train, score.num_test) == (train.size, test.size)


def test_macro_f1_equals_sklearn_with_labels_on_one_side_only():
    from sklearn.metrics import f1_score

    truth, predicted = np.array([0, 0, 1, 3, 3, 3]), np.array([0, 2, 1, 3, 0, 3])
    assert macro_f1(truth, predicted) == pytest.approx(f1_score(truth, predicted, average="macro"))


def test_equal_distances_go_to_the_lower_position():
    reference = np.array([[1.0], [0.0], [1.0], [0.0], [1.0], [0.0]])
    positions, _ = nearest_neighbors([[0.0]], reference, k=4, metric="euclidean")
    assert positions.tolist() == [[1, 3, 5, 0]]
    positions, _ = nearest_neighbors([[0.0]], reference, k=2, metric="euclidean")
    assert positions.tolist() == [[1, 3]]


def test_equal_votes_go_to_the_nearest():
    points = np.array([[0.0], [0.1], [0.2], [0.3], [0.01]])
    labels = ["z", "a", "a", "z", "z"]
    score = knn_label_score(points, labels, [0, 1, 2, 3], [4], k=4, metric="euclidean")
    assert score.predictions == ["z"]


def test_planted_labels_are_found_and_shuffled_labels_are_not():
    rng = np.random.default_rng(2)
    codes = np.repeat(np.arange(4), 100)
    points = np.eye(4)[codes] + 0.1 * rng.normal(size=(400, 4))
    train, test = stratified_split(codes, seed=0)
    assert knn_label_score(points, codes, train, test).accuracy == 1.0
    assert knn_label_score(points, rng.permutation(codes), train, test).accuracy < 0.45


def test_test_labels_never_vote():
    rng = np.random.default_rng(4)
    points = rng.normal(size=(60, 3))
    labels = np.array(["a", "b", "c"])[rng.integers(0, 3, 60)]
    train, test = np.arange(40), np.arange(40, 60)
    first = knn_label_score(points, labels, train, test)
    labels[test] = "c"
    assert knn_label_score(points, labels, train, test).predictions == first.predictions


def test_cells_on_both_sides_are_refused():
    with pytest.raises(InvalidArgumentError, match="1 cells are in train and in test, the first is cell 2"):
        knn_label_score(np.ones((4, 2)), list("aabb"), [0, 1, 2], [2, 3], k=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": np.full((4, 2), np.nan)}, "4 of 4 cells have NaN"),
        ({"embedding": np.ones(4)}, "shape"),
        ({"embedding": np.ones((4, 0))}, "shape"),
        ({"labels": ["a", None, "b", "b"]}, "1 cells have no label, the first is cell 1"),
        ({"labels": ["a", float("nan"), "b", "b"]}, "no label"),
        ({"labels": ["a"]}, "4 cells need as many labels"),
        ({"k": 3}, "k is 3 but there are 2 train cells"),
        ({"k": 0}, "k is 0"),
        ({"test": []}, "non-empty"),
        ({"test": [2, 2]}, "twice"),
        ({"test": [2, 4]}, "there are 4 cells"),
        ({"train": np.array([True, False])}, "mask train"),
        ({"metric": "manhattan"}, "expected 'cosine' or 'euclidean'"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"embedding": np.ones((4, 2)), "labels": list("aabb"), "train": [0, 1], "test": [2, 3], "k": 1}
    with pytest.raises(InvalidArgumentError, match=message):
        knn_label_score(**(good | change))


def test_split_keeps_every_label_on_both_sides_and_is_keyed():
    labels = np.array(["a"] * 50 + ["b"] * 10 + ["c"] * 2 + ["d"])
    train, test = stratified_split(labels, test_fraction=0.2, seed=1)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(63))
    assert {name: int((labels[test] == name).sum()) for name in "abcd"} == {"a": 10, "b": 2, "c": 1, "d": 0}
    again = stratified_split(labels, test_fraction=0.2, seed=1)
    assert np.array_equal(again[1], test)
    assert not np.array_equal(stratified_split(labels, test_fraction=0.2, seed=2)[1], test)


def test_split_is_not_the_first_cells():
    _, test = stratified_split(["a"] * 1000, seed=0)
    assert 350 < test.mean() < 650
