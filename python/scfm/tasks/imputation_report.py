"""``scfm.tl.imputation_report``: is imputed expression better than what was measured? Against counts that were hidden.

Every count of the cells is thinned: each unit stays seen with one probability, else it is hidden. The two parts are
independent looks at one cell, so what predicts the hidden one from the seen one has found expression, not noise. Beside
the model stand the seen counts as they are, the same scaled to the cell's full depth, their average over similar cells,
and the mean of all cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from scfm import _native
from scfm.data.csr import CsrBlock
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.errors import InvalidArgumentError
from scfm.evaluate import Metric, Report, Row, paired_bootstrap
from scfm.evaluate.depth_baselines import (
    cell_correlations,
    cell_errors,
    log_profiles,
    shares_of,
    smoothed_over_neighbors,
)
from scfm.models.base import FoundationModel
from scfm.tasks.impute import Imputation

__all__ = ["imputation_report"]

ERROR = Metric("squared error", "lower", "ln(1 + CP10k)^2", 4)
CORRELATION = Metric("correlation", "higher")
_LEAST_CELLS = 3


def imputation_report(
    data: Any,
    model: FoundationModel,
    *,
    seen_share: float = 0.5,
    target_depth: str | float | None = None,
    num_neighbors: int = 15,
    max_cells: int = 500,
    counts_layer: str | None = None,
    species: str | None = None,
    token_budget: int | None = None,
    seed: int = 0,
) -> Report:
    """Squared error and correlation of ln(1 + CP10k), cell by cell, with the hidden part of the counts.

    data: whatever scfm.read accepts, with raw counts; of more than max_cells, evenly spaced ones are taken.
    model: scFoundation, variant "gene". seen_share: probability that a unit of a count stays seen. target_depth: as for
    ``scfm.tl.impute``; by default that of the cell before thinning. All methods see the same genes, those of the data
    that the model knows, and the same thinned counts; draws are keyed by (seed, cell, gene). Raises
    InvalidArgumentError, NotCountsError, GeneMappingError.
    """
    if not 0.0 < seen_share < 1.0:
        raise InvalidArgumentError(f"{seen_share}; expected a share between 0 and 1", where="seen_share")
    if num_neighbors < 1 or max_cells < _LEAST_CELLS:
        raise InvalidArgumentError(
            f"{num_neighbors} and {max_cells}; expected at least 1 and {_LEAST_CELLS}",
            where="num_neighbors, max_cells",
        )
    source = read(data, layer=counts_layer)
    if len(source) > max_cells:
        source = source.select(np.linspace(0, len(source) - 1, max_cells).astype(np.int64))
    imputation = Imputation(
        model, f"f{1 / seen_share!r}" if target_depth is None else target_depth, token_budget=token_budget
    )
    columns = imputation.columns_of(source.genes, species)
    seen, hidden = _thinned(source, columns, seen_share, seed)
    scored = _scored_cells(seen, hidden, source)
    seen, hidden = seen[scored], hidden[scored]
    truth = log_profiles(shares_of(hidden)).toarray()
    predictions = {
        model.family: _predicted(imputation, seen, columns),
        "seen counts as they are": np.log1p(_unscaled(seen, hidden).toarray()),
        "seen counts, scaled": log_profiles(shares_of(seen)).toarray(),
        f"mean of {num_neighbors} nearest cells": log_profiles(
            smoothed_over_neighbors(seen, num_neighbors=num_neighbors)
        ).toarray(),
        "mean of all cells": np.tile(
            log_profiles(sparse.csr_matrix(shares_of(seen).mean(axis=0))).toarray(), (len(truth), 1)
        ),
    }
    return _report(predictions, truth, source.name, model.family, seen_share, len(source), seed)


def _thinned(
    source: CellSource, columns: np.ndarray, seen_share: float, seed: int
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Seen and hidden counts of the genes that the model knows; other columns are empty. CSR float64."""
    blocks = list(source.blocks(source.comfortable_block_size))
    seen, hidden = [], []
    for block in blocks:
        cells = np.arange(block.row_start, block.row_start + block.num_cells)
        shares = np.full(block.num_cells, seen_share)
        kept = _native.thin_counts(block.indptr, block.indices, block.data, cells, shares, seed, 0)
        known = columns[block.indices] >= 0
        seen.append(_matrix(block, np.where(known, kept, 0.0)))
        hidden.append(_matrix(block, np.where(known, block.data - kept, 0.0)))
    return sparse.vstack(seen, format="csr"), sparse.vstack(hidden, format="csr")


