"""The demo: real cells, a small model trained from nothing, scores beside the baselines' and a verdict."""

from __future__ import annotations

from scfm.demo.cells import celltypist_cells, demo_cells
from scfm.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "celltypist_cells", "demo_cells", "run_demo"]
