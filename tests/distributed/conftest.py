"""One server of ranks for all tests: torch is imported once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dist_run import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started
