"""Runs of two ranks from end to end: the trajectory of one process, and what kills, signals and NaN leave of it.

The settings drop hidden states and write a checkpoint every third step, so that nothing is the same by chance. Losses
are read from metrics.jsonl: what a user would see.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from dist_run import Ended, Ranks
from jobs import losses_of

from scfm.data.crash_points import CHECKPOINT_POINTS
from scfm.train.checkpoint import CheckpointStore

NUM_STEPS = 10


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from scfm.data.gene_tables import human_symbols

    symbols = sorted(symbol for symbol, genes in human_symbols().items() if len(genes) == 1)[:80]
    counts = np.random.default_rng(0).poisson(0.5, size=(60, 80)).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=symbols)).write_h5ad(path)
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "ffn_size": 32, "max_tokens": 64}
    steps = {"token_budget": 150, "microbatches_per_step": 4, "max_steps": NUM_STEPS, "num_epochs": 99}
    safety = {"checkpoint_every": 3, "timeout_seconds": 30, "dropout": 0.1, "learning_rate": 3e-3}
    machine = {"device": "cpu", "precision": "float32"}
    return {"data": [str(path)], **shape, **steps, **safety, **machine}


def train(
    ranks: Ranks,
    size: int,
    settings: dict[str, Any],
    out: Path,
    *,
    fault: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    **changes: Any,
) -> list[Ended]:
    arguments = {"settings": {**settings, "out": str(out), **changes}, "fault": fault}
    return ranks.run(size, "jobs:train", arguments, env=env)


def finished(ended: list[Ended]) -> dict[str, Any]:
    """What rank 0 said, after all ended well; the cells of each step are those of all ranks, in their order."""
    assert [(one.code, one.said["stopped"]) for one in ended] == [(0, None)] * len(ended), ended
    cells = {
        int(step): list(itertools.chain.from_iterable(one.said["cells"][step] for one in ended))
        for step in ended[0].said["cells"]
    }
    assert len({one.said["weights"] for one in ended}) == 1
    return {**ended[0].said, "cells": cells}


@pytest.fixture(scope="module")
def one_process(ranks: Ranks, settings, tmp_path_factory) -> tuple[list[float], dict[int, list[int]]]:
    """Losses and cells of every step."""
    out = tmp_path_factory.mktemp("one") / "run"
    said = finished(train(ranks, 0, settings, out))
    return losses_of(out), said["cells"]


@pytest.fixture(scope="module")
def two_ranks(ranks: Ranks, settings, tmp_path_factory) -> tuple[list[float], str]:
    """Losses and the final weights' checksum of two ranks that nothing disturbs."""
    out = tmp_path_factory.mktemp("two") / "run"
    said = finished(train(ranks, 2, settings, out))
    return losses_of(out), said["weights"]


@pytest.mark.parametrize(
    "mode",
    [{"parallel": "ddp"}, {"parallel": "fsdp"}, {"parallel": "fsdp", "activation_checkpointing": 1}],
    ids=str,
)
def test_two_ranks_take_the_steps_of_one_process(ranks, settings, one_process, tmp_path, mode) -> None:
    losses, cells = one_process
    said = finished(train(ranks, 2, settings, tmp_path / "run", **mode))
    assert said["cells"] == cells and len(cells) == NUM_STEPS
    assert losses_of(tmp_path / "run") == pytest.approx(losses, abs=1e-5)


def test_row_71_two_ranks_then_one_then_two(ranks, settings, one_process, tmp_path) -> None:
    losses, cells = one_process
    found: dict[int, list[int]] = {}
    for size, mode, until in ((2, "fsdp", 4), (0, "ddp", 7), (2, "ddp", NUM_STEPS + 1)):
        fault = {"rank": 0, "step": until, "what": "SIGUSR1"}
        ended = train(ranks, size, settings, tmp_path / "run", fault=fault, parallel=mode)
        assert {one.code for one in ended} == {0}, ended
        for step in ended[0].said["cells"]:
            found[int(step)] = [cell for one in ended for cell in one.said["cells"][step]]
    assert found == cells
    assert losses_of(tmp_path / "run") == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(("rank", "step"), [(0, 5), (1, 8)])
def test_row_67_a_killed_rank_and_the_next_start_is_bitwise(
    ranks, settings, two_ranks, tmp_path, rank, step
) -> None:
    fault = {"rank": rank, "step": step, "what": "kill"}
    ended = train(ranks, 2, settings, tmp_path / "run", fault=fault)
    assert ended[rank].code == -signal.SIGKILL and ended[1 - rank].code == 1
    assert "another rank has ended" in ended[1 - rank].output
    said = finished(train(ranks, 2, settings, tmp_path / "run"))
    assert said["events"][0]["event"] == "resumed" and said["events"][0]["step"] in range(step - 4, step)
    assert (losses_of(tmp_path / "run"), said["weights"]) == two_ranks


@pytest.mark.parametrize(
    "point", [point for point in CHECKPOINT_POINTS if point.endswith(("written", "link", "rename"))]
)
def test_row_68_killed_in_a_save_and_gone_on_with_is_bitwise(
    ranks, settings, two_ranks, tmp_path, point
) -> None:
    env = {"SCFM_CRASH_AT": f"{point}:2"}
    ended = train(ranks, 2, settings, tmp_path / "run", env=env)
    assert -signal.SIGKILL in {one.code for one in ended}
    said = finished(train(ranks, 2, settings, tmp_path / "run"))
    assert (losses_of(tmp_path / "run"), said["weights"]) == two_ranks
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-00000009", "step-00000010"}


