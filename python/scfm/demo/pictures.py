"""The demo's pictures of cells: the model's embedding and PCA's of the same cells, coloured by cell type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scfm.plot import umap

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["draw_cells"]


def draw_cells(cells: AnnData, work: Path, ours: Mapping[str, str], *, quick: bool) -> None:
    """umap.png of the model's embedding and umap_pca.png. ours: its key in obsm -> title."""
    ((basis, title),) = ours.items()
    pictures = {basis: (title, "umap.png"), "X_pca": ("PCA-50 of the same cells", "umap_pca.png")}
    for key, (what, name) in pictures.items():
        # umap-learn compiles itself for 20 seconds at first use; a quick run draws two dimensions as is.
        points = cells.obsm[key][:, :2] if quick else cells.obsm[key]
        umap(points, color=cells.obs["cell_type"].to_numpy(), title=what, path=work / name)
