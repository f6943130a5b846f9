"""Cells in two dimensions by UMAP, coloured by a label or a number.

A picture, not evidence: UMAP keeps neighbourhoods and distorts distances and sizes. Scores are in
``scfm.evaluate``.
"""

from __future__ import annotations

import warnings
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm.errors import InvalidArgumentError
from scfm.plot.figure import QUALITATIVE, missing, plain_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["umap", "umap_coordinates"]

MARKERS = ("o", "^", "s", "D", "v")
MOST_GROUPS = len(QUALITATIVE) * len(MARKERS)


def umap(
    adata: Any,
    *,
    color: str | ArrayLike | None = None,
    basis: str = "X_geneformer",
    title: str | None = None,
    path: str | PathLike[str] | None = None,
    seed: int = 0,
    num_neighbors: int = 15,
    metric: str = "cosine",
) -> Figure:
    """Draw cells by UMAP and return the matplotlib figure; with ``path`` it is also saved there.

    adata: AnnData, whose ``obsm[basis]`` is drawn, or an array (cells, dimensions); two dimensions are
    drawn as they are. color: a column of obs (AnnData only), or one label or number a cell. Needs the extra
    ``plot``. Raises InvalidArgumentError naming the key that is missing and those that exist.
    """
    points, colors, legend = _resolve(adata, color, basis)
    if points.ndim != 2 or points.shape[1] < 2:
        raise InvalidArgumentError(
            f"an embedding has shape (cells, dimensions), found {points.shape}", where="umap"
        )
    if colors is not None and len(colors) != len(points):
        raise InvalidArgumentError(f"color has {len(colors)} entries for {len(points)} cells", where="umap")
    place = (
        points
        if points.shape[1] == 2
        else umap_coordinates(points, seed=seed, num_neighbors=num_neighbors, metric=metric)
    )
    figure, axes = plain_figure(7.5 if colors is not None else 5.5, 5.0)
    size = float(np.clip(12_000 / max(len(place), 1), 2.0, 28.0))
    if colors is None:
        axes.scatter(place[:, 0], place[:, 1], s=size, color=QUALITATIVE[0], linewidths=0)
    elif colors.dtype.kind in "fiu":
        points_drawn = axes.scatter(place[:, 0], place[:, 1], c=colors, s=size, cmap="viridis", linewidths=0)
        figure.colorbar(points_drawn, ax=axes, label=legend, shrink=0.7)
    else:
        _draw_groups(axes, place, colors, legend, size)
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    save_figure(figure, path)
    return figure


def umap_coordinates(
    points: ArrayLike, *, seed: int = 0, num_neighbors: int = 15, metric: str = "cosine"
) -> NDArray[np.float32]:
    """UMAP of (cells, dimensions): float32 (cells, 2), the same for the same seed. Needs umap-learn."""
    array = np.asarray(points, dtype=np.float32)
    if len(array) < 4:
        raise InvalidArgumentError(f"UMAP needs at least 4 cells, found {len(array)}", where="umap")
    if not np.isfinite(array).all():
        cell = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise InvalidArgumentError(f"cell {cell} has NaN or infinite values", where="umap")
    try:
        from umap import UMAP
    except ImportError as error:
        raise missing("umap-learn") from error
    neighbors = min(num_neighbors, len(array) - 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="umap")  # one on n_jobs with a seed: exactly what is wanted
        warnings.filterwarnings("ignore", module="sklearn")
        reducer = UMAP(n_neighbors=neighbors, metric=metric, random_state=seed, n_jobs=1)
        return np.asarray(reducer.fit_transform(array), dtype=np.float32)


def _resolve(
    adata: Any, color: str | ArrayLike | None, basis: str
) -> tuple[NDArray[Any], NDArray[Any] | None, str]:
    """Points, one colour value a cell (or None) and the legend's title."""
    if not hasattr(adata, "obsm"):
        if isinstance(color, str):
            raise InvalidArgumentError(
                f"color={color!r} names a column, but an array has none",
                where="umap",
                hint="Pass the labels.",
            )
        return np.asarray(adata), None if color is None else _color_values(color), ""
    if basis not in adata.obsm:
        raise InvalidArgumentError(
            f"obsm has no {basis!r}; it has {list(adata.obsm)}",
            where="umap",
            hint="Run scfm.tl.embed first, or give basis=.",
        )
    points = np.asarray(adata.obsm[basis])
    if color is None:
        return points, None, ""
    if not isinstance(color, str):
        return points, _color_values(color), ""
    if color not in adata.obs:
        raise InvalidArgumentError(f"obs has no {color!r}; it has {list(adata.obs.columns)}", where="umap")
    return points, _color_values(adata.obs[color].to_numpy()), color.replace("_", " ")


def _color_values(values: ArrayLike) -> NDArray[Any]:
    """Numbers stay numbers; anything else becomes text, missing values "unlabelled"."""
    array = np.asarray(values)
    if array.dtype.kind in "fiu":
        return array
    return np.array(["unlabelled" if v is None or v != v else str(v) for v in array.tolist()], dtype=str)


def _draw_groups(axes: Axes, place: NDArray[Any], groups: NDArray[Any], legend: str, size: float) -> None:
    """One colour a group, the largest drawn first so that rare cells stay on top."""
    names, counts = np.unique(groups, return_counts=True)
    if len(names) > MOST_GROUPS:
        raise InvalidArgumentError(
            f"{len(names)} groups cannot be told apart by colour (at most {MOST_GROUPS})",
            where="umap",
            hint="Colour by a coarser label or by a number.",
        )
    for position, group in enumerate(np.argsort(-counts, kind="stable")):
        inside = groups == names[group]
        axes.scatter(
            place[inside, 0],
            place[inside, 1],
            s=size,
            color=QUALITATIVE[position % len(QUALITATIVE)],
            marker=MARKERS[position // len(QUALITATIVE)],
            linewidths=0,
            alpha=0.85,
            label=f"{names[group]} ({counts[group]:,})",
        )
    axes.legend(
        title=legend or None,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=8,
        title_fontsize=9,
        alignment="left",
        markerscale=max(1.0, 5.0 / size**0.5),
    )
