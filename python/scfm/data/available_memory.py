"""How much memory this process may still take, so that a reader can refuse instead of being killed.

The smallest of what the machine has free, what the container allows and what the process limit leaves. Where
nothing can be found out the answer is "plenty": the estimate only ever serves to fail early and clearly.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scfm.errors import ResourceError

__all__ = ["available_memory", "require_memory"]


def available_memory() -> int:
    """Bytes that can still be allocated, as far as the operating system tells."""
    return min(_machine(), _container(), _process())


def require_memory(num_bytes: int, *, purpose: str, name: str, where: str, hint: str) -> None:
    """Raise ResourceError when ``num_bytes`` are clearly more than there is."""
    available = available_memory()
    if num_bytes > available:
        raise ResourceError(
            f"{purpose} needs about {_readable(num_bytes)}; {_readable(available)} are available",
            path=name,
            where=where,
            hint=hint,
        )


def _readable(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return sys.maxsize


def _container() -> int:
    try:
        root = Path("/sys/fs/cgroup")
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((root / "memory.current").read_text(encoding="ascii"))
            # Cached file pages count as used but are given up on demand.
            for line in (root / "memory.stat").read_text(encoding="ascii").splitlines():
                if line.startswith("inactive_file "):
                    used -= int(line.split()[1])
            return max(int(limit) - used, 0)
    except (OSError, ValueError):
        pass
    return sys.maxsize


def _process() -> int:
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return sys.maxsize
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return max(limit - pages * resource.getpagesize(), 0)
    except (ImportError, OSError, ValueError):
        return sys.maxsize
