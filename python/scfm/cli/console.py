"""What all verbs share: where text goes, progress bars, errors as exit codes, results as JSON."""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from scfm.errors import ScfmError, ScfmWarning

if TYPE_CHECKING:
    from scfm.embed.progress import Progress as RunState

EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 3, 130

console = Console(stderr=True, highlight=False)


@contextmanager
def reporting(*, as_json: bool) -> Iterator[None]:
    """Errors become one readable line (with --json a JSON object on stdout) and an exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ScfmWarning)
        warnings.showwarning = _show_warning
        try:
            yield
        except ScfmError as error:
            fail(error, error.code, EXIT_BAD_INPUT, as_json=as_json)
        except (OSError, MemoryError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, typer.Exit):
                raise
            if not as_json:
                console.print_exception()
            fail(error, "unexpected", EXIT_FAILURE, as_json=as_json)
        except KeyboardInterrupt:
            console.print("interrupted; no result was left half written")
            # Temporary files are gone by now; taking the interpreter down properly only costs a second.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)


def fail(error: BaseException, code: str, exit_code: int, *, as_json: bool) -> NoReturn:
    if as_json:
        emit({"ok": False, "error": type(error).__name__, "code": code, "message": str(error)})
    else:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
    raise typer.Exit(exit_code) from error


def emit(result: dict[str, Any]) -> None:
    """One JSON object on stdout: what --json promises."""
    sys.stdout.write(json.dumps(result, default=str) + "\n")


def say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def cell_progress(description: str, *, quiet: bool) -> Iterator[Callable[[int, int, int], None]]:
    """A bar with cells/s, tokens/s and time left; the callback takes (cells done, in all, tokens done)."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} cells"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet,
    ) as bar:
        task = bar.add_task(description, total=None, speed="")
        start = time.perf_counter()

        def advance(done: int, total: int, tokens: int) -> None:
            took = max(time.perf_counter() - start, 1e-9)
            speed = f"{done / took:,.1f} cells/s, {tokens / took:,.0f} tokens/s"
            bar.update(task, completed=done, total=total, speed=speed)

        yield advance


@contextmanager
def run_progress(*, quiet: bool) -> Iterator[Callable[[RunState], None]]:
    """A bar over all workers of a run: share, cells, their speeds added up, time left."""
    with Progress(
        TextColumn("embedding"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} cells"),
        TextColumn("{task.fields[speed]}"),
        console=console,
        disable=quiet,
    ) as bar:
        task = bar.add_task("embedding", total=None, speed="")

        def show(state: RunState) -> None:
            left = state.seconds_left
            time_left = "" if left is None else f", {datetime.timedelta(seconds=round(left))} left"
            speed = (
                f"{state.shards:,}/{state.num_shards:,} shards, {state.workers} workers, "
                f"{state.cells_per_second:,.1f} cells/s, {state.tokens_per_second:,.0f} tokens/s{time_left}"
            )
            bar.update(task, completed=state.cells, total=state.num_cells, speed=speed)

        yield show


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """A polite kill (a scheduler's, before the impolite one) ends the work as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, ScfmWarning):
        console.print(f"[yellow]note[/]: {message!s}", highlight=False)
