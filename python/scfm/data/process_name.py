"""Naming a process so that another one, perhaps on another machine, can tell whether it still lives.

A process number means something on its own machine only, and there only within its container and until the
next start of the machine; so all of these are part of the name. Where nothing certain can be said (another
machine, another container) the answer is "unknown", and the caller has to watch for signs of life instead.
"""

from __future__ import annotations

import re
import socket
import zlib
from functools import cache
from pathlib import Path

__all__ = ["host_name", "is_dead", "start_time"]

_UNSAFE = re.compile(r"[^A-Za-z0-9-]")


@cache
def host_name() -> str:
    """This machine, its current start and this process's container, as one word for file names."""
    parts = [_read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid")]
    return f"{_UNSAFE.sub('-', socket.gethostname())[:40]}-{zlib.crc32('|'.join(parts).encode()):08x}"


def start_time(pid: int) -> str:
    """When the process started, in the kernel's own unit; "" if there is none or it cannot be known."""
    fields = _status(pid)
    return "" if len(fields) < 20 or fields[0] in ("Z", "X") else fields[19]


def is_dead(host: str, pid: int, started: str = "") -> bool:
    """True only if it is certain that the process named by ``host_name()`` and its number is gone."""
    if host != host_name() or pid <= 0 or not Path("/proc/self/stat").exists():
        return False
    now = start_time(pid)
    return not now or bool(started and now != started)


def _status(pid: int) -> list[str]:
    # The command's name comes in brackets and may hold anything, brackets and blanks included.
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
