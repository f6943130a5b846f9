"""One rank's file, written by a thread of its own while training goes on.

The thread touches files and nothing else: no tensors of the model, no other ranks. What went wrong is kept for the
thread that trains, which asks at a step boundary.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from scfm.data.atomic_file import create_once, storage_errors
from scfm.data.crash_points import crash_point

__all__ = ["BackgroundWrite"]


class BackgroundWrite:
    """Writes ``files`` (name to pieces of bytes) into ``folder``, which it makes; starts at once.

    Afterwards ``written`` holds size and CRC-32 of each, or ``error`` what went wrong.
    """

    def __init__(self, folder: Path, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
        self.folder = folder
        self.written: dict[str, tuple[int, int]] = {}
        self.error: Exception | None = None
        self.seconds = 0.0
        self._files = files
        self._thread = threading.Thread(target=self._run, name="scfm-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        begun = time.perf_counter()
        try:
            with storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            crash_point("checkpoint_begun")
            for name, pieces in self._files.items():
                create_once(self.folder / name, pieces, at=crash_point)
                self.written[name] = (sum(memoryview(piece).nbytes for piece in pieces), _crc32(pieces))
            crash_point("shard_written")
        except Exception as error:
            self.error = error
        self._files = {}
        self.seconds = time.perf_counter() - begun


def _crc32(pieces: Sequence[bytes | memoryview]) -> int:
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc
