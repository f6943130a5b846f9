"""One job on the folder of a run: the second one refuses at once and says who is there.

Two jobs that write checkpoints into the same folder, started twice by mistake or by an impatient queue, would each
delete the other's. The lock is a lease (data/lease.py) that rank 0 takes and keeps fresh. One of a process that is
known to be dead is taken over at once, as after a kill or an elastic restart; one from another machine is watched:
if it changes its owner lives, if it stays the same for ``lease_seconds`` its owner does not.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scfm.data.atomic_file import storage_errors
from scfm.data.lease import Lease, LeaseWatcher, lease_facts, read_lease
from scfm.data.process_name import host_name
from scfm.errors import ConfigError

__all__ = ["LOCK_FILE", "RunLock"]

LOCK_FILE = "run.lock"
_LOOK_EVERY = 0.2
# Two processes that take over the same stale lock at the same moment: the loser's is gone within this.
_SETTLED_SECONDS = 0.1


class RunLock:
    """The right to work in a folder, as a context. Of the ranks of a job the first one takes it for all.

    folder: of the run, made if need be. lease_seconds: how long a lock from another machine must stay the same to
    count as left behind. Entering raises ConfigError naming host and process of the job that is there, and
    StorageError.
    """

    def __init__(self, folder: str | Path, *, lease_seconds: float = 30.0) -> None:
        self._path = Path(folder) / LOCK_FILE
        self._lease_seconds = lease_seconds
        self._lease: Lease | None = None
        self._held = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._take()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()
        self._lease = None

    @property
    def is_held(self) -> bool:
        """Whether the folder still is this job's."""
        return self._lease is not None and self._lease.is_held

    def _take(self) -> None:
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        watcher = LeaseWatcher(self._lease_seconds)
        first = b""
        while self._lease is None:
            lease = Lease.take(self._path, self._lease_seconds, synced=True)
            if lease is not None:
                self._held.enter_context(lease)
                time.sleep(_SETTLED_SECONDS if first else 0.0)
                if lease.is_held:
                    self._lease = lease
                else:
                    self._held.close()
                continue
            content = read_lease(self._path)
            first = first or content
            facts = lease_facts(content)
            if watcher.is_stale(self._path):
                watcher.clear(self._path)
            elif content and (content != first or _is_here(facts)):
                raise self._refused(facts)
            else:
                time.sleep(_LOOK_EVERY)

    def _refused(self, facts: dict[str, Any]) -> ConfigError:
        host = str(facts.get("host", "unknown")).rpartition("-")[0] or "unknown"
        return ConfigError(
            f"another job is at work here: process {facts.get('pid', 'unknown')} on host {host}",
            path=self._path.parent,
            where="out",
            hint="Wait for it or end it, or write to another folder.",
        )


def _is_here(facts: dict[str, Any]) -> bool:
    """Whether the owner is a process of this machine that can be told to be alive (and was not told to be dead)."""
    return facts.get("host") == host_name() and bool(facts.get("started"))
