"""The demo's cells are real integer counts, and values that are not are refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from scfm.demo import celltypist_cells, demo_cells
from scfm.demo.cells import recover_counts
from scfm.errors import NotCountsError


def test_demo_cells_are_whole_counts_that_fit_their_library_size():
    pytest.importorskip("scanpy")
    cells = demo_cells()
    assert cells.shape == (700, 765)
    counts = cells.X.data
    assert counts.min() >= 1 and np.array_equal(counts, np.rint(counts))
    assert (np.asarray(cells.X.sum(axis=1)).ravel() < cells.obs["n_counts"].to_numpy()).all()
    assert cells.obs["cell_type"].nunique() == 10
    assert cells.uns["demo"]["largest_deviation_from_integer"] < 0.25


def test_normalising_the_counts_gives_back_scanpys_values():
    scanpy = pytest.importorskip("scanpy")
    cells = demo_cells()
    source = scanpy.datasets.pbmc68k_reduced()
    assert cells.obs_names.equals(source.obs_names) and cells.var_names.equals(source.raw.var_names)
    again = np.log1p(cells.X.toarray() / source.obs["n_counts"].to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(again, source.raw.X.toarray(), atol=0.02)
    assert (cells.obs["cell_type"].astype(str) == source.obs["bulk_labels"].astype(str)).all()


def planted():
    rng = np.random.default_rng(0)
    counts = sparse.random(50, 40, 0.3, format="csr", rng=rng)
    counts.data = rng.integers(1, 400, counts.nnz).astype(float)
    sizes = np.asarray(counts.sum(axis=1)).ravel() + 1.0
    logged = counts.copy()
    logged.data = np.log1p(counts.data / np.repeat(sizes, np.diff(counts.indptr)) * 1e4).astype(np.float32)
    return counts, sizes, logged


def test_counts_are_recovered_exactly():
    counts, sizes, logged = planted()
    found, deviation = recover_counts(logged, sizes)
    assert np.array_equal(found.toarray(), counts.toarray()) and found.dtype == np.float32
    assert deviation < 0.01


def test_wrong_library_sizes_are_refused_and_the_cell_named():
    _, sizes, logged = planted()
    sizes[7] *= 1.03
    with pytest.raises(NotCountsError, match="in cell 7"):
        recover_counts(logged, sizes)


def test_celltypists_sample():
    pytest.importorskip("celltypist")
    cells = celltypist_cells()
    assert cells.shape == (559, 32786)
    assert cells.X.data.min() >= 1 and np.array_equal(cells.X.data, np.rint(cells.X.data))
