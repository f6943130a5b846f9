"""``scfm pretrain``: what it says, to whom, and with which exit code it ends; the training itself is another matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scfm.cli.broken_output import WatchedStream, output_may_break
from scfm.cli.main import app
from scfm.cli.pretrain import training_progress
from scfm.data.gene_tables import human_symbols
from scfm.errors import ScfmError

runner = CliRunner()


@dataclass
class Result:
    stopped: str | None = None

    def to_dict(self) -> dict:
        return {"model": "run/model", "held_out": {"loss": 6.51234}, "stopped": self.stopped}


LINE = {
    "step": 10, "loss": 6.5, "progress": 0.25, "cells_per_s": 100.0, "tokens_per_s": 2e5, "mfu": 0.41,
    "data_wait_s": 0.02, "step_s": 0.5,
}  # fmt: skip


@pytest.fixture
def training(monkeypatch):
    """What stands in for the training: its settings as they came, the result or error that it ends with."""

    class Training:
        configs: list = []  # noqa: RUF012
        result = Result()
        error: Exception | None = None
        lines = (LINE,)

    def pretrain(config, *, progress):
        Training.configs.append(config)
        for line in Training.lines:
            progress(line)
        if Training.error is not None:
            raise Training.error
        return Training.result

    monkeypatch.setattr("scfm.train.pretrain.pretrain", pretrain)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return Training


def run(*arguments: object, code: int = 0):
    result = runner.invoke(app, ["pretrain", *map(str, arguments)])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def test_settings_of_a_file_and_the_command_line(training, tmp_path) -> None:
    (tmp_path / "run.toml").write_text(
        'data = ["a.h5ad"]\nlearning_rate = 1e-4\n[objective]\nmask_ratio = 0.2\n'
    )
    run(tmp_path / "run.toml", "learning_rate=3e-3", "objective.mask_ratio=0.3", f"out={tmp_path}/run")
    config = training.configs[-1]
    assert config.learning_rate == 3e-3 and config.objective == {"mask_ratio": 0.3}
    assert config.data == ["a.h5ad"] and str(config.out) == f"{tmp_path}/run"


def test_every_unknown_key_is_named_before_anything_runs(training, tmp_path) -> None:
    before = len(training.configs)
    found = json.loads(run("data=a.h5ad", "lerning_rate=1", "num_epochz=2", "--json", code=3).stdout)
    assert not found["ok"] and found["code"] == "config"
    for text in ("lerning_rate", "learning_rate", "num_epochz", "num_epochs"):
        assert text in found["message"]
    run(tmp_path / "no.toml", code=3)
    run("a.toml", "b.toml", code=2)
    assert len(training.configs) == before


def test_it_shows_how_far_it_is_and_what_came_out(training) -> None:
    training.lines = (
        {"event": "resumed", "step": 9, "checkpoint": "step-00000009", "skipped": ["step-00000010: x.st is cut off"]},
        LINE,
        LINE | {"step": 11, "progress": 0.5},
    )  # fmt: skip
    shown = run("data=a.h5ad").stderr
    for text in ("resumed from step 9 (step-00000009)", "not used: step-00000010: x.st is cut off", "25.0%"):
        assert text in shown
    for text in ("step 10", "loss 6.500", "100 cells/s", "41% of peak", "4% waiting for data", "6.512"):
        assert text in shown
    assert "pretraining" not in run("data=a.h5ad", "--quiet").stderr
    found = json.loads(run("data=a.h5ad", "--json").stdout)
    assert found["ok"] and found["held_out"]["loss"] == 6.51234


def test_time_left_is_by_the_speed_of_this_process(monkeypatch, capsys) -> None:
    now = iter([100.0, 101.0, 102.0])
    monkeypatch.setattr("scfm.cli.pretrain.time.monotonic", lambda: next(now))
    monkeypatch.setattr("scfm.cli.pretrain._SECONDS_BETWEEN_LINES", 0.0)
    with training_progress(quiet=False) as advance:
        for share in (0.8, 0.81, 0.82):
            advance(LINE | {"progress": share, "step_s": 1.0})
    assert [line for line in capsys.readouterr().err.splitlines() if "0:00:27 left" in line]


@pytest.mark.parametrize(
    ("reason", "torchrun", "code"),
    [("SIGTERM", False, 0), ("SIGUSR1", False, 85), ("max_minutes", False, 85), ("SIGUSR1", True, 0)],
)
def test_exit_codes_of_a_run_that_stopped_early(training, monkeypatch, reason, torchrun, code) -> None:
    monkeypatch.setattr(training, "result", Result(reason))
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert json.loads(run("data=a.h5ad", "--json", code=code).stdout)["stopped"] == reason


def test_other_ranks_say_nothing_but_their_errors(training, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "3")
    silent = run("data=a.h5ad", "--json")
    assert silent.stdout == "" and silent.stderr == ""
    monkeypatch.setattr(training, "error", ScfmError("the disk is gone"))
    failed = run("data=a.h5ad", "--json", code=3)
    assert failed.stdout == "" and "the disk is gone" in failed.stderr and "rank 3" in failed.stderr


BROKEN = """
import os, sys, time, warnings
import scfm.train.pretrain
from scfm.cli.main import app
from scfm.errors import ScfmWarning

