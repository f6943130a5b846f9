"""The log of a run: its lines, what a resume cuts, and that no failing disk or missing package ends a training."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from scfm.errors import MissingDependencyError, ScfmWarning
from scfm.train import metrics
from scfm.train.metrics import MetricsLog, StepMetrics, peak_memory_bytes, require_tensorboard

NAMES = "step epoch loss grad_norm learning_rate tokens cells tokens_per_s cells_per_s data_wait_s step_s"
NAMES += " memory_bytes mfu progress seconds"


def at(step: int, **changes: object) -> StepMetrics:
    facts = {
        "step": step, "epoch": 0, "loss": 6.5, "terms": {"masked_genes": 6.5}, "grad_norm": 1.0,
        "learning_rate": 1e-3, "tokens": 1000, "cells": 10, "step_s": 0.5, "data_wait_s": 0.01,
        "memory_bytes": 1 << 30, "mfu": 0.41, "progress": 0.1, "seconds": 3.0,
    }  # fmt: skip
    return StepMetrics(**(facts | changes))


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step_on_the_disk_at_once(tmp_path) -> None:
    with MetricsLog(tmp_path / "run") as log:
        for step in (1, 2, 3):
            log.step(at(step, extra={"held_out_loss": 7.0}))
            assert [line["step"] for line in read(tmp_path / "run")] == list(range(1, step + 1))
    line = read(tmp_path / "run")[0]
    assert set(NAMES.split()) <= set(line)
    assert line["tokens_per_s"] == 2000 and line["cells_per_s"] == 20
    assert line["loss_masked_genes"] == 6.5 and line["held_out_loss"] == 7.0 and "applied" not in line


def test_what_is_not_finite_is_still_json(tmp_path) -> None:
    with MetricsLog(tmp_path) as log:
        log.step(at(1, loss=float("nan"), grad_norm=float("inf"), mfu=None, applied=False))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] == "NaN" and line["grad_norm"] == "Infinity"
    assert line["mfu"] is None and line["applied"] is False


def test_a_resumed_run_has_every_step_once_and_says_what_it_cut(tmp_path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 8):
            log.step(at(step))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "los')  # as SIGKILL leaves it
    with MetricsLog(tmp_path, resumed_at=5, checkpoint="step-00000005") as log:
        log.step(at(6))
    lines = read(tmp_path)
    assert [line["step"] for line in lines if "event" not in line] == [1, 2, 3, 4, 5, 6]
    (event,) = [line for line in lines if "event" in line]
    assert event["event"] == "resumed" and event["step"] == 5 and event["cut"] == 3
    assert event["checkpoint"] == "step-00000005" and lines.index(event) == 5
    with MetricsLog(tmp_path, resumed_at=6):
        pass
    assert [line["cut"] for line in read(tmp_path) if "event" in line] == [3, 0]
    with MetricsLog(tmp_path) as log:  # a new run in the folder begins anew
        log.step(at(1))
    assert [line["step"] for line in read(tmp_path)] == [1]


def test_learning_curve_reads_a_resumed_log(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from scfm.plot import learning_curve

    with MetricsLog(tmp_path) as log:
        log.step(at(1, loss=float("nan"), applied=False))
        log.step(at(2, extra={"held_out_loss": 7.0}))
    with MetricsLog(tmp_path, resumed_at=2) as log:
        log.step(at(3))
    assert learning_curve(tmp_path / "metrics.jsonl").axes[0].lines


class FullDisk:
    """``os`` whose writes are refused, or taken 7 bytes at a time, while the disk is full."""

    full = False
    short = False

    def __getattr__(self, name: str):
        return getattr(os, name)

    def write(self, handle: int, data: bytes) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(handle, data[:7] if self.short else data)


def test_row_80_a_full_disk_warns_once_and_its_lines_are_written_later(tmp_path, monkeypatch) -> None:
    disk = FullDisk()
    monkeypatch.setattr(metrics, "os", disk)
    with warnings.catch_warnings(record=True) as warned, MetricsLog(tmp_path) as log:
        warnings.simplefilter("always")
        disk.short = True
        log.step(at(1))
        disk.full = True
        for step in (2, 3, 4):
            log.step(at(step))
        assert [line["step"] for line in read(tmp_path)] == [1]
        disk.full = False
        log.step(at(5))
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5]
    assert [w.category for w in warned] == [ScfmWarning]
    assert "No space left" in str(warned[0].message) and "training goes on" in str(warned[0].message)


def test_lines_that_wait_are_bounded_and_what_is_written_stays_whole(tmp_path, monkeypatch) -> None:
    disk = FullDisk()
    monkeypatch.setattr(metrics, "os", disk)
    monkeypatch.setattr(metrics, "_MOST_WAITING", 2000)
    with pytest.warns(ScfmWarning), MetricsLog(tmp_path) as log:
        disk.full = True
        for step in range(1, 100):
            log.step(at(step))
        assert log._waiting_bytes <= 2000
        disk.full = False
    steps = [line["step"] for line in read(tmp_path)]
    assert steps[0] == 1 and steps[-1] == 99 and len(steps) < 10


def test_row_80_a_folder_that_cannot_be_written_or_is_taken_away(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(ScfmWarning, match="cannot be begun"), MetricsLog(tmp_path / "file" / "run") as log:
        log.step(at(1))
    with MetricsLog(tmp_path / "run") as log:
        log.step(at(1))
        log.close()
        shutil.rmtree(tmp_path / "run")
        with pytest.warns(ScfmWarning, match="cannot be written"):
            log.step(at(2))
        (tmp_path / "run").mkdir()
        log.step(at(3))
    assert [line["step"] for line in read(tmp_path / "run")] == [2, 3]


def test_tensorboard_is_asked_for_before_anything_runs(tmp_path, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else found(name, *rest)
    )
    with pytest.raises(MissingDependencyError, match="pip install tensorboard"):
        require_tensorboard()
    with pytest.raises(MissingDependencyError):
        MetricsLog(tmp_path, tensorboard=True)


class Board:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.broken = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.scalars[name, step] = value

    def close(self) -> None: ...


def test_tensorboard_has_the_numbers_and_may_fail(tmp_path, monkeypatch) -> None:
    board = Board()
    monkeypatch.setattr(metrics, "_board", lambda folder, resumed_at: board)
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.step(at(1, extra={"held_out": {"loss": 7.0, "name": "x"}}))
        assert board.scalars["loss", 1] == 6.5 and board.scalars["held_out/loss", 1] == 7.0
        assert not {name for name, _ in board.scalars} & {"step", "held_out/name"}
        board.broken = True
        with pytest.warns(ScfmWarning, match="TensorBoard"):
            log.step(at(2))
        log.step(at(3))
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_event_files_are_written_where_tensorboard_is_installed(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.step(at(1))
    assert list((tmp_path / "tensorboard").glob("events.out.*"))


def test_memory_is_at_least_what_was_held() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(40 << 20, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) >= max(before, len(held))
