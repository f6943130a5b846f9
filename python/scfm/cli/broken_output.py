"""A terminal, pipe or log that goes away while a verb works for hours: what it was told is lost, the work is not.

rich ends the program when its pipe breaks, and Python's exit code changes when the last flush of stdout fails. Inside
``output_may_break`` both streams are watched: the first write that is refused (EPIPE, a full disk, a closed file) makes
that stream silent for good.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class WatchedStream(io.TextIOBase):
    """Passes text on to ``stream`` until that refuses it; from then on says nothing. None: a stream closed before."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream: TextIO = io.StringIO() if stream is None else stream
        self.broken = stream is None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if not self.broken:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode("ascii", "replace").decode())
            except (OSError, ValueError):
                self._break()
        return len(text)

    def flush(self) -> None:
        if not self.broken:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._break()

    def isatty(self) -> bool:
        return not self.broken and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def _break(self) -> None:
        """What still lies in the stream's buffer goes nowhere, or the interpreter would try again as it ends."""
        self.broken = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()


@contextmanager
def output_may_break() -> Iterator[None]:
    """Within: what is printed to stdout, stderr or the console never raises."""
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = WatchedStream(stdout), WatchedStream(stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = stdout, stderr