def test_row_69_all_killed_at_twelve_random_moments(ranks, settings, two_ranks, tmp_path) -> None:
    generator = np.random.default_rng(0)
    arguments = {"settings": {**settings, "out": str(tmp_path / "run"), "checkpoint_every": 1}, "slow": 0.02}
    for _ in range(12):
        pids = ranks.start(2, "jobs:train", arguments)
        time.sleep(generator.uniform(0.2, 1.6))
        for pid in pids:
            ranks.kill(pid)
        for pid in pids:
            ranks.wait(pid)
        CheckpointStore(
            tmp_path / "run" / "checkpoints"
        ).newest()  # raises if none of those there are verifies
    said = finished(ranks.run(2, "jobs:train", arguments))
    assert (losses_of(tmp_path / "run"), said["weights"]) == two_ranks


def test_row_66_nan_on_one_rank_is_applied_on_none(ranks, settings, two_ranks, tmp_path) -> None:
    fault = {"rank": 1, "step": 4, "what": "nan"}
    said = finished(train(ranks, 2, settings, tmp_path / "run", fault=fault))
    (skipped,) = [event for event in said["events"] if event["event"] == "skipped"]
    assert skipped["step"] == 4 and "masked_genes on rank 1" in skipped["why"]
    assert losses_of(tmp_path / "run")[:3] == two_ranks[0][:3]
    assert said["weights"] != two_ranks[1]


def test_row_66_nan_that_stays_ends_all_ranks_with_the_weights_untouched(ranks, settings, tmp_path) -> None:
    fault = {"rank": 1, "step": 7, "what": "nans"}
    changes = {"checkpoint_every": 2, "parallel": "fsdp"}
    ended = train(ranks, 2, settings, tmp_path / "run", fault=fault, **changes)
    assert [one.code for one in ended] == [1, 1]
    for one in ended:
        assert "3 steps in a row" in one.output and "masked_genes on rank 1" in one.output
        assert (
            f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-00000008'}" in one.output
        )
    before, after = (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (6, 8))
    assert len(list(before.glob("*.safetensors"))) == 2
    for shard in before.glob("*.safetensors"):
        assert shard.read_bytes() == (after / shard.name).read_bytes()


@pytest.mark.parametrize(("what", "rank"), [("SIGTERM", 1), ("SIGUSR1", 0)])
def test_row_73_a_signal_to_one_rank_stops_all_at_the_same_step(
    ranks, settings, two_ranks, tmp_path, what, rank
) -> None:
    ended = train(ranks, 2, settings, tmp_path / "run", fault={"rank": rank, "step": 5, "what": what})
    assert [(one.code, one.said["stopped"], one.said["step"]) for one in ended] == [(0, what, 5)] * 2
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    assert not (tmp_path / "run" / "model").exists()
    said = finished(train(ranks, 2, settings, tmp_path / "run"))
    assert (losses_of(tmp_path / "run"), said["weights"]) == two_ranks


def test_row_72_and_81_what_is_refused_is_refused_on_all_ranks(ranks, settings, tmp_path) -> None:
    fault = {"rank": 0, "step": 3, "what": "SIGUSR1"}
    train(ranks, 2, settings, tmp_path / "run", fault=fault)
    ended = train(ranks, 2, settings, tmp_path / "run", learning_rate=1e-3)
    assert [one.code for one in ended] == [1, 1]
    assert all("learning_rate (was 0.003, now 0.001)" in one.output for one in ended)
    slow = {"settings": {**settings, "out": str(tmp_path / "run")}, "slow": 0.5}
    first = ranks.start(2, "jobs:train", slow)
    while not (tmp_path / "run" / "run.lock").exists():
        time.sleep(0.02)
    second = train(ranks, 2, settings, tmp_path / "run")
    assert [one.code for one in second] == [1, 1] and "another job is at work here" in second[0].output
    assert finished(ranks.wait_all(first))["step"] == NUM_STEPS


def test_row_67_torchrun_starts_killed_ranks_again(settings, two_ranks, tmp_path) -> None:
    """The command line under torchrun: both ranks die in their third save, and the one start after finishes the run."""
    config = tmp_path / "config.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    config.write_text("\n".join(lines) + "\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "--max-restarts=1", "--monitor-interval=0.2", "--no-python"]
    command += [str(Path(sys.executable).with_name("scfm")), "pretrain"]
    environment = {**os.environ, "SCFM_CRASH_AT": "shard_written:3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(config), f"out={tmp_path / 'run'}", "--json"],
        env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == NUM_STEPS
    assert losses_of(tmp_path / "run") == two_ranks[0]
    events = [
        line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "resumed" in line
    ]
    assert [json.loads(line)["step"] for line in events] == [6]


def test_sharded_ranks_are_evaluated_as_one_process_is(ranks, settings, tmp_path) -> None:
    """Rank 0 looks at a whole copy while the other waits; the steps go on as if nobody had looked."""
    changes = {"held_out_fraction": 0.3, "evaluate_every": 4, "max_steps": 6}
    found = []
    for size, mode in ((0, "ddp"), (2, "fsdp")):
        out = tmp_path / mode
        finished(train(ranks, size, settings, out, parallel=mode, **changes))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append({line["step"]: line["held_out/loss"] for line in lines if "held_out/loss" in line})
        assert f"After {NUM_STEPS - 4} steps" in (out / "evaluation.md").read_text()
    assert list(found[1]) == [4, 6] and found[1] == pytest.approx(found[0], abs=1e-5)
    finished(
        train(ranks, 2, settings, tmp_path / "plain", parallel="fsdp", **{**changes, "evaluate_every": None})
    )
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "fsdp")
