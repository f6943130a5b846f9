"""What launches ask for: one compiled variant for all batches, kept launches, explicit options, 1-d grids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from scfm.kernels import aot

pytestmark = pytest.mark.compiled
# The first pack compiles. Numbers of tokens and cells that are 1, odd, even and multiples of 16 follow, and again.
PACKS = [[300, 20], [304, 16], [299, 18, 2], [1], [640], [17, 0, 1]] * 2
# A product's inner dimension that is a multiple of the block is compiled without masks.
TWO_VARIANTS = "product_kernel"


@cache
def notes() -> list[list[dict]]:
    """What each pack's launches asked for, in a process whose kernels are neither interpreted nor run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "launches.py"), json.dumps(PACKS)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    packs: list[list[dict]] = []
    for note in map(json.loads, ran.stdout.splitlines()):
        packs.append([]) if note["what"] == "pack" else packs[-1].append(note)
    assert len(packs) == len(PACKS)
    return packs


def test_no_batch_compiles_anew() -> None:
    first, *others = notes()
    assert len({n["kernel"] for n in first if n["what"] == "compiled"}) >= 25
    later = [n["kernel"] for pack in others for n in pack if n["what"] == "compiled"]
    assert set(later) <= {TWO_VARIANTS}
    assert len(later) <= 2


def test_launches_are_kept() -> None:
    """The second time around no launch goes through Triton's own launcher."""
    for pack in notes()[len(PACKS) // 2 :]:
        assert {n["what"] for n in pack} == {"launched"}


def test_fusion_is_asked_for_everywhere() -> None:
    assert all(n["enable_fp_fusion"] is True for pack in notes() for n in pack)


def test_grids_have_one_dimension() -> None:
    """Only the first dimension of a grid may pass 65,535."""
    grids = [n["grid"] for pack in notes() for n in pack if n["grid"]]
    assert grids
    assert all(grid[1:3] == [1, 1] for grid in grids)


def test_what_is_compiled_ahead_of_time_is_what_launches_ask_for() -> None:
    """Types and alignments of every target that is not rare, as Triton found them in the arguments."""
    asked: dict[str, list[dict]] = {}
    for note in (n for pack in notes() for n in pack if n["what"] == "compiled"):
        asked.setdefault(note["kernel"], []).append(note["signature"])
    targets = [t for module in aot.MODULES for t in aot.targets_of(module) if not t.rare]
    assert {t.kernel.__name__ for t in targets} == set(asked)
    wrong = {t.name: t.signature for t in targets if t.signature not in asked[t.kernel.__name__]}
    assert wrong == {}
