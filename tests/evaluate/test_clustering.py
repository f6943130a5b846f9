"""NMI and ARI against scikit-learn; k-means finds planted groups."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.errors import InvalidArgumentError, MissingDependencyError
from scfm.evaluate import adjusted_rand_index, cluster_score, normalized_mutual_information

labelings = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2)
)


@settings(max_examples=100, deadline=None)
@given(labelings)
def test_agreement_equals_sklearn(pair):
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    first, second = pair
    assert adjusted_rand_index(first, second) == pytest.approx(adjusted_rand_score(first, second), abs=1e-12)
    expected = normalized_mutual_info_score(first, second)
    assert normalized_mutual_information(first, second) == pytest.approx(expected, abs=1e-9)


def test_planted_groups_score_one_and_noise_scores_near_zero():
    rng = np.random.default_rng(0)
    labels = np.repeat(["x", "y", "z"], 60)
    points = 5.0 * np.eye(3)[np.repeat(np.arange(3), 60)] + 0.1 * rng.normal(size=(180, 3))
    found = cluster_score(points, labels)
    assert (found.nmi, found.ari, found.num_clusters, found.num_cells) == (1.0, 1.0, 3, 180)
    assert abs(cluster_score(points, rng.permutation(labels)).ari) < 0.1


def test_same_seed_same_score():
    points = np.random.default_rng(1).normal(size=(80, 4))
    labels = np.arange(80) % 5
    assert cluster_score(points, labels, seed=7) == cluster_score(points, labels, seed=7)


def test_bad_input_is_named():
    with pytest.raises(InvalidArgumentError, match="3 cells cannot form 4 clusters"):
        cluster_score(np.ones((3, 2)), list("abc"), num_clusters=4)
    with pytest.raises(InvalidArgumentError, match="two labelings"):
        adjusted_rand_index([0, 1], [0])


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"scfm\[evaluate\]"):
        cluster_score(np.eye(3), list("abc"))
