"""How long each stage of the demo takes, and a word on what runs where somebody is watching."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Clock"]


class Clock:
    """Times each stage and, with a console, says what runs."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, *, bar: bool = False) -> Iterator[Callable[[dict[str, Any]], None] | None]:
        start = time.perf_counter()
        if self.console is None:
            yield None
        elif bar:
            with self._bar(name) as update:
                yield update
        else:
            with self.console.status(f"{name} ..."):
                yield None
        self.seconds[name] = round(time.perf_counter() - start, 2)
        if self.console is not None:
            self.console.print(f"{name}: {self.seconds[name]:.1f} s", markup=False, highlight=False)

    @contextmanager
    def _bar(self, name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.2f}, {task.fields[rate]:,.0f} cells/s, left:"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=1.0, loss=float("nan"), rate=0.0)

            def advance(metrics: dict[str, Any]) -> None:
                if "event" not in metrics:
                    loss, rate = metrics["loss"], metrics["cells_per_s"]
                    progress.update(task, completed=metrics["progress"], loss=loss, rate=rate)

            yield advance
