"""Runs a function in a process of its own, so that a crash, a hang or a memory bomb is a test failure.

Children come from multiprocessing's fork server, which has imported the readers once and runs no threads:
starting one costs milliseconds. The function and its arguments must be importable and picklable. The fork
server keeps the environment it was born with, so SCFM_* variables are handed over to each child.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# What is not installed is passed over.
_CONTEXT.set_forkserver_preload(
    ["anndata", "scipy.sparse", "pytest", "hdf5plugin", "scfm.data.read", "scfm._native"]
)


@dataclass(frozen=True)
class Outcome:
    """kind: "ok", "raised", "signal" or "timeout"; value: what was returned; error: the names of the raised
    class and its bases; message: its text, or the signal's name; peak: bytes of memory at most in use."""

    kind: str
    value: Any = None
    error: tuple[str, ...] = ()
    message: str = ""
    peak: int = 0

    def raised(self, name: str) -> bool:
        return self.kind == "raised" and name in self.error


def run_child(
    function: Callable[..., Any], *args: Any, timeout: float = 20, memory: int | None = None
) -> Outcome:
    """Call ``function(*args)`` in a child. memory: bytes it may allocate beyond what it starts with."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    settings = {name: value for name, value in os.environ.items() if name.startswith("SCFM_")}
    child = _CONTEXT.Process(target=_child, args=(sender, function, args, memory, settings), daemon=True)
    child.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(timeout) else None
    except EOFError:
        answer = None
    child.join(0 if child.is_alive() and answer is None and not receiver.closed else timeout)
    if answer is not None:
        return answer
    child.join(1)
    if child.is_alive():
        child.kill()
        child.join()
        return Outcome("timeout", message=f"no answer in {timeout} s")
    code = child.exitcode or 0
    return Outcome("signal", message=signal.Signals(-code).name if code < 0 else f"exit code {code}")


def _child(
    sender: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    memory: int | None,
    settings: dict[str, str],
) -> None:
    for name in [name for name in os.environ if name.startswith("SCFM_")]:
        del os.environ[name]
    os.environ.update(settings)
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # A crash is expected here: no core files.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        outcome = Outcome("ok", function(*args))
    except BaseException as error:
        names = tuple(kind.__name__ for kind in type(error).__mro__)
        text = str(error) or traceback.format_exc(limit=3)
        outcome = Outcome("raised", error=names, message=text)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send(replace(outcome, peak=peak))
    sender.close()
    os._exit(0)
