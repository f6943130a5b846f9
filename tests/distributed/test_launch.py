"""How ranks meet and how they end: rows 74, 75, 76 and 82 of the fault matrix."""

from __future__ import annotations

import os
import socket
import time

import pytest
from dist_run import Ranks

LONG = bool(os.environ.get("SCFM_LONG_FAULTS"))


def meet_and_part(
    ranks: Ranks, fault: str = "", rank: int = 1, *, timeout_seconds: float = 30.0, **environment: str
) -> list:
    arguments = {"fault": fault, "rank": rank, "timeout_seconds": timeout_seconds}
    return ranks.run(2, "jobs:meet_and_part", arguments, env=environment)


def test_row_74_a_rank_that_hangs_ends_all_with_the_stack_it_hung_in(ranks: Ranks) -> None:
    begun = time.monotonic()
    waiting, hanging = meet_and_part(ranks, "hangs", timeout_seconds=4.0)
    took = time.monotonic() - begun
    assert waiting.code == hanging.code == 1
    assert "another rank did not answer within timeout_seconds = 4" in waiting.output
    assert "Timeout" in hanging.output and "in meet_and_part" in hanging.output
    assert took < 4.0 + 10.0 + 5.0, "the machine may be slow by 5 s"


@pytest.mark.parametrize("rank", [0, 1])
def test_row_75_an_error_in_one_rank_ends_the_others_at_once(ranks: Ranks, rank: int) -> None:
    ended = meet_and_part(ranks, "raises", rank)
    assert [each.code for each in ended] == [1, 1]
    assert "the data of this rank are broken" in ended[rank].output
    assert "another rank has ended" in ended[1 - rank].output
    assert max(each.seconds for each in ended) < 25.0


def test_row_76_clean_ends(ranks: Ranks) -> None:
    """Wrapped models alive when the block ends, group destroyed, interpreter taken down: no abort, no hang."""
    for _ in range(20 if LONG else 5):
        ended = meet_and_part(ranks)
        assert [(each.code, each.said) for each in ended] == [(0, "parted")] * 2, ended
        assert not any("terminate called" in each.output for each in ended)


def test_what_rank_0_does_alone_may_take_longer_than_the_time_out(ranks: Ranks) -> None:
    ended = meet_and_part(ranks, "is slow alone", 0, timeout_seconds=2.0)
    assert [(each.code, each.said) for each in ended] == [(0, "parted")] * 2, ended[0].output


def test_a_group_that_the_caller_made_stays_the_callers(ranks: Ranks) -> None:
    ended = ranks.run(2, "jobs:within_a_group_of_the_callers", {})
    assert [(each.code, each.said) for each in ended] == [(0, "the caller's")] * 2, ended


def test_row_82_an_address_that_means_nothing(ranks: Ranks) -> None:
    ended = meet_and_part(ranks, MASTER_ADDR="no-such-machine.invalid")
    for each in ended:
        assert each.said["error"] == "ConfigError" and "no-such-machine.invalid" in each.said["message"]
        assert "MASTER_ADDR" in each.said["message"]


def test_row_82_a_port_that_is_taken(ranks: Ranks) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        begun = time.monotonic()
        first = ranks.start(
            2,
            "jobs:meet_and_part",
            {"fault": "", "rank": 1, "timeout_seconds": 30.0},
            env={"MASTER_PORT": port},
        )
        ended = ranks.wait_all(first, patience=2.0)
    assert ended[0].code == 1 and f"port {port} of this machine is taken" in ended[0].output
    assert time.monotonic() - begun < 20.0


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "2"}, "RANK"),
        ({"RANK": "one"}, "RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"MASTER_PORT": ""}, "MASTER_PORT"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
    ],
    ids=str,
)
def test_variables_that_cannot_be_are_named(monkeypatch, environment: dict, named: str) -> None:
    from scfm.errors import ConfigError
    from scfm.train.distributed.launch import joined

    sound = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**sound, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named), joined("cpu", 5.0):
        pass


def test_a_variable_alone_is_told_what_is_missing(monkeypatch) -> None:
    from scfm.errors import ConfigError
    from scfm.train.distributed.launch import joined

    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="torchrun"), joined("cpu", 5.0):
        pass
