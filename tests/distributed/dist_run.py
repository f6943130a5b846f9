"""Starts the ranks of a run as processes of their own, and learns how each of them ended.

    with Ranks() as ranks:
        ended = ranks.run(2, "jobs:train", {"out": ...})      # two ranks call jobs.train(out=...)
        ended[0].code, ended[0].said                          # exit code (minus the signal's number); what it returned

Importing torch takes seconds, so ranks are forked from one process that has imported everything and never ran a thread
or a collective. A rank has the environment that torchrun would give it, and ends as a Python program does: by its last
line, its exit recipe included. Jobs live in jobs.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """code: minus the signal's number if one killed it; said: what the job returned, or {"error", "message"};
    output: what it printed, both streams; seconds: from the start of all ranks to its end."""

    code: int
    said: Any
    output: str
    seconds: float


class Ranks:
    """The test's side: starts ranks, kills them, waits for them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="scfm-ranks-")
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._count = 0
        self._running: dict[int, tuple[Path, float]] = {}
        assert self._answer() == "ready"

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._running):
            self.kill(pid)
            self.wait(pid)
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(20)
        self._folder.cleanup()

    def start(
        self, size: int, job: str, arguments: dict[str, Any], *, env: dict[str, str] | None = None
    ) -> list[int]:
        """Pids of ``size`` ranks that call ``module:function``; size 0: one process without torchrun's environment."""
        port = free_port()
        return [self._start(rank, size, port, job, arguments, env or {}) for rank in range(max(size, 1))]

    def wait(self, pid: int) -> Ended:
        code = self._ask({"wait": pid})
        place, begun = self._running.pop(pid)
        said = json.loads(place.read_text()) if place.exists() else None
        # What triton's bindings find to complain of when a forked interpreter is taken down says nothing of the job.
        output = place.with_suffix(".txt").read_text(errors="replace").partition("nanobind: leaked")[0]
        return Ended(code, said, output, time.monotonic() - begun)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        os.kill(pid, number)

    def run(
        self, size: int, job: str, arguments: dict[str, Any], *, env: dict[str, str] | None = None
    ) -> list[Ended]:
        """All ranks from start to end; when one fails the others are killed after a while, as torchrun does it."""
        return self.wait_all(self.start(size, job, arguments, env=env))

    def wait_all(self, pids: list[int], *, patience: float = 60.0) -> list[Ended]:
        """Each rank's end. Those that have not ended ``patience`` seconds after the first failure are killed."""
        failed_at: float | None = None
        left = set(pids)
        while left:
            for pid in list(left):
                if self._ask({"peek": pid}) is not None:
                    left.discard(pid)
                    if self._ask({"peek": pid}) != 0 and failed_at is None:
                        failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > patience:
                for pid in left:
                    self.kill(pid)
            time.sleep(0.02)
        return [self.wait(pid) for pid in pids]

    def _start(
        self, rank: int, size: int, port: int, job: str, arguments: dict[str, Any], env: dict[str, str]
    ) -> int:
        self._count += 1
        place = Path(self._folder.name) / f"{self._count}.json"
        ranks = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        order = {"job": job, "arguments": arguments, "env": {**(ranks if size else {}), **env}}
        pid: int = self._ask({"start": {**order, "place": str(place)}})
        self._running[pid] = (place, time.monotonic())
        return pid

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(command, default=str) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- the server's side ------------------------------------------------------------------------------------------


def main() -> None:
    import gc
    import threading

    import torch
    import torch._dynamo  # wrappers and optimisers import it when they are made: two seconds a rank

    sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "faults")]
    import checkpoint_jobs  # noqa: F401
    import jobs  # noqa: F401  (these import all that a run needs)

    gc.freeze()  # else each rank looks through all of torch whenever it collects
    torch.set_num_threads(1)
    assert threading.active_count() == 1
    ends: dict[int, int] = {}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            pid = os.fork()
            if pid == 0:
                _become_rank(command["start"])
                return
            answer: Any = pid
        else:
            pid, options = command.get("wait"), 0
            if pid is None:
                pid, options = command["peek"], os.WNOHANG
            if pid not in ends:
                found, status = os.waitpid(pid, options)
                if found:
                    ends[pid] = os.waitstatus_to_exitcode(status)
            answer = ends.get(pid)
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _become_rank(order: dict[str, Any]) -> None:
    """Run the job in this process, which then ends as any program: by returning from main."""
    import importlib

    place = Path(order["place"])
    output = os.open(place.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["env"])
    module, _, function = order["job"].partition(":")
    try:
        said: Any = getattr(importlib.import_module(module), function)(**order["arguments"])
    except Exception as error:
        said = {"error": type(error).__name__, "message": str(error)}
    partial = place.with_suffix(".part")
    partial.write_text(json.dumps(said, default=str))
    partial.replace(place)


if __name__ == "__main__":
    main()