class Result:
    stopped = None
    def to_dict(self): return {"model": "m" * 100_000}

def pretrain(config, *, progress):
    os.write(3, b"begun\\n")
    os.read(4, 1)
    for step in range(20):
        progress(%r | {"step": step, "progress": step / 20})
        warnings.warn("a note", ScfmWarning, stacklevel=1)
    os.write(3, b"trained\\n")
    return Result()

scfm.train.pretrain.pretrain = pretrain
app(["pretrain", "data=a.h5ad", *sys.argv[1:]])
"""


def test_row_80_no_output_that_breaks_ends_a_training(tmp_path: Path) -> None:
    """stdout is a device that is full, stderr a pipe whose reader leaves."""
    said, go = os.pipe(), os.pipe()
    script = tmp_path / "run.py"
    script.write_text(f"import os; os.dup2({said[1]}, 3); os.dup2({go[0]}, 4)\n" + BROKEN % LINE)
    full = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, str(script), "--json"]
    child = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, pass_fds=(said[1], go[0]))
    os.close(said[1])
    with os.fdopen(said[0]) as lines:
        assert lines.readline() == "begun\n"
        child.stderr.close()
        os.write(go[1], b"x")
        assert lines.readline() == "trained\n"
    assert child.wait(timeout=60) == 0
    for handle in (*go, full):
        os.close(handle)


def test_streams_that_were_closed_before_or_cannot_write_a_letter(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with output_may_break():
        print("into nothing")
    with (tmp_path / "ascii").open("w", encoding="ascii") as stream:
        watched = WatchedStream(stream)
        watched.write("a bar \u2501")
        assert not watched.broken
        stream.close()
        watched.write("more")
        assert watched.broken
    assert (tmp_path / "ascii").read_text() == "a bar ?"


def test_usr1_ends_a_run_with_85_and_the_same_command_goes_on(tiny_adata, tmp_path) -> None:
    tiny_adata.var_names = sorted({g for genes in human_symbols().values() for g in genes})[:120]
    tiny_adata.write_h5ad(tmp_path / "cells.h5ad")
    settings = {
        "data": tmp_path / "cells.h5ad", "out": tmp_path / "run", "num_layers": 1, "hidden_size": 16, "num_heads": 2,
        "ffn_size": 16, "max_tokens": 64, "token_budget": 128, "microbatches_per_step": 1, "num_epochs": 200,
    }  # fmt: skip
    command = [sys.executable, "-c", "from scfm.cli.main import app; app()", "pretrain"]
    command += [f"{name}={value}" for name, value in settings.items()]
    log = tmp_path / "run" / "metrics.jsonl"
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGUSR1)
    running.send_signal(signal.SIGUSR1)
    told = running.communicate(timeout=60)[1]
    assert running.returncode == 85 and "SIGUSR1" in told
    stopped_at = json.loads(log.read_text().splitlines()[-1])["step"]
    again = run(*command[4:], "max_minutes=0.0001", code=85).stderr
    assert f"resumed from step {stopped_at:,} (step-{stopped_at:08d})" in again
    assert not (tmp_path / "run" / "model").exists()
