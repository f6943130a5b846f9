"""Real cells that come inside PyPI packages, so that the demo needs no network and no download.

scanpy's wheel carries 700 blood cells with author labels as log1p CP10k values; their counts are integers,
so ``round(expm1(value) * library_size / 10,000)`` recovers them exactly, and how far the values lay from an
integer is checked before they are believed.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scfm.errors import FormatError, MissingDependencyError, NotCountsError
from scfm.evaluate import expression_baselines

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["MAX_DEVIATION", "celltypist_cells", "demo_baselines", "demo_cells", "recover_counts"]

MAX_DEVIATION = 0.25
PBMC_FILE = "10x_pbmc68k_reduced.h5ad"


def demo_cells() -> AnnData:
    """700 peripheral blood cells x 765 genes (10x Genomics, 68k PBMC), raw counts.

    X: CSR float32 of integers; obs: ``cell_type`` (10 labels), ``n_counts`` (library size over all genes,
    before the 765 were chosen); var index: gene symbols. uns["demo"] says where they come from and the
    largest deviation from an integer. Needs scanpy (extra ``demo``). Raises NotCountsError if the values
    are not rounded counts after all.
    """
    from anndata import AnnData

    source = _pbmc68k_reduced()
    library_size = source.obs["n_counts"].to_numpy(dtype=np.float64)
    counts, deviation = recover_counts(sparse.csr_matrix(source.raw.X), library_size, source=PBMC_FILE)
    obs = source.obs[["n_counts"]].astype(np.float64)
    obs["cell_type"] = source.obs["bulk_labels"].astype(str).astype("category")
    return AnnData(
        X=counts,
        obs=obs,
        var=source.raw.var.copy(),
        uns={"demo": {"source": f"scanpy: {PBMC_FILE}", "largest_deviation_from_integer": deviation}},
    )


def demo_baselines(cells: AnnData, train: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Embeddings of ``demo_cells`` by PCA and by raw highly variable genes, fitted on the train cells alone."""
    return expression_baselines(
        cells.X.indptr,
        cells.X.indices,
        cells.X.data,
        cells.n_vars,
        train,
        library_size=cells.obs["n_counts"].to_numpy(),
    )


def recover_counts(
    log_expression: sparse.csr_matrix,
    library_size: NDArray[np.float64],
    *,
    source: str = "log1p CP10k values",
) -> tuple[sparse.csr_matrix, float]:
    """Integer counts (CSR float32) behind log1p CP10k values, and the largest distance from an integer.

    Raises NotCountsError naming the cell if that distance reaches 0.25 or a stored value rounds to nothing.
    """
    counts = sparse.csr_matrix(log_expression, dtype=np.float64, copy=True)
    counts.sort_indices()
    cell = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    real = np.expm1(counts.data) * library_size[cell] / 10_000.0
    rounded = np.rint(real)
    distance = np.abs(real - rounded)
    wrong = np.flatnonzero((distance >= MAX_DEVIATION) | ((rounded < 1.0) & (counts.data != 0.0)))
    if wrong.size:
        first = wrong[0]
        raise NotCountsError(
            f"{wrong.size} values are not near a whole count; in cell {cell[first]} one is {real[first]:.3f}",
            path=source,
            hint="The library sizes do not belong to these values.",
        )
    counts.data = rounded.astype(np.float32)
    counts.eliminate_zeros()
    return sparse.csr_matrix(counts, dtype=np.float32), float(distance.max(initial=0.0))


def celltypist_cells() -> AnnData:
    """celltypist's sample: 559 cells x 32,786 genes, raw counts, without labels.

    X: CSR float32; var index: gene symbols. Needs celltypist, which carries the file. Reading its CSV takes
    seconds.
    """
    try:
        from celltypist.samples import get_sample_csv
    except ImportError as error:
        raise MissingDependencyError(
            "these cells come with celltypist, which is not installed",
            hint="Install it with: pip install celltypist",
        ) from error
    import pandas as pd
    from anndata import AnnData

    path = get_sample_csv()
    table = pd.read_csv(path, index_col=0)
    matrix = sparse.csr_matrix(table.to_numpy(dtype=np.float32))
    if matrix.nnz and (matrix.data.min() < 0 or (matrix.data != np.rint(matrix.data)).any()):
        raise NotCountsError("the sample does not hold whole counts", path=path)
    return AnnData(
        X=matrix,
        obs=pd.DataFrame(index=table.index.astype(str)),
        var=pd.DataFrame(index=table.columns.astype(str)),
        uns={"demo": {"source": "celltypist: sample_cell_by_gene.csv"}},
    )


def _pbmc68k_reduced() -> Any:
    """The file as scanpy ships it, read by its place in the wheel: importing scanpy itself takes seconds."""
    from importlib.util import find_spec
    from pathlib import Path

    import anndata

    found = find_spec("scanpy")
    if found is None or found.origin is None:
        raise MissingDependencyError(
            "the demo's cells come with scanpy, which is not installed",
            hint="Install it with: pip install 'scfm[demo]'",
        )
    path = Path(found.origin).parent / "datasets" / PBMC_FILE
    if not path.is_file():
        return _through_scanpy(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dozens, all about the age of the file's format
        source = anndata.read_h5ad(path)
    if source.raw is None or "n_counts" not in source.obs or "bulk_labels" not in source.obs:
        raise FormatError("raw.X, obs['n_counts'] or obs['bulk_labels'] is missing", path=path)
    return source


def _through_scanpy(path: Any) -> Any:
    """Another scanpy version may keep the file elsewhere: ask it, and never let it download."""
    import scanpy

    if not hasattr(scanpy.datasets, "pbmc68k_reduced"):
        raise FormatError(
            "this scanpy no longer ships the cells", path=path, hint="Install scanpy 1.10 or 1.11."
        )
    return scanpy.datasets.pbmc68k_reduced()
