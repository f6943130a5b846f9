"""Work done ahead in a thread: an iterator runs beside its consumer, a bounded number of items in front of it.

What the iterator raises is raised to the consumer when all items before it are used, so an error belongs to the step
that it would have spoilt. Closing stops the thread at its next item and closes the iterator there, in the thread that
opened its files; it waits for that only so long, because a disk that no longer answers must not keep a run from ending.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["ReadAhead"]

_CLOSE_SECONDS = 10.0
_LOOK_UP_SECONDS = 0.5

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """The items of an iterator, ``depth`` of them ready at most. Close it, or use it in ``with closing(...)``."""

    def __init__(self, items: Iterator[T], depth: int, *, name: str = "read ahead") -> None:
        self._items = items
        self._depth = depth
        self._changed = threading.Condition()
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        # A daemon: the interpreter ends without waiting for a read that never comes back.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            while not (self._ready or self._ended or self._closed):
                # A signal that another thread received is only looked at when this one wakes.
                self._changed.wait(_LOOK_UP_SECONDS)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Stop, forget what is ready, and wait a while for the thread to end. May be called twice, from any thread."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._error = None
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._put(item):
                    break
        except BaseException as raised:
            error = raised
        try:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()
        except BaseException as raised:
            error = error or raised
        with self._changed:
            self._error = None if self._closed else error
            self._ended = True
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        """Whether the item is wanted, once there is room for it."""
        with self._changed:
            while len(self._ready) >= self._depth and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._ready.append(item)
            self._changed.notify_all()
            return True
