"""What every scfm figure shares: a canvas that needs no display, few lines, colours most people can tell
apart.

Figures are made without pyplot, so drawing one changes no global state and works in a job without a screen.
In a notebook pyplot is imported, because that is what teaches IPython to show a figure.
"""

from __future__ import annotations

import sys
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["OKABE_ITO", "QUALITATIVE", "plain_figure", "save_figure"]

# Okabe and Ito's eight colours, told apart with any common colour blindness; black is left for text.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
# With more groups, darker and lighter companions follow; beyond that the markers change too.
QUALITATIVE = (*OKABE_ITO, "#332288", "#882255", "#117733", "#999933", "#666666")


def plain_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of ``width`` x ``height`` inches with one pair of axes, without top and right lines."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib") from error
    if "IPython" in sys.modules and _in_notebook():
        import matplotlib.pyplot  # noqa: F401  (registers the notebook's figure formatter)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, path: str | PathLike[str] | None) -> None:
    """Write the figure where asked (format by suffix, 200 dots an inch); nothing without a path."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)


def missing(package: str) -> MissingDependencyError:
    """The error for an optional package of the extra ``plot``."""
    return MissingDependencyError(
        f"figures need {package}, which is not installed", hint="Install it with: pip install 'scfm[plot]'"
    )


def _in_notebook() -> bool:
    shell: Any = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")
