"""Sources that reach other processes: pickled into a fresh one, or forked in the middle of a pass."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import scfm
from scfm.errors import InvalidArgumentError


@pytest.fixture
def counts() -> sp.csr_matrix:
    return sp.random(4000, 60, density=0.2, format="csr", rng=0, data_rvs=lambda n: np.ones(n)).astype(
        np.float32
    )


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_a_pickled_source_reads_in_a_fresh_process(name: str, counts: sp.csr_matrix, tmp_path: Path) -> None:
    path = tmp_path / name
    adata = ad.AnnData(counts)
    if name.endswith(".zarr"):
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path, compression="gzip")
    pickled = tmp_path / "source.pkl"
    pickled.write_bytes(pickle.dumps(scfm.read(path)))
    script = (
        f"import pickle; s = pickle.load(open({str(pickled)!r}, 'rb'));"
        "print(sum(float(b.data.sum()) for b in s.blocks(500)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == counts.sum()


def _in_a_child(work: Callable[[], None]) -> int:
    """The exit code of a fork that runs ``work``; fails if it hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(7)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@pytest.mark.parametrize("way", ["drop", "go on", "start anew"])
def test_a_fork_in_the_middle_of_a_pass(way: str, counts: sp.csr_matrix, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    ad.AnnData(counts).write_h5ad(path, compression="gzip")
    source = scfm.read(path)
    passes = [source.blocks(100)]
    next(passes[0])
    time.sleep(0.2)  # the reading threads have come to rest, waiting for room

    def work() -> None:
        if way == "drop":
            passes.clear()
        elif way == "go on":
            with pytest.raises(InvalidArgumentError, match="fork"):
                next(passes[0])
        else:
            assert sum(block.num_cells for block in source.blocks(100)) == 4000

    assert _in_a_child(work) == 0
    assert 100 + sum(block.num_cells for block in passes[0]) == 4000
