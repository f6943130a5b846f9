"""Row 37: raw counts are found where they are, never where they are not, and the error says what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from scfm.data.matrix import CscInMemory, CsrInMemory, DenseInMemory
from scfm.data.raw_counts import Sample, describe, sample_matrix
from scfm.data.read import read
from scfm.errors import FormatError, InvalidArgumentError, NotCountsError


def simulated(seed: int = 0, num_cells: int = 300, num_genes: int = 400, depth: float = 1.0) -> np.ndarray:
    """Gamma-Poisson counts, float64, with log-normal gene means and cell depths."""
    rng = np.random.default_rng(seed)
    means = rng.lognormal(-1, 1.5, num_genes) * rng.lognormal(0, 0.4, (num_cells, 1)) * depth
    counts = rng.poisson(means * rng.gamma(2, 0.5, (num_cells, num_genes))).astype(np.float64)
    counts[:, 0] += 1
    return counts


def depth_normalised(counts: np.ndarray, total: float) -> np.ndarray:
    return counts / counts.sum(1, keepdims=True) * total


def z_scored(counts: np.ndarray) -> np.ndarray:
    logged = np.log1p(depth_normalised(counts, 1e4))
    return (logged - logged.mean(0)) / (logged.std(0) + 1e-9)


def pearson_residuals(counts: np.ndarray) -> np.ndarray:
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    return (counts - expected) / np.sqrt(expected + expected**2 / 100 + 1e-12)


def tpm_like(counts: np.ndarray) -> np.ndarray:
    lengths = np.random.default_rng(9).lognormal(7, 1, counts.shape[1])
    return depth_normalised(counts / lengths, 1e6)


TRANSFORMS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "cp10k": (lambda x: depth_normalised(x, 1e4), "CP10k"),
    "log1p_cp10k": (lambda x: np.log1p(depth_normalised(x, 1e4)), "log1p of counts normalised to 10,000"),
    "sqrt": (np.sqrt, "square roots"),
    "z_score": (z_scored, "negative values"),
    "scaled_to_max": (lambda x: x / x.max(), "scaled to at most 1"),
    "log2_cpm": (
        lambda x: np.log2(depth_normalised(x, 1e6) + 1),
        "log2(x + 1) of counts normalised to 1,000,000",
    ),
    "tpm_like": (tpm_like, "CPM or TPM"),
    "pearson_residuals": (pearson_residuals, "negative values"),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_recognised(name: str, dtype: type) -> None:
    """The truth table: eight common transforms, each refused and named, whatever the layout."""
    transform, words = TRANSFORMS[name]
    values = transform(simulated()).astype(dtype)
    for matrix in (values, sparse.csr_matrix(values)):
        with pytest.raises(NotCountsError) as caught:
            read(anndata.AnnData(matrix))
        assert words in str(caught.value)
        assert "X: " in str(caught.value)
        assert "assume_counts" in str(caught.value)
    with pytest.raises(NotCountsError):
        read(anndata.AnnData(sparse.csc_matrix(values)))


COUNT_SETS: dict[str, Callable[[], np.ndarray]] = {
    **{f"float_seed{seed}": (lambda seed=seed: simulated(seed)) for seed in range(6)},
    **{f"depth{depth}": (lambda depth=depth: simulated(7, depth=depth)) for depth in (0.01, 0.1, 10, 300)},
    "float32": lambda: simulated(8).astype(np.float32),
    "int64": lambda: simulated(8).astype(np.int64),
    "uint8": lambda: np.minimum(simulated(8), 255).astype(np.uint8),
    "few_cells": lambda: simulated(9, num_cells=2),
    "one_cell": lambda: simulated(9, num_cells=1),
    "few_genes": lambda: simulated(10, num_genes=3),
    "nothing_expressed": lambda: np.zeros((200, 30)),
    "one_everywhere": lambda: np.ones((200, 30), np.float32),
    "equal_depth": lambda: (
        np.random.default_rng(0).multinomial(1000, np.ones(50) / 50, 200).astype(np.float32)
    ),
    "some_empty_cells": lambda: simulated(11) * (np.arange(300) % 3 == 0)[:, None],
}


@pytest.mark.parametrize("name", COUNT_SETS)
def test_no_false_alarm(name: str) -> None:
    counts = COUNT_SETS[name]()
    for matrix in (counts, sparse.csr_matrix(counts), sparse.csc_matrix(counts)):
        source = read(anndata.AnnData(matrix))
        assert source.is_counts
        assert source.counts_from == "X"
        total = sum(float(block.data.sum(dtype=np.float64)) for block in source.blocks(64))
        assert total == counts.sum(dtype=np.float64)


def test_twenty_count_sets() -> None:
    assert len(COUNT_SETS) >= 20


def test_order_of_candidates(tmp_path: Path) -> None:
    counts = simulated()
    logged = np.log1p(depth_normalised(counts, 1e4))
    adata = anndata.AnnData(sparse.csr_matrix(logged))
    adata.layers["other"] = sparse.csr_matrix(counts + 3)
    adata.layers["counts"] = sparse.csr_matrix(counts + 1)
    assert read(adata).counts_from == "layers['counts']"
    adata.X = sparse.csr_matrix(counts)
    assert read(adata).counts_from == "layers['counts']"
    adata.raw = anndata.AnnData(sparse.csr_matrix(counts + 2))
    assert read(adata).counts_from == "raw.X"
    adata.write_h5ad(tmp_path / "all.h5ad")
    assert read(tmp_path / "all.h5ad").counts_from == "raw.X"
    adata.raw = anndata.AnnData(sparse.csr_matrix(logged))
    assert read(adata).counts_from == "layers['counts']"
    del adata.layers["counts"]
    assert read(adata).counts_from == "X"


@pytest.mark.parametrize(
    ("layer", "label", "offset"),
    [("X", "X", 0), ("raw", "raw.X", 2), ("raw.X", "raw.X", 2), ("other", "layers['other']", 3)],
)
def test_explicit_layer(layer: str, label: str, offset: int, tmp_path: Path) -> None:
    counts = simulated()
    adata = anndata.AnnData(sparse.csr_matrix(counts))
    adata.layers["other"] = sparse.csr_matrix(counts + 3)
    adata.layers["counts"] = sparse.csr_matrix(counts + 1)
    adata.raw = anndata.AnnData(sparse.csr_matrix(counts + 2))
    adata.write_h5ad(tmp_path / "all.h5ad")
    for given in (adata, tmp_path / "all.h5ad"):
        source = read(given, layer=layer)
        assert source.counts_from == label
        total = sum(float(block.data.sum(dtype=np.float64)) for block in source.blocks())
        assert total == (counts + offset).sum()


def test_unknown_layer_lists_what_there_is() -> None:
    adata = anndata.AnnData(simulated())
    adata.layers["spliced"] = simulated()
    with pytest.raises(InvalidArgumentError, match=r"'count'.*layers\['spliced'\], X"):
        read(adata, layer="count")
    with pytest.raises(InvalidArgumentError, match="raw"):
        read(adata, layer="raw")


def test_error_points_to_the_layer_with_counts() -> None:
    counts = simulated()
    adata = anndata.AnnData(z_scored(counts))
    adata.layers["umi"] = counts
    with pytest.raises(NotCountsError, match=r"X: .*negative.*Whole numbers are in layers\['umi'\]"):
        read(adata)
    with pytest.raises(NotCountsError, match=r"layers\['umi'\]"):
        read(adata, layer="X")
    assert read(adata, layer="umi").is_counts


@pytest.mark.filterwarnings("ignore::scfm.errors.ScfmWarning")
def test_assume_counts_takes_x_or_the_layer() -> None:
    counts = simulated()
    logged = np.log1p(counts)
    adata = anndata.AnnData(logged)
    adata.layers["counts"] = counts
    source = read(adata, assume_counts=True)
    assert (source.counts_from, source.is_counts) == ("X", False)
    total = sum(float(block.data.sum()) for block in source.blocks())
    assert total == pytest.approx(logged.sum())
    assert read(adata, assume_counts=True, layer="counts").is_counts


def test_nothing_to_read() -> None:
    with pytest.raises(FormatError, match="no X"):
        read(anndata.AnnData(obs={"a": [1, 2]}))


def test_sample_covers_start_middle_and_end() -> None:
    """A matrix whose last cells alone are normalised is not taken for counts."""
    for part in (slice(0, 10), slice(495, 505), slice(990, 1000)):
        counts = simulated(num_cells=1000)
        counts[part] /= 3
        shape = {"num_cells": 1000, "num_genes": 400, "name": "n", "dataset": "X"}
        rows, columns = sparse.csr_matrix(counts), sparse.csc_matrix(counts)
        dense = DenseInMemory(counts, name="n", dataset="X")
        assert not sample_matrix(dense).is_counts
        assert not sample_matrix(CsrInMemory(rows.indptr, rows.indices, rows.data, **shape)).is_counts
        assert not sample_matrix(
            CscInMemory(columns.indptr, columns.indices, columns.data, **shape)
        ).is_counts


def test_descriptions_of_odd_samples() -> None:
    assert describe(Sample(np.array([]), np.array([0]))) == "no values"
    assert describe(Sample(np.array([np.nan]), np.array([0, 1]))) == "no finite values"
    assert "with NaN" in describe(Sample(np.array([0.5, np.nan]), np.array([0, 2])))
    assert "100 % non-integer, max 6.25" in describe(Sample(np.array([6.25, 0.5]), None))


@pytest.mark.data
def test_real_normalised_layer(data_file: Callable[[str], Path]) -> None:
    path = data_file("perturb_norman_mcfaline_500hvg.h5ad")
    assert read(path).counts_from == "X"
    with pytest.raises(NotCountsError, match="log"):
        read(path, layer="lognorm")
