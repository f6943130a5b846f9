"""The table that the bench prints and keeps: a row for each contender, ours and the peers, at one shape.

A contender is a call on inputs of its own layout. Where there are several ways to call one (backends, compilation
modes) all are timed and the fastest stands. What cannot run here is kept too, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timing import Clock, Peaks, Time
from torch import Tensor

Outputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Contender:
    """ways: {how it is called: a function of ``inputs``}; unpack: its output as packed (T, ...), to be compared.

    around: entered for its calls, forward and backward; absent: why it does not run, or None.
    """

    name: str
    inputs: tuple[Tensor, ...] = ()
    ways: dict[str, Callable[..., Outputs]] = field(default_factory=dict)
    unpack: Callable[[Outputs], Tensor] | None = None
    absent: str | None = None
    is_ours: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Subject:
    """One operator at one shape. work: TFLOP or GB of a forward; backward: the factor of a backward on it."""

    operator: str
    shape: str
    dtype: str
    work: float
    unit: str = "TFLOP/s"  # or GB/s, for what only moves memory
    backward: float = 2.5
    goals: dict[str, float] = field(default_factory=dict)  # direction -> the rate to reach


@dataclass(frozen=True)
class Row:
    operator: str
    shape: str
    dtype: str
    contender: str
    direction: str
    milliseconds: float | None = None
    milliseconds_min: float | None = None
    rate: float | None = None
    unit: str = ""
    share_of_peak: float | None = None
    ratio: float | None = None  # its milliseconds over ours: above 1, ours is faster
    goal: float | None = None
    absent: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"


def measure(subject: Subject, contenders: Sequence[Contender], clock: Clock, peaks: Peaks) -> list[Row]:
    """Rows of every contender, ours first: forward, forward with backward, and their difference."""
    rows: list[Row] = []
    ours: dict[str, float] = {}
    expected: Tensor | None = None
    print(f"\n{subject.operator}, {subject.shape}, {subject.dtype}")
    for contender in sorted(contenders, key=lambda contender: not contender.is_ours):
        with contender.around():
            times, names, problems = _times(contender, clock, expected)
            if contender.is_ours and expected is None and FORWARD in times:
                expected = _packed(contender, next(iter(contender.ways.values())))
        if contender.is_ours and not ours:
            ours = {direction: found.median for direction, found in times.items()}
        for direction, found in times.items():
            name = f"{contender.name}{names.get(direction, '')}"
            rows.append(_row(subject, name, direction, found, peaks, ours.get(direction)))
        rows += [_absent(subject, contender.name, why) for why in problems]
    for row in rows:
        print(_line(row))
    return rows


def _times(
    contender: Contender, clock: Clock, expected: Tensor | None
) -> tuple[dict[str, Time], dict[str, str], list[str]]:
    """{direction: time}, {direction: which way was the fastest}, and why something is missing."""
    if contender.absent is not None:
        return {}, {}, [contender.absent]
    best: dict[str, Time] = {}
    names: dict[str, str] = {}
    problems = []
    for way, function in contender.ways.items():
        found: dict[str, Time] = {}
        try:
            if expected is not None:
                _compare(_packed(contender, function), expected)
            for direction, time in _directions(contender, function, clock):
                found[direction] = time
        except Exception as error:  # a peer that cannot run this shape is listed with what it says
            problems.append(f"{way}: {_first_line(error)}" if way else _first_line(error))
        for direction, time in found.items():
            if direction not in best or time.median < best[direction].median:
                best[direction], names[direction] = time, f" ({way})" if way else ""
    return best, names, problems if BOTH not in best else []


def _directions(
    contender: Contender, function: Callable[..., Outputs], clock: Clock
) -> Iterator[tuple[str, Time]]:
    """Forward, forward with backward, and their difference, each as soon as it is known."""

    def forward() -> None:
        with torch.no_grad():
            function(*contender.inputs)

    alone = clock.time(forward)
    yield FORWARD, alone
    leaves = [x.detach().requires_grad_() for x in contender.inputs]
    upstream = [torch.ones_like(x) for x in _list(function(*leaves))]
    both = clock.time(lambda: torch.autograd.grad(_list(function(*leaves)), leaves, upstream))
    yield BOTH, both
    yield BACKWARD, both - alone


def _list(outputs: Outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _packed(contender: Contender, function: Callable[..., Outputs]) -> Tensor:
    with torch.no_grad():
        out = function(*contender.inputs)
    packed = contender.unpack(out) if contender.unpack is not None else out
    assert isinstance(packed, Tensor)
    return packed.float()


def _compare(found: Tensor, expected: Tensor) -> None:
    """A contender that computes something else is no contender; rounding (Performer's, in 16 bits) is allowed."""
    error = float((found - expected).abs().max() / expected.abs().max()) if expected.numel() else 0.0
    if not error < 0.2:
        raise ValueError(f"its result is {error:.2g} of the largest value away from ours")


def _row(subject: Subject, name: str, direction: str, found: Time, peaks: Peaks, ours: float | None) -> Row:
    factor = {FORWARD: 1.0, BACKWARD: subject.backward, BOTH: 1.0 + subject.backward}[direction]
    rate = subject.work * factor / found.median * 1e3
    peak = peaks.tflop_per_s if subject.unit == "TFLOP/s" else peaks.gb_per_s
    return Row(
        subject.operator,
        subject.shape,
        subject.dtype,
        name,
        direction,
        round(found.median, 4),
        round(found.minimum, 4),
        round(rate, 2),
        subject.unit,
        round(rate / peak, 4),
        round(found.median / ours, 3) if ours else None,
        subject.goals.get(direction),
    )


def _absent(subject: Subject, name: str, why: str) -> Row:
    return Row(subject.operator, subject.shape, subject.dtype, name, "", absent=why)


def _line(row: Row) -> str:
    if row.absent is not None:
        return f"  {row.contender:<38} absent: {row.absent}"
    goal = f"   goal {row.goal:,.0f}" if row.goal else ""
    ratio = f"{row.ratio:6.2f}x" if row.ratio else ""
    return (
        f"  {row.contender:<38} {row.direction:<17} {row.milliseconds:9.3f} ms {row.rate:8.1f} {row.unit:<7}"
        f" {row.share_of_peak:6.1%} {ratio}{goal}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
