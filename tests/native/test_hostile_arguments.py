"""Whatever is passed in, the native module answers with a result or a Python error, never with a signal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocks import make_block
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scfm import _native as native

Array = np.ndarray[Any, np.dtype[Any]]


def arguments(**changed: Any) -> dict[str, Any]:
    return make_block(0, [20, 0, 30], 40).arguments(**changed)


@pytest.mark.parametrize("index_type", ["i4", "i8"])
@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("position", [0, 19, 20, 49])
def test_column_out_of_range(isa: str, index_type: str, bad: int, position: int) -> None:
    indices = arguments()["indices"].astype(index_type)
    indices[position] = bad
    row = 0 if position < 20 else 2
    with pytest.raises(
        ValueError, match=rf"row {row}: indices\[{position}\] = {bad} is out of range for 40 genes"
    ):
        native.rank_value(**arguments(indices=indices))


def test_wide_column_that_would_wrap_around(isa: str) -> None:
    indices = arguments()["indices"].astype(np.int64)
    indices[3] += 2**32
    with pytest.raises(ValueError, match=r"indices\[3\]"):
        native.rank_value(**arguments(indices=indices))


BROKEN_INDPTR = [
    [],
    [1, 20, 20, 50],
    [0, 30, 20, 50],
    [0, 20, 20, 51],
    [0, 20, 20, 49],
    [0, -5, 20, 50],
    [0, 2**62, 20, 50],
]


@pytest.mark.parametrize("indptr", BROKEN_INDPTR)
def test_broken_indptr(indptr: list[int]) -> None:
    with pytest.raises(ValueError, match="indptr"):
        native.rank_value(**arguments(indptr=np.array(indptr, np.int64)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("library_size", np.ones(2), "library_size has 2 entries, expected 3"),
        ("data", np.ones(49, np.float32), "indices has 50 entries, expected 49"),
        ("slot_median", np.ones(1), "slot_median"),
        ("num_single", -1, "num_single"),
        ("num_single", 10_000, "num_single"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", -2, "max_tokens"),
        ("prefix_token", -5, "prefix_token"),
        ("arithmetic", "add", "arithmetic"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.rank_value(**arguments(**{name: value}))


@pytest.mark.parametrize("median", [0.0, -1.0, np.nan, np.inf])
def test_medians_are_finite_and_positive(median: float) -> None:
    medians = arguments()["slot_median"].copy()
    medians[2] = median
    with pytest.raises(ValueError, match=r"slot_median\[2\]"):
        native.rank_value(**arguments(slot_median=medians))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s + 100,
        lambda s: s[::-1].copy(),
        lambda s: np.full_like(s, 0),
        lambda s: np.full_like(s, -2),
        lambda s: np.full_like(s, -1),
        lambda s: s[:-1].copy(),
    ],
)
def test_slots_that_do_not_follow_the_columns(change: Callable[[Array], Array]) -> None:
    with pytest.raises(ValueError, match=r"column_slot|indices"):
        native.rank_value(**arguments(column_slot=change(arguments()["column_slot"])))


ARRAYS = ["indptr", "indices", "data", "library_size", "column_slot", "slot_token", "slot_median"]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda a: np.repeat(a, 2)[::2], ValueError),  # strided
        (lambda a: a[::-1], ValueError),
        (lambda a: a.reshape(1, -1), ValueError),
        (lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype), ValueError),  # misaligned
        (lambda a: a.astype(a.dtype.newbyteorder(">")), TypeError),
        (lambda a: a.astype(np.complex128), TypeError),
        (lambda a: a.astype(object), TypeError),
        (lambda a: a.astype(bool), TypeError),
        (lambda a: a.astype(np.float16), TypeError),
        (lambda a: a.astype("U8"), TypeError),
        (lambda a: a.tolist(), TypeError),
        (lambda a: None, TypeError),
    ],
)
def test_array_arguments_are_named_when_refused(
    name: str, spoil: Callable[[Array], Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=rf"rank_value: {name} "):
        native.rank_value(**arguments(**{name: spoil(arguments()[name])}))
    if name in ("indptr", "indices", "data"):
        csr = {key: arguments()[key] for key in ("indptr", "indices", "data")}
        with pytest.raises(error, match=rf"check_csr: {name} "):
            native.check_csr(**{**csr, name: spoil(csr[name])}, num_genes=40)


def test_read_only_arrays_are_fine() -> None:
    frozen = arguments()
    expected = native.rank_value(**frozen).token_ids
    for name in ARRAYS:
        frozen[name].flags.writeable = False
    np.testing.assert_array_equal(native.rank_value(**frozen).token_ids, expected)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), values=st.booleans())
def test_noise(isa: str, seed: int, values: bool) -> None:
    """Random bytes for arrays: refused by check_csr if and only if something is wrong; never a crash."""
    rng = np.random.default_rng(seed)
    indptr = np.sort(rng.integers(0, 60, size=5))
    indptr[0] = 0
    if rng.random() < 0.3:
        indptr[rng.integers(5)] = rng.integers(-(2**62), 2**62)
    size = int(max(0, min(indptr[-1], 100)))
    indices = rng.integers(-3 if rng.random() < 0.3 else 0, 45, size=size).astype(np.int32)
    data = np.frombuffer(rng.bytes(size * 8), np.float64).copy() if values else rng.random(size)
    sound = native.check_csr(indptr, indices, data, 40).error == ""
    call = arguments(indptr=indptr, indices=indices, data=data, library_size=np.ones(4))
    try:
        native.rank_value(**call)
    except ValueError:
        assert not sound


def test_no_instruction_set_reads_past_the_end(isa: str) -> None:
    """Arrays that end where forbidden memory begins; a process of its own, since a fault there is a signal."""
    if sys.platform == "win32":
        pytest.skip("needs mprotect")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "guard_page_probe.py")],
        env={**os.environ, "SCFM_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"signal or error {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "ok"
