"""Checkpoints of several ranks: any number of them, sharded in any way, goes on from any other's (rows 68 to 79)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dist_run import Ended, Ranks
from safetensors import safe_open

JOB = "checkpoint_jobs:train"


def ran(ranks: Ranks, size: int, out: Path, mode: str, num_steps: int, **options: Any) -> dict[str, Any]:
    """What all ranks say alike."""
    ended = ranks.run(size, JOB, {"out": str(out), "mode": mode, "num_steps": num_steps, **options})
    assert [one.code for one in ended] == [0] * max(size, 1), [one.output for one in ended]
    told = [one.said.pop("told") for one in ended]
    assert all(one.said == ended[0].said for one in ended) and not any(told[1:])
    return {**ended[0].said, "told": told[0]}


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ten steps of one process that never stopped."""
    return ran(ranks, 0, tmp_path_factory.mktemp("undisturbed"), "ddp", 10, every=100)


def expect_like(found: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    for step, loss in found["losses"].items():
        assert loss == pytest.approx(undisturbed["losses"][step], rel=2e-5), step


def test_row_71_two_one_two_ranks_and_every_mode(ranks: Ranks, undisturbed, tmp_path) -> None:
    """Shards on two ranks, one rank, two replicas, shards again: the trajectory of a run that never stopped."""
    stages = [(2, "fsdp"), (1, "fsdp"), (2, "ddp"), (2, "hsdp"), (0, "ddp")]
    for number, (size, mode) in enumerate(stages):
        found = ran(ranks, size, tmp_path, mode, 2, fused=mode == "fsdp")
        assert found["from"] == (2 * number or None) and found["last"] == f"step-{2 * number + 2:08d}"
        expect_like(found, undisturbed)
    assert found["steps"] == undisturbed["steps"]
    for name, total in undisturbed["weights"].items():
        assert found["weights"][name] == pytest.approx(total, rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_same_ranks_go_on_to_the_same_bits(ranks: Ranks, tmp_path, mode: str) -> None:
    whole = ran(ranks, 2, tmp_path / "whole", mode, 6, every=3)
    first = ran(ranks, 2, tmp_path / "parts", mode, 3, every=3)
    second = ran(ranks, 2, tmp_path / "parts", mode, 3, every=3)
    assert {**first["losses"], **second["losses"]} == whole["losses"]
    assert (second["weights"], second["steps"]) == (whole["weights"], whole["steps"])
    each = [shard_contents(tmp_path / part / "step-00000006") for part in ("whole", "parts")]
    assert each[0] == each[1]


def shard_contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def test_every_rank_writes_its_share_once(ranks: Ranks, tmp_path) -> None:
    for mode in ("ddp", "fsdp"):
        ran(ranks, 2, tmp_path / mode, mode, 1)
        folder = tmp_path / mode / "step-00000001"
        shards = sorted(folder.glob("*.safetensors"))
        assert [path.name for path in shards] == [
            f"shard-0000{rank}-of-00002.safetensors" for rank in range(2)
        ]
        held = []
        for path in shards:
            with safe_open(path, "pt") as file:
                held.append(set(file.keys()))
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        assert manifest["num_tensors"] == len(held[0] | held[1])
        if mode == "ddp":
            assert not held[0] & held[1]
        else:
            assert {"model.blocks.0.0.weight", "optim.table.weight.exp_avg"} <= held[0] & held[1]
            assert not any(name.endswith(("step", "seen", "mean")) for name in held[0] & held[1])
        sizes = [path.stat().st_size for path in shards]
        assert max(sizes) < 1.35 * min(sizes)


def told_of(ended: list[Ended], rank: int) -> str:
    return "\n".join([*ended[rank].said.get("told", []), ended[rank].output])


def test_row_79_a_disk_that_is_full_for_one_rank_stops_no_training(
    ranks: Ranks, undisturbed, tmp_path
) -> None:
    arguments = {"out": str(tmp_path), "mode": "ddp", "num_steps": 4, "fails_on": 1}
    ended = ranks.run(2, JOB, arguments)
    assert [one.code for one in ended] == [0, 0], ended
    for one in ended:
        expect_like(one.said, undisturbed)
        assert one.said["last"] == "step-00000001" and len(one.said["losses"]) == 4
    assert told_of(ended, 0).count("shard-00001-of-00002.safetensors: cannot be written") == 3
    assert told_of(ended, 0).count("The disk is full") == 3
    assert "full" not in told_of(ended, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_row_79_or_stops_all_ranks_where_that_is_wanted(ranks: Ranks, tmp_path) -> None:
    arguments = {
        "out": str(tmp_path),
        "mode": "fsdp",
        "num_steps": 4,
        "fails_on": 0,
        "on_storage_error": "stop",
    }
    ended = ranks.run(2, JOB, arguments)
    assert [one.code for one in ended] == [1, 1]
    assert all("StorageError" in one.output and "The disk is full" in one.output for one in ended)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("rank", [0, 1])
def test_row_68_killed_between_shard_and_commit(ranks: Ranks, tmp_path, rank: int) -> None:
    """One rank dies with its shard written; the step counts as nothing, and what it left is cleared by the next run."""
    point = "before_committed:2" if rank == 0 else "shard_written:2"
    ended = ranks.run(2, JOB, {"out": str(tmp_path), "mode": "fsdp", "num_steps": 3, "crash": [rank, point]})
    assert ended[rank].code == -9 and ended[1 - rank].code == 1
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and left[0].startswith(".tmp-step-00000002-") and left[1] == "step-00000001"
    found = ran(ranks, 2, tmp_path, "fsdp", 2)
    assert found["from"] == 1 and found["last"] == "step-00000003" and not found["told"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_row_70_ranks_agree_on_what_is_damaged(ranks: Ranks, tmp_path) -> None:
    """Each rank reads its share of the files; what only one of them sees, all of them skip."""
    ran(ranks, 2, tmp_path, "ddp", 2)
    shard = tmp_path / "step-00000002" / "shard-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    found = ran(ranks, 2, tmp_path, "ddp", 1)
    assert found["from"] == 1 and shard.name in found["skipped"][0]
    assert shard.name in found["told"][0] and "set aside" in found["told"][1]
