"""One job on the folder of a run: refused while its owner lives, taken over when it does not (fault row 81)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scfm.data.process_name import host_name, start_time
from scfm.errors import ConfigError, StorageError
from scfm.train.distributed.run_lock import LOCK_FILE, RunLock


def owner(path: Path, **facts: object) -> None:
    path.write_text(json.dumps({"host": host_name(), "pid": os.getpid(), "started": "1", "beat": 1, **facts}))


def test_the_second_is_refused_at_once_and_told_who_is_there(tmp_path) -> None:
    with RunLock(tmp_path / "run") as lock:
        assert lock.is_held
        begun = time.monotonic()
        with (
            pytest.raises(ConfigError, match=f"process {os.getpid()} on host ") as refused,
            RunLock(tmp_path / "run"),
        ):
            pass
        assert time.monotonic() - begun < 2
        assert str(tmp_path / "run") in str(refused.value) and refused.value.where == "out"
        assert lock.is_held  # the one that was refused took nothing away
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    with RunLock(tmp_path / "run"):
        pass


def test_released_when_the_job_fails(tmp_path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_killed_owner_is_taken_over_at_once(tmp_path) -> None:
    program = (
        "import os, sys, signal; from scfm.train.distributed.run_lock import RunLock; RunLock(sys.argv[1]).__enter__();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / LOCK_FILE).exists()
    with RunLock(tmp_path, lease_seconds=60) as lock:
        assert lock.is_held


@pytest.mark.parametrize("started", ["1", start_time(os.getpid())])
def test_a_process_number_that_was_given_again_is_nobody(tmp_path, started: str) -> None:
    owner(tmp_path / LOCK_FILE, started=started)
    if started == "1":
        with RunLock(tmp_path, lease_seconds=60):
            pass
    else:
        with pytest.raises(ConfigError), RunLock(tmp_path, lease_seconds=60):
            pass


def test_another_machine_is_judged_by_whether_its_lock_changes(tmp_path) -> None:
    path = tmp_path / LOCK_FILE
    owner(path, host="node7-00000000", pid=4711)
    os.utime(path, (time.time() + 3600, time.time() + 3600))  # its clock is an hour ahead
    begun = time.monotonic()
    with RunLock(tmp_path, lease_seconds=0.6):
        assert time.monotonic() - begun >= 0.5
    owner(path, host="node7-00000000", pid=4711)
    beats = threading.Timer(0.3, owner, [path], {"host": "node7-00000000", "pid": 4711, "beat": 2})
    beats.start()
    with pytest.raises(ConfigError, match="process 4711 on host node7"), RunLock(tmp_path, lease_seconds=20):
        pass
    beats.join()


@pytest.mark.parametrize("content", [b"", b"{", b"\x00" * 600, b"[1]", b'{"host": 3, "pid": "x"}'])
def test_a_lock_that_cannot_be_read_becomes_stale(tmp_path, content: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    with RunLock(tmp_path, lease_seconds=0.3) as lock:
        assert lock.is_held


def test_of_many_that_take_over_one_wins(tmp_path) -> None:
    owner(tmp_path / LOCK_FILE, started="1")
    barrier, outcomes = threading.Barrier(6), []

    def job() -> None:
        barrier.wait()
        lock = RunLock(tmp_path, lease_seconds=60)
        try:
            lock.__enter__()
            outcomes.append(lock)
        except ConfigError:
            outcomes.append(None)

    threads = [threading.Thread(target=job) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lock is not None and lock.is_held for lock in outcomes) == 1 and len(outcomes) == 6
    assert sum(lock is not None for lock in outcomes) == 1


def test_a_lock_that_was_taken_away_is_noticed_and_left_alone(tmp_path) -> None:
    with RunLock(tmp_path) as lock:
        (tmp_path / LOCK_FILE).unlink()
        owner(tmp_path / LOCK_FILE)
        assert not lock.is_held
    assert (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"), RunLock(tmp_path / "file" / "run"):
        pass
