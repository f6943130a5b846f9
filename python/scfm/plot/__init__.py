"""Figures in the manner of scanpy's ``pl``; matplotlib is imported when one is drawn."""

from __future__ import annotations

from scfm.plot.learning_curve import learning_curve
from scfm.plot.umap import umap

__all__ = ["learning_curve", "umap"]