def _matrix(block: CsrBlock, values: np.ndarray) -> sparse.csr_matrix:
    shape = (block.num_cells, block.num_genes)
    matrix = sparse.csr_matrix((values, block.indices.copy(), block.indptr.copy()), shape=shape)
    matrix.eliminate_zeros()
    return matrix


def _scored_cells(seen: sparse.csr_matrix, hidden: sparse.csr_matrix, source: CellSource) -> np.ndarray:
    """Cells with something to see and something to find; one seen count is no depth."""
    sums = [np.asarray(part.sum(axis=1)).ravel() for part in (seen, hidden)]
    scored = np.flatnonzero((sums[0] > 1) & (sums[1] > 0))
    if len(scored) < _LEAST_CELLS:
        raise InvalidArgumentError(
            f"{len(scored)} of {len(source)} cells have counts on both sides of the split; at least "
            f"{_LEAST_CELLS} are needed",
            path=source.name,
        )
    return scored


def _predicted(imputation: Imputation, seen: sparse.csr_matrix, columns: np.ndarray) -> np.ndarray:
    """float64 (cells, genes), ln(1 + CP10k) over the data's genes, 0 where the model knows none.

    What the model predicts sums to about 10^4 over all its genes; over those of the data it is scaled to that, as every
    method's prediction is.
    """
    from anndata import AnnData

    known = columns >= 0
    cells = AnnData(sparse.csr_matrix(seen[:, known]))
    cells.var_names = [imputation.model.vocab.genes[place] for place in columns[known]]
    source = imputation.model.read_cells(cells, counts_layer="X")
    found = np.zeros(seen.shape)
    for rows, values in imputation.rows(source, columns[known]):
        found[np.ix_(rows, known)] = np.maximum(np.expm1(values.astype(np.float64)), 0.0)
    totals = found.sum(axis=1, keepdims=True)
    logged: np.ndarray = np.log1p(np.divide(found, totals, out=np.zeros_like(found), where=totals > 0) * 1e4)
    return logged


def _unscaled(seen: sparse.csr_matrix, hidden: sparse.csr_matrix) -> sparse.csr_matrix:
    """Seen counts in the truth's units, per 10,000 of the hidden part's total, without being scaled to it."""
    totals = np.asarray(hidden.sum(axis=1)).ravel()
    return sparse.csr_matrix(sparse.diags(1e4 / totals) @ seen)


def _report(
    predictions: dict[str, np.ndarray],
    truth: np.ndarray,
    name: str,
    ours: str,
    seen_share: float,
    num_cells: int,
    seed: int,
) -> Report:
    errors = {method: cell_errors(found, truth) for method, found in predictions.items()}
    correlations = {method: cell_correlations(found, truth) for method, found in predictions.items()}
    rows, gains = [], {}
    for method in predictions:
        values = {
            ERROR.name: float(errors[method].mean()),
            CORRELATION.name: float(correlations[method].mean()),
        }
        rows.append(Row(method, "ours" if method == ours else "baseline", values))
        if method != ours:
            gains[method, ERROR.name] = paired_bootstrap(errors[method], errors[ours], seed=seed)
            gains[method, CORRELATION.name] = paired_bootstrap(
                correlations[ours], correlations[method], seed=seed
            )
    return Report(
        title=f"Imputation of {name}: hidden counts predicted from seen ones",
        metrics=(ERROR, CORRELATION),
        rows=tuple(rows),
        split=f"each count's units seen with probability {seen_share:g}, else hidden; nothing is fitted to the hidden",
        num_train=0,
        num_test=len(truth),
        seed=seed,
        gains=gains,
        notes=(
            f"{num_cells - len(truth):,} of {num_cells:,} cells had too few counts to be split",
            "the hidden part is one noisy sample of the cell: no method can reach an error of 0",
        ),
    )
