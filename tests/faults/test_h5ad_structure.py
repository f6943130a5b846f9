"""Fault rows 19-21 and 25-32 by the registry of mutate_h5ad: every malformed file ends in an error that says
where, never in a crash, a hang, a memory bomb or wrong numbers; every unusual but sound file gives the counts
unharmed. Both ways of reading are tried on each."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from counts_files import read_everything
from mutate_h5ad import MUTATIONS, good_counts, mutated
from run_child import run_child

SPARE_MEMORY = 1 << 30


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name: str, reader: str, tmp_path: Path) -> None:
    expected = MUTATIONS[name]
    outcome = run_child(read_everything, str(mutated(name, tmp_path)), memory=SPARE_MEMORY)
    if expected.expect == "same":
        assert outcome.kind == "ok", outcome
        np.testing.assert_array_equal(outcome.value, good_counts())
    else:
        assert outcome.raised(expected.expect), outcome
        assert outcome.raised("ScfmError")
        assert f"{name}.h5ad" in outcome.message
        for word in expected.words:
            assert word in outcome.message, outcome.message


def test_registry_has_both_kinds() -> None:
    expectations = [entry.expect for entry in MUTATIONS.values()]
    assert expectations.count("same") > 20
    assert len(expectations) - expectations.count("same") > 40


def test_child_reports_a_crash_and_a_hang() -> None:
    """The harness itself: without this, a crash might pass for success."""
    assert run_child(os.abort).message == "SIGABRT"
    assert run_child(_sleep, timeout=0.5).kind == "timeout"
    assert run_child(_allocate, memory=1 << 28).raised("MemoryError")


def _sleep() -> None:
    import time

    time.sleep(30)


def _allocate() -> None:
    np.ones(1 << 30)
