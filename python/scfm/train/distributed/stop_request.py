"""Requests to stop at the next step's end: SIGTERM and SIGUSR1, which schedulers send before they kill, and the clock.

A handler only notes what came; any number of signals are one request. All ranks add up their notes with the counts of
the next step, so they agree on the step after which they stop, save a checkpoint and end in order.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

__all__ = ["EXIT_CODES", "StopRequest"]

_SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": getattr(signal, "SIGUSR1", None)}
REASONS = (*_SIGNALS, "max_minutes")
# How a program should end after each, its checkpoint written: 85 asks for the job to be queued again; SIGTERM is from
# somebody who wants an end. Under torchrun every code but 0 would start the ranks anew: there all end with 0, and that
# the folder "model" is missing tells that the run is not finished.
EXIT_CODES = {"SIGTERM": 0, "SIGUSR1": 85, "max_minutes": 85}


class StopRequest:
    """Within the block the two signals are requests; before and after they do what they did.

    max_minutes: from the beginning of the block. Outside the main thread, where Python cannot handle signals, only the
    clock counts.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._came: set[str] = set()
        self._before: dict[str, Any] = {}
        self._seconds = math.inf if max_minutes is None else 60.0 * max_minutes
        self._start = time.monotonic()

    def notes(self) -> list[int]:
        """0 or 1 for each of REASONS, to be added up over the ranks."""
        too_long = time.monotonic() - self._start >= self._seconds
        return [*(int(name in self._came) for name in _SIGNALS), int(too_long)]

    @staticmethod
    def agreed(sums: list[int]) -> str | None:
        """The reason to stop that any rank noted; None to go on."""
        return next((reason for reason, count in zip(REASONS, sums, strict=True) if count), None)

    def __enter__(self) -> StopRequest:
        self._start = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for name, number in _SIGNALS.items():
                if number is not None:
                    self._before[name] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, before in self._before.items():
            number = _SIGNALS[name]
            assert number is not None
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.update(name for name, known in _SIGNALS.items() if known == number)
