"""Cells known again from other genes: the score by its formula, components of genes that vary together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.special import log_softmax

from scfm.errors import InvalidArgumentError
from scfm.evaluate.cell_contrast import GenePca, contrast_scores


def test_the_score_is_its_formula() -> None:
    draw = np.random.default_rng(0)
    first = draw.normal(size=(9, 5))
    second = first + draw.normal(size=(9, 5))
    groups = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0])
    losses, correct = contrast_scores(first, second, groups, temperature=0.2)
    one_way, _ = contrast_scores(first, second, groups, temperature=0.2, symmetric=False)
    for group in (0, 1):
        cells = np.flatnonzero(groups == group)
        a, b = (x[cells] / np.linalg.norm(x[cells], axis=1, keepdims=True) for x in (first, second))
        scores = a @ b.T / 0.2
        np.testing.assert_allclose(one_way[cells], -np.diagonal(log_softmax(scores, axis=1)))
        both = -np.diagonal(log_softmax(scores, axis=1)) - np.diagonal(log_softmax(scores.T, axis=1))
        np.testing.assert_allclose(losses[cells], both / 2)
        assert (correct[cells] == (scores.argmax(axis=1) == np.arange(len(cells)))).all()


def test_components_know_cells_by_genes_that_vary_together() -> None:
    """Programs of genes, of which either half of a cell's genes shows a part."""
    draw = np.random.default_rng(1)
    program = draw.integers(0, 12, 600)
    activity = draw.gamma(0.5, 2.0, size=(260, 12))
    cells = np.log1p(draw.poisson(activity[:, program]))
    pca = GenePca(sparse.csr_matrix(cells[:200]))
    half = draw.random((60, 600)) < 0.5
    groups = np.arange(60) // 20
    first, second = (
        pca.of(sparse.csr_matrix(np.where(side, cells[200:], 0.0)), groups, 25) for side in (half, ~half)
    )
    losses, correct = contrast_scores(first, second, groups, temperature=0.1)
    assert correct.mean() > 0.8 and losses.mean() < 0.5 * np.log(20)
    shuffled = draw.permuted(cells[200:], axis=1)
    first, second = (
        pca.of(sparse.csr_matrix(np.where(side, shuffled, 0.0)), groups, 25) for side in (half, ~half)
    )
    assert contrast_scores(first, second, groups, temperature=0.1)[1].mean() < 0.5


def test_views_that_do_not_fit_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="views of shapes"):
        contrast_scores(np.zeros((3, 2)), np.zeros((4, 2)), np.zeros(3, dtype=np.int64), temperature=1.0)
