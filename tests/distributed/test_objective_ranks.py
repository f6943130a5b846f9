"""Every family's objective is the same on two ranks as on one, replicated and sharded."""

from __future__ import annotations

import pytest
from dist_run import Ranks

JOB = "objective_jobs:objective_steps"


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> dict:
    (ended,) = ranks.run(0, JOB, {"parallel": "ddp", "num_steps": 3})
    assert ended.code == 0, ended.output
    return ended.said


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_are_one(ranks: Ranks, alone: dict, mode: str) -> None:
    ended = ranks.run(2, JOB, {"parallel": mode, "num_steps": 3})
    assert [rank.code for rank in ended] == [0, 0], ended[0].output + ended[1].output
    assert ended[0].said == ended[1].said
    for name, want in alone.items():
        assert ended[0].said[name] == pytest.approx(want, rel=1e-4), name
