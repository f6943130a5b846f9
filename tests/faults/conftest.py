"""Every fault of a CSR file is tried on both ways of reading it: natively, and through h5py."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["native", "h5py"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of reading that is in force, in this process and in children of run_child."""
    if request.param == "h5py":
        monkeypatch.setenv("SCFM_READER", "h5py")
    else:
        monkeypatch.delenv("SCFM_READER", raising=False)
    return str(request.param)
