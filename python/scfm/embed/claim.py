"""Who works on which shard, settled by files alone: no coordinator, no locks, no clocks.

A claim is a *lease*, a file that only one process can create (O_CREAT with O_EXCL). Its holder counts up in it
every few seconds. Others do not compare times, which differ between machines by any amount: they remember what
the lease said and when, on their own steady clock, they first saw it say so. One that says the same for
``lease_seconds`` is stale and may be taken over; one of a process known to be dead, at once.

Taking over too early does no harm. Two processes then compute the same shard, get the same bytes, and the
first to commit wins; leases only save work.
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
from scfm.embed.plan import Shard

__all__ = ["Lease", "LeaseWatcher", "read_lease"]

_BYTES = 512  # a lease is overwritten in place, so it must never change its length
_MOST_BETWEEN_BEATS = 2.0


def lease_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.name}.lease"


def read_lease(path: Path) -> bytes:
    """What the lease says now; b"" if there is none."""
    try:
        return path.read_bytes()[: 2 * _BYTES]
    except OSError:
        return b""


def lease_facts(content: bytes) -> dict[str, Any]:
    """host, pid, started, beat, cells, tokens, speed; empty if it cannot be read (caught half written)."""
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


class Lease:
    """A shard that this process holds, as a context: a thread keeps it fresh until it is let go."""

    def __init__(self, path: Path, handle: int, lease_seconds: float) -> None:
        self._path = path
        self._handle = handle
        self._state: dict[str, Any] = {"cells": 0, "tokens": 0, "speed": 0.0}
        self._number = 0
        self._stop = threading.Event()
        self._every = min(lease_seconds / 6, _MOST_BETWEEN_BEATS)
        self._thread = threading.Thread(target=self._keep, name="scfm-lease", daemon=True)

    @classmethod
    def take(cls, folder: Path, shard: Shard, lease_seconds: float) -> Self | None:
        """The lease of a shard that nobody holds; None if somebody does. Raises StorageError."""
        path = lease_path(folder, shard)
        with storage_errors(path):
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            except FileExistsError:
                return None
            lease = cls(path, handle, lease_seconds)
            try:
                lease._beat()
            except OSError:
                lease._let_go()
                raise
        return lease

    def report(self, *, cells: int, tokens: int, speed: float) -> None:
        """How far the shard is, for whoever shows progress."""
        self._state = {"cells": cells, "tokens": tokens, "speed": round(speed, 1)}

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

    def _let_go(self) -> None:
        with suppress(OSError):
            # Somebody may have taken it over: theirs stays.
            if os.fstat(self._handle).st_ino == self._path.stat().st_ino:
                self._path.unlink()
        os.close(self._handle)


@dataclass
class _Seen:
    content: bytes
    since: float


class LeaseWatcher:
    """Watches other processes' leases over this process's own steady clock."""

    def __init__(self, folder: Path, lease_seconds: float) -> None:
        self._folder = folder
        self._lease_seconds = lease_seconds
        self._seen: dict[int, _Seen] = {}

    def is_stale(self, shard: Shard) -> bool:
        """Whether the lease has not changed for so long, or its holder is so certainly dead, that it is free."""
        content = read_lease(lease_path(self._folder, shard))
        seen = self._seen.get(shard.index)
        now = time.monotonic()
        if seen is None or seen.content != content:
            self._seen[shard.index] = seen = _Seen(content, now)
        facts = lease_facts(content)
        try:
            dead = is_dead(str(facts["host"]), int(facts["pid"]), str(facts["started"]))
        except (KeyError, TypeError, ValueError):
            dead = False
        return dead or now - seen.since >= self._lease_seconds

    def clear(self, shard: Shard) -> None:
        """Take a stale lease away. Of several processes trying, one succeeds; a lease renewed meanwhile stays."""
        path = lease_path(self._folder, shard)
        seen = self._seen.pop(shard.index, None)
        if seen is None or read_lease(path) != seen.content:
            return
        aside = temporary_name(path)
        with suppress(OSError):
            os.rename(path, aside)  # noqa: PTH104 (one step: only one of several gets it)
            aside.unlink()
