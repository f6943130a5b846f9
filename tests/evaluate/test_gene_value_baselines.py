"""Baselines of hidden values: frequencies and means by hand, smoothing that helps, nothing taken from test cells."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.errors import InvalidArgumentError
from scfm.evaluate.gene_value_baselines import (
    GeneValues,
    gene_bin_baselines,
    gene_mean_baselines,
    scaled_to_cells,
)


def items(num_cells: int = 400, num_genes: int = 30, *, seed: int = 0) -> GeneValues:
    """Genes with bins of their own, in cells that are deep or shallow; gene 29 never occurs."""
    draw = np.random.default_rng(seed)
    cells = np.repeat(np.arange(num_cells), 12)
    genes = draw.integers(0, num_genes - 1, len(cells))
    deep = np.arange(num_cells) % 2 == 1
    values = np.clip(genes % 5 + 1 + deep[cells] * (genes % 3) + draw.integers(-1, 2, len(cells)), 1, 9)
    return GeneValues(genes, cells, values.astype(np.float64), 3.0 + deep[cells])


def test_frequencies_by_hand() -> None:
    train = GeneValues(np.array([0, 0, 0, 1]), np.zeros(4, dtype=np.int64), np.array([1.0, 1, 2, 2]))
    test = GeneValues(np.array([0, 1, 2]), np.zeros(3, dtype=np.int64), np.array([1.0, 2, 3]))
    found = gene_bin_baselines(train, test, num_genes=3, num_bins=4)
    overall = np.array([1, 3, 3, 1]) / 8
    np.testing.assert_allclose(found["bin frequency"].losses, -np.log(overall[[1, 2, 3]]))
    own = found["bin frequency of the gene"]
    strength = float(own.settings.split()[1])
    want = [(2 + strength * 3 / 8) / (3 + strength), (1 + strength * 3 / 8) / (1 + strength), 1 / 8]
    np.testing.assert_allclose(own.losses, -np.log(want))
    assert own.correct.tolist() == [True, True, False]


def test_knowing_the_gene_and_the_depth_helps() -> None:
    train, test = items(), items(seed=1)
    bins = gene_bin_baselines(train, test, num_genes=30, num_bins=11)
    assert bins["bin frequency of the gene"].losses.mean() < bins["bin frequency"].losses.mean() - 0.3
    assert bins["bin frequency of the gene"].correct.mean() > bins["bin frequency"].correct.mean()
    means = gene_mean_baselines(train, test, num_genes=30)
    errors = {name: ((found - test.values) ** 2).mean() for name, found in means.items()}
    assert errors["gene mean at depth"] < errors["gene mean"] - 0.1 < test.values.var()
    assert set(
        gene_mean_baselines(GeneValues(train.genes, train.cells, train.values), test, num_genes=30)
    ) == {"gene mean"}


def test_a_gene_that_never_occurred_is_worth_the_mean_of_all() -> None:
    train = items()
    new = GeneValues(np.array([29]), np.array([0]), np.array([5.0]), np.array([3.0]))
    means = gene_mean_baselines(train, new, num_genes=30)
    assert means["gene mean"][0] == pytest.approx(train.values.mean())
    scores = gene_bin_baselines(train, new, num_genes=30, num_bins=11)
    one, other = scores.values()
    np.testing.assert_allclose(one.losses, other.losses)


def test_the_order_of_items_changes_nothing() -> None:
    train, test = items(), items(seed=1)
    order = np.random.default_rng(3).permutation(len(train.genes))
    turned = GeneValues(train.genes[order], train.cells[order], train.values[order], train.depths[order])
    for name, found in gene_mean_baselines(train, test, num_genes=30).items():
        np.testing.assert_allclose(gene_mean_baselines(turned, test, num_genes=30)[name], found)


def test_levels_of_cells() -> None:
    visible = GeneValues(np.array([0, 1, 0]), np.array([0, 0, 1]), np.array([2.0, 6.0, 1.0]))
    test = GeneValues(np.array([2, 2, 2]), np.array([0, 1, 2]), np.zeros(3))
    found = scaled_to_cells(np.full(3, 10.0), test, visible, np.array([1.0, 3.0, 2.0]))
    np.testing.assert_allclose(found, [20.0, 5.0, 10.0])


def test_what_does_not_fit_is_named() -> None:
    some = items()
    with pytest.raises(InvalidArgumentError, match="genes from 0 to 28"):
        gene_mean_baselines(some, some, num_genes=20)
    with pytest.raises(InvalidArgumentError, match="bins from"):
        gene_bin_baselines(some, some, num_genes=30, num_bins=5)
    with pytest.raises(InvalidArgumentError, match="no items"):
        gene_mean_baselines(some.take(np.zeros(len(some.genes), dtype=bool)), some, num_genes=30)
    with pytest.raises(InvalidArgumentError, match="lengths"):
        GeneValues(some.genes, some.cells[1:], some.values)
