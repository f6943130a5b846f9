"""The scripts of benches/gpu are no package: they find each other, and benches/shapes.py, by standing on the path."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHES = Path(__file__).parents[2] / "benches"
sys.path += [str(BENCHES / "gpu"), str(BENCHES)]
