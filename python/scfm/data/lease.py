"""Who works on what (a shard of embeddings, a run's folder), settled by files alone: no coordinator, no clocks.

A claim is a *lease*, a file that only one process can create (O_CREAT with O_EXCL). Its holder counts up in it
every few seconds. Others do not compare times, which differ between machines by any amount: they remember what
the lease said and when, on their own steady clock, they first saw it say so. One that says the same for
``lease_seconds`` is stale and may be taken over; one of a process known to be dead, at once.

A lease may be taken over too early, from a machine that stood still. For shards that does no harm: two processes
then compute the same one, get the same bytes, and the first to commit wins. Whoever must know asks ``is_held``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scfm.data.atomic_file import storage_errors, temporary_name
from scfm.data.process_name import host_name, is_dead, start_time

__all__ = ["Lease", "LeaseWatcher", "lease_facts", "read_lease"]

_BYTES = 512  # a lease is overwritten in place, so it must never change its length
_MOST_BETWEEN_BEATS = 2.0


def read_lease(path: Path) -> bytes:
    """What the lease says now; b"" if there is none."""
    try:
        return path.read_bytes()[: 2 * _BYTES]
    except OSError:
        return b""


def lease_facts(content: bytes) -> dict[str, Any]:
    """host, pid, started, beat and what was reported; empty if it cannot be read (caught half written)."""
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


class Lease:
    """A file that this process holds, as a context: a thread keeps it fresh until it is let go.

    synced: every beat goes to the disk at once, so that other machines see it in time on storage that they share.
    """

    def __init__(self, path: Path, handle: int, lease_seconds: float, synced: bool = False) -> None:
        self._path = path
        self._handle = handle
        self._synced = synced
        self._state: dict[str, Any] = {}
        self._number = 0
        self._stop = threading.Event()
        self._every = min(lease_seconds / 6, _MOST_BETWEEN_BEATS)
        self._thread = threading.Thread(target=self._keep, name="scfm-lease", daemon=True)

    @classmethod
    def take(cls, path: Path, lease_seconds: float, *, synced: bool = False) -> Self | None:
        """The lease if nobody holds it; None if somebody does. Raises StorageError."""
        with storage_errors(path):
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            except FileExistsError:
                return None
            lease = cls(path, handle, lease_seconds, synced)
            try:
                lease._beat()
            except OSError:
                lease._let_go()
                raise
        return lease

    def report(self, **facts: float) -> None:
        """How far the work is, a few numbers for whoever shows progress."""
        self._state = facts

    @property
    def is_held(self) -> bool:
        """Whether the file still is this process's: nobody has taken it over or away."""
        try:
            return os.fstat(self._handle).st_ino == self._path.stat().st_ino
        except OSError:
            return False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._let_go()

    def _keep(self) -> None:
        while not self._stop.wait(self._every):
            # A lease that cannot be refreshed is lost to somebody else, which costs work and nothing more.
            with suppress(OSError):
                self._beat()

    def _beat(self) -> None:
        self._number += 1
        pid = os.getpid()
        facts = {"host": host_name(), "pid": pid, "started": start_time(pid), "beat": self._number}
        text = json.dumps({**facts, **self._state})
        os.pwrite(self._handle, text.ljust(_BYTES).encode()[:_BYTES], 0)
        if self._synced:
            os.fsync(self._handle)

    def _let_go(self) -> None:
        with suppress(OSError):
            if self.is_held:  # what somebody has taken over is theirs
                self._path.unlink()
        os.close(self._handle)


@dataclass
class _Seen:
    content: bytes
    since: float


class LeaseWatcher:
    """Watches other processes' leases over this process's own steady clock."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._seen: dict[Path, _Seen] = {}

    def is_stale(self, path: Path) -> bool:
        """Whether the lease has not changed for so long, or its holder is so certainly dead, that it is free."""
        content = read_lease(path)
        seen = self._seen.get(path)
        now = time.monotonic()
        if seen is None or seen.content != content:
            self._seen[path] = seen = _Seen(content, now)
        facts = lease_facts(content)
        try:
            dead = is_dead(str(facts["host"]), int(facts["pid"]), str(facts["started"]))
        except (KeyError, TypeError, ValueError):
            dead = False
        return dead or now - seen.since >= self._lease_seconds

    def clear(self, path: Path) -> None:
        """Take a stale lease away. Of several processes trying, one succeeds; a lease renewed meanwhile stays."""
        seen = self._seen.pop(path, None)
        if seen is None or read_lease(path) != seen.content:
            return
        aside = temporary_name(path)
        with suppress(OSError):
            os.rename(path, aside)  # noqa: PTH104 (one step: only one of several gets it)
            aside.unlink()
