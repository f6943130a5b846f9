"""Normalisation, variable genes and PCA against the definition, scanpy and scikit-learn; no test leakage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from scfm.errors import InvalidArgumentError
from scfm.evaluate import expression_baselines, fit_pca, highly_variable_genes, log1p_cp10k


def counts(num_cells=120, num_genes=80, seed=0):
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 4.0, num_genes) * rng.gamma(2.0, 0.5, (num_cells, 1))
    return sparse.csr_matrix(rng.poisson(rates).astype(np.float32))


def test_log1p_cp10k_is_the_definition():
    matrix = counts()
    dense = matrix.toarray().astype(float)
    expected = np.log1p(dense / dense.sum(1, keepdims=True) * 1e4)
    got = log1p_cp10k(matrix.indptr, matrix.indices, matrix.data, 80)
    np.testing.assert_allclose(got.toarray(), expected, rtol=1e-12)
    sizes = np.arange(120) + 5.0
    got = log1p_cp10k(matrix.indptr, matrix.indices, matrix.data, 80, library_size=sizes)
    np.testing.assert_allclose(got.toarray(), np.log1p(dense / sizes[:, None] * 1e4), rtol=1e-12)


def test_empty_cells_stay_zero_and_bad_sizes_are_named():
    got = log1p_cp10k([0, 0, 2, 2], [0, 1], [1, 3], 2)
    assert np.isfinite(got.toarray()).all() and got[0].nnz == 0
    with pytest.raises(InvalidArgumentError, match="cell 1 has counts but a library size of 0"):
        log1p_cp10k([0, 0, 2], [0, 1], [1, 3], 2, library_size=[0.0, 0.0])
    with pytest.raises(InvalidArgumentError, match="expected \\(2,\\)"):
        log1p_cp10k([0, 0, 2], [0, 1], [1, 3], 2, library_size=[1.0])


def test_variable_genes_equal_scanpys_seurat_rule():
    scanpy = pytest.importorskip("scanpy")
    matrix = counts(300, 200, seed=5)
    matrix = matrix[:, np.flatnonzero(matrix.getnnz(axis=0))]  # scanpy lets unexpressed genes widen its bins
    expression = log1p_cp10k(matrix.indptr, matrix.indices, matrix.data, matrix.shape[1])
    adata = scanpy.AnnData(expression.copy())
    adata.uns["log1p"] = {"base": None}
    table = scanpy.pp.highly_variable_genes(adata, n_top_genes=60, flavor="seurat", inplace=False)
    expected = np.flatnonzero(table["highly_variable"])
    assert expected.size == 60
    assert np.array_equal(highly_variable_genes(expression, num_genes=60), expected)


def test_unexpressed_and_constant_genes_are_never_chosen():
    dense = np.array([[0, 2.0, 5], [0, 2.0, 1], [0, 2.0, 0]])
    assert highly_variable_genes(sparse.csr_matrix(np.log1p(dense)), num_genes=3).tolist() == [2]


@pytest.mark.parametrize("shape", [(100, 30), (30, 100)])
def test_pca_equals_sklearn(shape):
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(1)
    dense = rng.normal(size=shape) * np.linspace(3, 0.1, shape[1])
    ours = fit_pca(sparse.csr_matrix(dense), num_components=8)
    theirs = PCA(8, svd_solver="full").fit(dense)
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-8)
    new = rng.normal(size=(5, shape[1]))
    np.testing.assert_allclose(np.abs(ours.transform(new)), np.abs(theirs.transform(new)), atol=1e-5)
    np.testing.assert_allclose(ours.components @ ours.components.T, np.eye(8), atol=1e-9)


def test_test_cells_change_neither_genes_nor_components():
    matrix = counts()
    train = np.arange(90)
    first = expression_baselines(
        matrix.indptr, matrix.indices, matrix.data, 80, train, num_variable_genes=20, num_components=5
    )
    changed = matrix.copy()
    changed.data[matrix.indptr[90] :] *= 50  # test cells become wild
    second = expression_baselines(
        changed.indptr, changed.indices, changed.data, 80, train, num_variable_genes=20, num_components=5
    )
    assert set(first) == {"PCA-5", "raw HVG"}
    for name in first:
        assert np.array_equal(first[name][train], second[name][train])
        assert first[name].dtype == np.float32 and first[name].shape == (
            120,
            {"PCA-5": 5, "raw HVG": 20}[name],
        )


def test_train_as_mask_equals_positions():
    matrix = counts()
    mask = np.zeros(120, dtype=bool)
    mask[10:100] = True
    by_mask = expression_baselines(matrix.indptr, matrix.indices, matrix.data, 80, mask)
    by_rows = expression_baselines(matrix.indptr, matrix.indices, matrix.data, 80, np.arange(10, 100))
    assert np.array_equal(by_mask["PCA-50"], by_rows["PCA-50"])


def test_too_few_cells_are_refused():
    one = sparse.csr_matrix(np.ones((1, 3)))
    with pytest.raises(InvalidArgumentError, match="no variance"):
        highly_variable_genes(one)
    with pytest.raises(InvalidArgumentError, match="no components"):
        fit_pca(one)
