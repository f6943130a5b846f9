"""Every kernel compiled for sm_80, sm_90 and sm_100: no spills, products on tensor cores, loads that run ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiled


@cache
def reports() -> list[dict]:
    """One run of the command for all tests, in a process of its own: compiled even where others are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scfm.kernels.aot", "--json"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.stdout.startswith("["), ran.stderr[-4000:]
    return json.loads(ran.stdout)


def test_nothing_spills_and_products_use_the_tensor_cores() -> None:
    assert [r for r in reports() if r["complaint"]] == []


def test_shared_memory_fits_the_device() -> None:
    limits = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
    assert [r for r in reports() if r["shared"] > limits[r["architecture"]]] == []


@pytest.mark.parametrize(("architecture", "instruction"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_products_use_the_newest_matrix_instructions(architecture: int, instruction: str) -> None:
    found = [r for r in reports() if r["architecture"] == architecture and r["multiplies"]]
    assert len(found) >= 18
    assert [r for r in found if r["matrix"] != instruction] == []


def test_inner_loops_copy_ahead() -> None:
    """Every loop around a product loads the next tiles by asynchronous 16-byte copies."""
    assert [r for r in reports() if r["multiplies"] and not r["async_copies"]] == []


@pytest.mark.parametrize(
    "operator", ["varlen", "generative", "graph", "favor", "embed_norm", "table_grads", "head", "product"]
)
def test_every_operator_is_here_for_every_architecture(operator: str) -> None:
    for architecture in (80, 90, 100):
        names = [r["name"] for r in reports() if r["architecture"] == architecture]
        assert sum(name.startswith(operator) for name in names) >= 2


def test_the_committed_table_is_of_these_kernels() -> None:
    """Its figures are its compiler's; after a change of kernels or tiles it is to be printed again."""
    committed = (Path(__file__).parents[2] / "benches" / "results" / "triton-aot.txt").read_text()
    missing = [r["name"] for r in reports() if f"{r['name']:<44} sm_{r['architecture']:<3}" not in committed]
    assert missing == []
    assert committed.count(" sm_") == len(reports())
