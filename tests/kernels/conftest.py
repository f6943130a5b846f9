"""Kernel tests run in Triton's interpreter, in child processes.

Triton reads TRITON_INTERPRET when it and the kernels are imported, so one process has either interpreted kernels or
compiled ones; which one must not depend on the tests that happened to be collected before. So this process only
collects, children with TRITON_INTERPRET=1 run the selected tests of this folder, one child a core, and each test here
takes over a child's verdict. Tests marked ``compiled`` stay in this process and start what they need themselves.

With TRITON_INTERPRET=1 set, pytest runs the tests directly; with SCFM_KERNEL_DEVICE=cuda, on a GPU, compiled.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "ops"))  # packs.py: the inputs and the bound that all paths share
DEVICE = os.environ.get("SCFM_KERNEL_DEVICE", "cpu")
RUNS_HERE = os.environ.get("TRITON_INTERPRET") == "1" or DEVICE != "cpu"
NUM_CHILDREN = min(2, os.cpu_count() or 1)
VERDICTS = "SCFM_KERNEL_VERDICTS"  # the file that a child leaves for its parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: needs kernels that are compiled, not interpreted")


@pytest.fixture
def device() -> str:
    """Where the kernels' tensors live."""
    return DEVICE


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, and new lists places that do not exist, until a kernel writes them."""
    new_empty = torch.Tensor.new_empty

    def poison(self: torch.Tensor, *arguments: object, **keywords: object) -> torch.Tensor:
        fresh = new_empty(self, *arguments, **keywords)
        return fresh.fill_(math.nan if fresh.is_floating_point() else 2**30)

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if RUNS_HERE or HERE not in pyfuncitem.path.parents or pyfuncitem.get_closest_marker("compiled"):
        return None
    outcome, text = _child_verdicts(pyfuncitem.session)[pyfuncitem.nodeid]
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


@cache
def _child_verdicts(session: pytest.Session) -> dict[str, tuple[str, str]]:
    """{test: (outcome, what it said)} of the children that run all of this folder's selected tests between them."""
    chosen = [
        i.nodeid for i in session.items if HERE in i.path.parents and not i.get_closest_marker("compiled")
    ]
    shares = [share for share in (chosen[n::NUM_CHILDREN] for n in range(NUM_CHILDREN)) if share]
    with ThreadPoolExecutor(len(shares)) as pool:
        found = list(pool.map(lambda share: _verdicts_of_child(session, share), shares))
    return {name: verdict for verdicts in found for name, verdict in verdicts.items()}


def _verdicts_of_child(session: pytest.Session, chosen: list[str]) -> dict[str, tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        verdicts, arguments = Path(folder) / "verdicts.json", Path(folder) / "arguments"
        arguments.write_text("\n".join(["-q", "-p", "no:cacheprovider", *chosen]), encoding="utf-8")
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **one_thread, "TRITON_INTERPRET": "1", VERDICTS: str(verdicts)}
        child = subprocess.run(
            [sys.executable, "-m", "pytest", f"@{arguments}"],
            cwd=session.config.rootpath,
            env=environment,
            capture_output=True,
            text=True,
        )
        if not verdicts.exists():
            said = child.stdout[-4000:] + child.stderr[-4000:]
            return dict.fromkeys(chosen, ("failed", f"the child ended with {child.returncode}\n{said}"))
        found = {name: tuple(v) for name, v in json.loads(verdicts.read_text(encoding="utf-8")).items()}
    return {name: found.get(name, ("failed", "the child never ran this test")) for name in chosen}


_seen: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _seen[report.nodeid] = (report.outcome, report.longreprtext or str(report.longrepr or ""))


def pytest_sessionfinish() -> None:
    if path := os.environ.get(VERDICTS):
        Path(path).write_text(json.dumps(_seen), encoding="utf-8")
