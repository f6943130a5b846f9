"""What hidden values of genes cost without a network: how often a gene has each bin, and what it is worth on average.

A model that fills in hidden expression must know more than the gene's name. Two kinds of values, each with baselines
that are fitted on train cells and scored on the very items that a model is asked for:

    bins      cross-entropy and accuracy of the bins' overall frequencies, and of each gene's, smoothed with them
    numbers   squared error of each gene's mean, shrunk to that of all; of its mean among cells of like depth, shrunk to
              the gene's; and of its mean times the cell's own level, which the visible values tell

Smoothing is chosen on a slice of the train cells that the counts leave out (then everything is counted again); test
cells choose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm.errors import InvalidArgumentError
from scfm.evaluate.split import keyed_generator

__all__ = ["BinScore", "GeneValues", "gene_bin_baselines", "gene_mean_baselines", "scaled_to_cells"]

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
TUNING_FRACTION = 0.1
NUM_DEPTHS = 8


@dataclass(frozen=True)
class GeneValues:
    """Genes of some cells. genes: int64 (N,), from 0; cells: int64 (N,), whose each is; values: (N,), bins or numbers;
    depths: float64 (N,), of its cell in whatever unit, or None.
    """

    genes: NDArray[np.int64]
    cells: NDArray[np.int64]
    values: NDArray[np.float64]
    depths: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        shapes = {len(self.genes), len(self.cells), len(self.values)}
        if len(shapes) != 1 or (self.depths is not None and len(self.depths) not in shapes):
            raise InvalidArgumentError(f"arrays of lengths {sorted(shapes)}", where="GeneValues")

    def take(self, chosen: NDArray[np.bool_]) -> GeneValues:
        depths = None if self.depths is None else self.depths[chosen]
        return GeneValues(self.genes[chosen], self.cells[chosen], self.values[chosen], depths)


@dataclass(frozen=True)
class BinScore:
    """losses: nats, float64 (N,); correct: bool (N,); settings: what was chosen."""

    losses: NDArray[np.float64]
    correct: NDArray[np.bool_]
    settings: str = ""


def gene_bin_baselines(
    train: GeneValues, test: GeneValues, *, num_genes: int, num_bins: int, seed: int = 0
) -> dict[str, BinScore]:
    """Scores of "bin frequency" and "bin frequency of the gene" on the test items. values: bins below num_bins.

    Raises InvalidArgumentError for no train item, or genes and bins that there are not.
    """
    _check(train, num_genes, num_bins)
    _check(test, num_genes, num_bins)
    counted, held = _tuning_split(train, seed)
    strength = min(
        STRENGTHS,
        key=lambda one: _bin_losses(_bin_tables(counted, num_genes, num_bins, one)[1], held)[0].mean(),
    )
    overall, of_genes = _bin_tables(train, num_genes, num_bins, strength)
    return {
        "bin frequency": BinScore(*_bin_losses(overall, test), "add-one"),
        "bin frequency of the gene": BinScore(*_bin_losses(of_genes, test), f"strength {strength:g}"),
    }


def gene_mean_baselines(
    train: GeneValues, test: GeneValues, *, num_genes: int, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Predictions, float64 (N,), of "gene mean" and, where depths are given, "gene mean at depth" for the test items.

    Raises InvalidArgumentError for no train item or genes that there are not.
    """
    _check(train, num_genes)
    _check(test, num_genes)
    counted, held = _tuning_split(train, seed)
    strength = min(STRENGTHS, key=lambda one: _error(_Means(counted, num_genes, one).of(held), held))
    found = {"gene mean": _Means(train, num_genes, strength).of(test)}
    if train.depths is not None and test.depths is not None:
        second = min(
            STRENGTHS,
            key=lambda one: _error(_DepthMeans(counted, num_genes, strength, one).of(held), held),
        )
        found["gene mean at depth"] = _DepthMeans(train, num_genes, strength, second).of(test)
    return found


