"""Every test starts, and leaves the process, with the instruction set and the threads it found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

native = pytest.importorskip("scfm._native", reason="the native module is not built")


@pytest.fixture(autouse=True)
def _restore_native_state() -> Iterator[None]:
    isa, threads = native.active_isa(), native.get_num_threads()
    yield
    native.set_isa(isa)
    native.set_num_threads(threads)


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set by name; those this processor lacks are skipped."""
    if request.param not in native.available_isas():
        pytest.skip(f"this processor does not run {request.param}")
    native.set_isa(request.param)
    return str(request.param)
