"""``scfm pretrain``: a model from raw counts, by a TOML file and key=value settings, in one process or under torchrun.

The same command continues what it finds in the output folder. Of several processes rank 0 alone draws and reports; the
others say nothing but their errors, each with its rank before it.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from scfm.cli import options
from scfm.cli.broken_output import output_may_break
from scfm.cli.console import EXIT_BAD_INPUT, EXIT_FAILURE, console, emit, reporting, say

if TYPE_CHECKING:
    from scfm.train.config import PretrainConfig

_SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal to draw a bar on
Settings = Annotated[
    list[str], typer.Argument(help="A TOML file and/or key=value, e.g. data=atlas.h5ad out=run1.")
]
Line = Mapping[str, Any]


def pretrain(settings: Settings, as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Pretrain a Geneformer, scGPT, scBERT or scFoundation on raw counts.

    Example: scfm pretrain config.toml learning_rate=3e-3 'data=["a.h5ad", "b.h5ad"]' out=run1. The settings are those
    of scfm.PretrainConfig, all of them checked before any data is read; a key of a table has a dot, as in
    objective.mask_ratio=0.3. Killed or stopped, the same command goes on from the newest sound checkpoint in OUT.

    Several processes: torchrun --nproc-per-node=8 --no-python scfm pretrain config.toml

    Exit codes beside those of scfm: 85, stopped by SIGUSR1 or max_minutes with a checkpoint to go on from. SIGTERM is
    somebody's wish and ends in 0, and so does every orderly end under torchrun, which would take 85 for a failure.
    """
    rank = int(os.environ.get("RANK") or 0)
    with output_may_break(), _said_by(rank), reporting(as_json=as_json and rank == 0):
        config = read_settings(settings)
        from scfm.train.distributed.stop_request import EXIT_CODES
        from scfm.train.pretrain import pretrain as run

        with training_progress(quiet=quiet or as_json or rank > 0) as progress:
            result = run(config, progress=progress)
        if rank == 0:
            _report(result.to_dict(), as_json=as_json)
        if result.stopped is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise typer.Exit(EXIT_CODES[result.stopped])


def read_settings(settings: list[str]) -> PretrainConfig:
    """The settings of a file, if one is named, changed by what has an equals sign. Raises ConfigError for its keys."""
    from scfm.train.config import PretrainConfig, parse_overrides

    files = [item for item in settings if "=" not in item]
    overrides = [item for item in settings if "=" in item]
    if len(files) > 1:
        raise typer.BadParameter(f"one settings file at most, found {files}")
    if files:
        return PretrainConfig.from_file(Path(files[0]), overrides)
    return PretrainConfig.from_mapping(parse_overrides(overrides))


@contextmanager
def training_progress(*, quiet: bool) -> Iterator[Callable[[Line], None]]:
    """A bar that takes the lines of metrics.jsonl: share done, loss, speed, wait for data, time left.

    Where there is no terminal, as in a scheduler's log, one of these lines is written from time to time.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        disable=quiet,
    ) as bar:
        task = bar.add_task("pretraining", total=1.0, state="reading the data")
        begun: tuple[float, float] | None = None
        said = -_SECONDS_BETWEEN_LINES

        def advance(line: Line) -> None:
            nonlocal begun, said
            if "event" in line:
                if not quiet and line["event"] in _EVENTS:
                    say(_EVENTS[line["event"]](line))
                return
            now, share = time.monotonic(), float(line["progress"])
            begun = begun or (now - float(line["step_s"]), share)
            state = _state(line, _seconds_left(begun, now, share))
            bar.update(task, completed=share, state=state)
            if not (quiet or console.is_terminal) and now - said >= _SECONDS_BETWEEN_LINES:
                said = now
                say(f"{share:.1%}  {state}")

        yield advance


def _state(line: Line, seconds_left: float | None) -> str:
    wait = float(line["data_wait_s"]) / max(float(line["step_s"]), 1e-9)
    parts = [
        f"step {line['step']:,}",
        f"loss {float(line['loss']):.3f}",
        f"{line['cells_per_s']:,.0f} cells/s",
        f"{line['tokens_per_s']:,.0f} tokens/s",
        *([] if line.get("mfu") is None else [f"{line['mfu']:.0%} of peak"]),
        *([f"{wait:.0%} waiting for data"] if wait >= 0.01 else []),
        *([] if seconds_left is None else [f"{datetime.timedelta(seconds=round(seconds_left))} left"]),
    ]
    return "  ".join(parts)


def _seconds_left(begun: tuple[float, float], now: float, share: float) -> float | None:
    """By the speed since this process began: what an earlier one did says nothing of it."""
    start, share_then = begun
    return (now - start) * (1.0 - share) / (share - share_then) if share > share_then else None


def _resumed(line: Line) -> str:
    skipped = "".join(f"\n  not used: {why}" for why in line.get("skipped", []))
    return f"resumed from step {line['step']:,} ({line.get('checkpoint', '')}){skipped}"


_EVENTS: dict[str, Callable[[Line], str]] = {
    "resumed": _resumed,
    "skipped": lambda line: f"step {line['step']:,} was not applied: {line.get('why', 'not finite')}",
    "stopping": lambda line: f"stopping after step {line['step']:,}: {line.get('why', '')}",
}


def _report(facts: Line, *, as_json: bool) -> None:
    if as_json:
        emit({"ok": True, **facts})
        return
    for name, value in _flat(facts):
        say(f"{name:>24}: {value}")


def _flat(facts: Line, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        elif value is not None:
            yield f"{prefix}{name}".replace("_", " "), f"{value:.4g}" if isinstance(value, float) else value


@contextmanager
def _said_by(rank: int) -> Iterator[None]:
    """An error that this process prints is followed by its rank, unless that is 0."""
    try:
        yield
    except typer.Exit as left:
        if rank > 0 and left.exit_code in (EXIT_FAILURE, EXIT_BAD_INPUT):
            say(f"(the error above is that of rank {rank})")
        raise
