"""Instruction sets are chosen once and can be forced; the thread pool passes errors on and survives a fork."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest
from blocks import make_block

from scfm import _native as native


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


PRINT_ISA = "from scfm import _native; print(_native.active_isa())"


def test_generic_is_always_there() -> None:
    assert native.available_isas()[0] == "generic"
    assert native.active_isa() in native.available_isas()
    assert set(native.cpu_features()) >= {
        "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16",
    }  # fmt: skip


def test_set_isa(isa: str) -> None:
    assert native.active_isa() == isa


def test_unknown_isa_is_refused_and_changes_nothing() -> None:
    before = native.active_isa()
    with pytest.raises(ValueError, match=r"sse9.*expected one of generic"):
        native.set_isa("sse9")
    assert native.active_isa() == before


def test_environment_forces_the_isa() -> None:
    for name in native.available_isas():
        assert run_python(PRINT_ISA, SCFM_ISA=name).stdout.strip() == name
    best = run_python(PRINT_ISA, SCFM_ISA="")
    assert best.stdout.strip() == native.available_isas()[-1]


def test_environment_with_an_unknown_isa_is_an_error() -> None:
    done = run_python(PRINT_ISA, SCFM_ISA="avx9000")
    assert done.returncode != 0
    assert "ValueError" in done.stderr and "avx9000" in done.stderr and "generic" in done.stderr


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_number_of_threads_has_limits(count: int) -> None:
    with pytest.raises(ValueError, match="set_num_threads"):
        native.set_num_threads(count)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_lowest_failing_task_reports(threads: int) -> None:
    native.set_num_threads(threads)
    assert native.get_num_threads() == threads
    for _ in range(50):
        with pytest.raises(ValueError, match="task 40 failed"):
            native._throw_in_tasks(200, [199, 41, 40, 100])
    native._throw_in_tasks(200, [])  # and the pool still works


def _tokens(seed: int) -> bytes:
    block = make_block(seed, [100] * 200, 300)
    return bytes(native.rank_value(**block.arguments()).token_ids.tobytes())


def _child(queue: multiprocessing.Queue[bytes]) -> None:
    queue.put(_tokens(1))


def test_pool_works_after_fork() -> None:
    native.set_num_threads(3)
    expected = _tokens(1)  # the parent's threads run before the fork
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[bytes] = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(timeout=60)
    assert child.exitcode == 0


def test_callers_on_many_threads() -> None:
    native.set_num_threads(2)
    expected = [_tokens(seed) for seed in range(4)]
    found: dict[int, bytes] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            found[seed] = _tokens(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == expected


def test_row_sums(isa: str) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 40, size=300)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    for data_type in ("f4", "f8", "i1", "u2", "i8"):
        data = rng.integers(0, 100, size=indptr[-1]).astype(data_type)
        expected = [data[a:b].astype(float).sum() for a, b in pairwise(indptr)]
        np.testing.assert_array_equal(native.row_sums(indptr, data), expected)
    with pytest.raises(ValueError, match="indptr"):
        native.row_sums(np.array([0, 4]), np.ones(3))
