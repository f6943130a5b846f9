"""The CUDA kernels without a GPU: built for the host under tests/cuda/emulation, once a session."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [
    str(TESTS / "native"),
    str(TESTS / "ops"),
]  # blocks.py and packs.py: inputs that other rooms share

from cuda_emulator import Emulator, build  # noqa: E402


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated kernels as a shared library."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed: the kernels cannot be built for the host")
    return build(compiler, tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulator(library: Path) -> Emulator:
    return Emulator(library)
