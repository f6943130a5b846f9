"""Two gloo ranks compute what one process does: replicated, sharded, and sharded within replicas."""

from __future__ import annotations

import pytest
from dist_run import Ranks

MODES = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, every second block recomputed": {"parallel": "fsdp", "activation_checkpointing": 2},
    "hsdp, two replicas of one rank": {"parallel": "hsdp", "shard_size": 1},
}


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> dict:
    (ended,) = ranks.run(0, "jobs:few_steps", {"num_steps": 6, "settings": {"precision": "float32"}})
    assert ended.code == 0, ended.output
    return ended.said


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_every_mode_takes_the_steps_of_one_process(ranks: Ranks, alone: dict, mode: dict) -> None:
    settings = {"precision": "float32", **mode}
    first, second = ranks.run(2, "jobs:few_steps", {"num_steps": 6, "settings": settings})
    assert first.code == second.code == 0, first.output + second.output
    assert first.said == second.said
    assert first.said["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert first.said["norms"] == pytest.approx(alone["norms"], abs=1e-4)
    assert first.said["names"] == alone["names"]
    assert first.said["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    assert not first.output, "nothing is to be said on stderr"


def test_bfloat16_products_are_the_same_replicated_and_sharded(ranks: Ranks, alone: dict) -> None:
    """The policy of FSDP2 and the model's own compute dtype agree; sums over ranks are float32 in both."""
    losses = []
    for parallel in ("ddp", "fsdp"):
        settings = {"precision": "bfloat16", "parallel": parallel}
        ended = ranks.run(2, "jobs:few_steps", {"num_steps": 6, "settings": settings})
        assert [rank.code for rank in ended] == [0, 0], ended[0].output
        losses.append(ended[0].said["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(alone["losses"], abs=0.1)
    assert losses[0] != alone["losses"]


def test_recomputed_blocks_change_nothing_and_leave_no_trace(ranks: Ranks, alone: dict) -> None:
    settings = {"precision": "float32", "activation_checkpointing": 1}
    (ended,) = ranks.run(0, "jobs:few_steps", {"num_steps": 6, "settings": settings})
    assert ended.code == 0 and ended.said == alone, ended.output