def scaled_to_cells(
    means: NDArray[np.float64], test: GeneValues, visible: GeneValues, visible_means: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Predicted ``means`` (N,) of the test items times each cell's level: what is visible over what its means say.

    visible: what can be seen of the same cells; visible_means: (its items,), what ``means`` would say there.
    """
    size = int(max(test.cells.max(initial=-1), visible.cells.max(initial=-1))) + 1
    seen = np.bincount(visible.cells, weights=visible.values, minlength=size)
    expected = np.bincount(visible.cells, weights=visible_means, minlength=size)
    level = np.divide(seen, expected, out=np.ones(size), where=expected > 0)
    return np.asarray(means * level[test.cells])


class _Means:
    """Each gene's mean, shrunk to the mean of all genes as if ``strength`` more values had been like that."""

    def __init__(self, items: GeneValues, num_genes: int, strength: float) -> None:
        overall = float(items.values.mean())
        sums = np.bincount(items.genes, weights=items.values, minlength=num_genes)
        counts = np.bincount(items.genes, minlength=num_genes)
        self.table = (sums + strength * overall) / (counts + strength)

    def of(self, items: GeneValues) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.table[items.genes]
        return found


class _DepthMeans:
    """Each gene's mean among cells of like depth (equal shares of the cells), shrunk to the gene's."""

    def __init__(self, items: GeneValues, num_genes: int, strength: float, second: float) -> None:
        assert items.depths is not None
        _, first = np.unique(items.cells, return_index=True)
        shares = np.linspace(0, 1, NUM_DEPTHS + 1)[1:-1]
        self.edges = np.quantile(items.depths[first], shares)
        self.num_genes = num_genes
        means = _Means(items, num_genes, strength).table
        places = self._places(items)
        size = NUM_DEPTHS * num_genes
        sums = np.bincount(places, weights=items.values, minlength=size)
        counts = np.bincount(places, minlength=size)
        self.table = (sums + second * np.tile(means, NUM_DEPTHS)) / (counts + second)

    def of(self, items: GeneValues) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.table[self._places(items)]
        return found

    def _places(self, items: GeneValues) -> NDArray[np.int64]:
        assert items.depths is not None
        return np.asarray(np.searchsorted(self.edges, items.depths) * self.num_genes + items.genes)


def _bin_tables(
    items: GeneValues, num_genes: int, num_bins: int, strength: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities of the bins for each gene, (num_genes, num_bins): the same for all genes, and each gene's own."""
    bins = items.values.astype(np.int64)
    overall = np.bincount(bins, minlength=num_bins) + 1.0
    overall /= overall.sum()
    counts = np.bincount(items.genes * num_bins + bins, minlength=num_genes * num_bins)
    own = counts.reshape(num_genes, num_bins) + strength * overall
    return np.broadcast_to(overall, own.shape), own / own.sum(axis=1, keepdims=True)


def _bin_losses(
    table: NDArray[np.float64], items: GeneValues
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    bins = items.values.astype(np.int64)
    return -np.log(table[items.genes, bins]), table.argmax(axis=1)[items.genes] == bins


def _error(found: NDArray[np.float64], items: GeneValues) -> float:
    return float(((found - items.values) ** 2).mean())


def _tuning_split(items: GeneValues, seed: int) -> tuple[GeneValues, GeneValues]:
    """Items to count, and items of other cells to choose the smoothing with; with one cell alone both are all."""
    cells = np.unique(items.cells)
    if len(cells) < 2:
        return items, items
    held = keyed_generator(seed, "tuning").permutation(cells)[: max(round(TUNING_FRACTION * len(cells)), 1)]
    inside = np.isin(items.cells, held)
    return items.take(~inside), items.take(inside)


def _check(items: GeneValues, num_genes: int, num_bins: int | None = None) -> None:
    if not len(items.genes):
        raise InvalidArgumentError("no items", where="gene_value_baselines")
    if items.genes.min() < 0 or items.genes.max() >= num_genes:
        raise InvalidArgumentError(
            f"genes from {items.genes.min()} to {items.genes.max()}; expected 0 to {num_genes - 1}",
            where="genes",
        )
    if num_bins is not None and (items.values.min() < 0 or items.values.max() >= num_bins):
        raise InvalidArgumentError(
            f"bins from {items.values.min():g} to {items.values.max():g}; expected 0 to {num_bins - 1}",
            where="values",
        )
