"""A file system that fails at the Nth call: stands in for ``os`` in the modules that write."""

from __future__ import annotations

import errno
import os
from typing import Any

WATCHED = ("open", "write", "pwrite", "fsync", "link", "rename", "replace", "posix_fallocate")


class FailingOs:
    """Passes everything on to ``os``; the ``nth`` watched call raises ``code``.

    With ``code`` "short" every write takes at most 7 bytes; with "interrupted" every call fails once with EINTR.
    """

    def __init__(self, nth: int, code: int | str) -> None:
        self.nth = nth
        self.code = code
        self.num_calls = 0
        self.failed_at: str | None = None
        self._interrupted = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in WATCHED:
            return real

        def call(*args: Any, **options: Any) -> Any:
            if self.code == "short":
                return real(args[0], args[1][:7]) if name == "write" else real(*args, **options)
            if self.code == "interrupted":
                if name in ("write", "fsync", "posix_fallocate"):
                    self._interrupted = not self._interrupted
                    if self._interrupted:
                        raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
                return real(*args, **options)
            self.num_calls += 1
            if self.num_calls == self.nth:
                self.failed_at = name
                assert isinstance(self.code, int)
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **options)

        return call
