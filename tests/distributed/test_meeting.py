"""Ranks started again in one store meet each other and never the dead."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from scfm.train.distributed.meeting import store_of_this_start

SOON = timedelta(seconds=10)


@pytest.fixture
def server():
    return TCPStore("localhost", 0, None, is_master=True, wait_for_workers=False)


def client(server: TCPStore) -> TCPStore:
    return TCPStore("localhost", server.port, None, is_master=False, wait_for_workers=False)


def start(server: TCPStore, ranks: list[int], size: int, timeout: timedelta = SOON) -> list:
    """The ranks' stores, or what each raised."""

    def meet(rank: int):
        try:
            return store_of_this_start(client(server), rank, size, timeout)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(meet, ranks))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_start_has_a_place_of_its_own(server, size: int) -> None:
    for number in range(3):
        stores = start(server, list(range(size)), size)
        assert not stores[-1].check(["address"])  # what the start before wrote is not read
        stores[0].set("address", str(number))
        assert [store.get("address") for store in stores] == [str(number).encode()] * size


def test_ranks_that_died_while_they_met_are_not_taken_for_the_living(server) -> None:
    (alone,) = start(server, [1], 2, timedelta(seconds=0.2))
    assert isinstance(alone, RuntimeError) and "rank 0" in str(alone)
    (alone,) = start(server, [0], 2, timedelta(seconds=0.2))
    assert isinstance(alone, RuntimeError) and "rank 1" in str(alone)
    first, second = start(server, [0, 1], 2)
    first.set("address", "now")
    assert second.get("address") == b"now"
