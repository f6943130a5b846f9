"""A score never stands alone: one table with the baselines and controls in it, and a verdict in plain words.

The verdict is computed from the numbers. It names every baseline the subject does not beat before the ones
it does, and calls a difference a win or a loss only if its bootstrap interval excludes zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from typing import Any, Literal

from scfm.errors import InvalidArgumentError
from scfm.evaluate.bootstrap import Interval

__all__ = ["Metric", "Report", "Row", "verdict"]

Role = Literal["ours", "baseline", "control"]


@dataclass(frozen=True)
class Metric:
    """One column: its name, which direction is better, its unit and how many digits are shown."""

    name: str
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    digits: int = 3

    @property
    def heading(self) -> str:
        arrow = "↑" if self.better == "higher" else "↓"
        return f"{self.name}{f' ({self.unit})' if self.unit else ''} {arrow}"

    def gain(self, ours: float, other: float) -> float:
        """How much better ``ours`` is, positive when it is."""
        return ours - other if self.better == "higher" else other - ours


@dataclass(frozen=True)
class Row:
    """One method. ``values`` by metric name; a metric that does not apply to the method is left out."""

    name: str
    role: Role
    values: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Rows by metrics, with what a reader needs to judge them.

    split: the rule that separates train from test; num_train, num_test: how many ``items`` (cells, masked
    genes); gains: {(row name, metric name): interval of how much better ours is, positive = better}, where
    it was computed.
    """

    title: str
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    split: str
    num_train: int
    num_test: int
    seed: int
    items: str = "cells"
    gains: Mapping[tuple[str, str], Interval] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if [row.role for row in self.rows].count("ours") != 1:
            raise InvalidArgumentError("a report has exactly one row with role 'ours'", where=self.title)
        if all(row.role != "baseline" for row in self.rows):
            raise InvalidArgumentError(
                "a report needs at least one baseline", where=self.title, hint="A score alone says nothing."
            )
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            raise InvalidArgumentError(f"row names repeat: {names}", where=self.title)
        known = {metric.name for metric in self.metrics}
        for row in self.rows:
            if unknown := set(row.values) - known:
                raise InvalidArgumentError(
                    f"row {row.name!r} has unknown metrics {sorted(unknown)}", where=self.title
                )

    @property
    def ours(self) -> Row:
        return next(row for row in self.rows if row.role == "ours")

    def metric(self, name: str) -> Metric:
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise InvalidArgumentError(
            f"no metric {name!r}; there are {[m.name for m in self.metrics]}", where=self.title
        )

    def to_text(self) -> str:
        """Aligned plain text."""
        table = self._cells()
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [self.title, self._setting(), ""]
        for number, line in enumerate(table):
            first, *rest = line
            padded = [first.ljust(widths[0])] + [
                text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)
            ]
            lines.append("  ".join(padded).rstrip())
            if number == 0:
                lines.append("  ".join("-" * width for width in widths))
        lines += [f"* {note}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def to_markdown(self) -> str:
        """A Markdown section with the same content."""
        head, *body = ([text.replace("|", "\\|") for text in line] for line in self._cells())
        lines = [f"## {self.title}", "", self._setting(), ""]
        lines.append("| " + " | ".join(head) + " |")
        lines.append("|" + "|".join([":--"] + ["--:"] * (len(head) - 1)) + "|")
        lines += ["| " + " | ".join(line) + " |" for line in body]
        if self.notes:
            lines += [""] + [f"- {note}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON. NaN becomes None; gains are listed with their intervals."""
        return {
            "title": self.title,
            "split": self.split,
            "num_train": self.num_train,
            "num_test": self.num_test,
            "items": self.items,
            "seed": self.seed,
            "metrics": [{"name": m.name, "better": m.better, "unit": m.unit} for m in self.metrics],
            "rows": [
                {
                    "name": row.name,
                    "role": row.role,
                    "values": {name: None if isnan(value) else value for name, value in row.values.items()},
                    "note": row.note,
                }
                for row in self.rows
            ],
            "gains_over": [
                {"row": row, "metric": metric, "gain": gain.estimate, "low": gain.low, "high": gain.high}
                for (row, metric), gain in self.gains.items()
            ],
            "notes": list(self.notes),
            "verdicts": {m.name: verdict(self, m.name) for m in self.metrics},
        }

    def _setting(self) -> str:
        counts = f"{self.num_train:,} train and {self.num_test:,} test {self.items}"
        return f"{counts}; split: {self.split}; seed {self.seed}"

    def _cells(self) -> list[list[str]]:
        table = [["method", *(metric.heading for metric in self.metrics)]]
        for row in self.rows:
            name = row.name if row.role == "baseline" else f"{row.name} ({row.role})"
            table.append(
                [name, *(_shown(row.values.get(metric.name), metric.digits) for metric in self.metrics)]
            )
        return table


def verdict(report: Report, metric_name: str) -> str:
    """One or more plain sentences: what ours does not beat, what it cannot be told apart from, what it beats.

    Rows without the metric are named as not compared. With an interval, "beats" and "loses to" mean that it
    excludes zero; without one the sign of the difference decides, and equal numbers are "level".
    """
    metric = report.metric(metric_name)
    value = report.ours.values.get(metric_name)
    if value is None or isnan(value):
        return f"{report.ours.name} has no {metric_name}, so nothing can be said."
    groups: dict[str, list[str]] = {"loses to": [], "is not clearly different from": [], "beats": [], "": []}
    for row in report.rows:
        if row.role != "ours":
            relation, text = _compare(report, metric, value, row)
            groups[relation].append(text)
    not_compared = groups.pop("")
    parts = [f"{relation} {_listed(texts)}" for relation, texts in groups.items() if texts]
    unit = f" {metric.unit}" if metric.unit else ""
    sentence = f"On {metric_name}, {report.ours.name} ({value:.{metric.digits}f}{unit}) {_joined(parts)}."
    if not_compared:
        sentence += f" Not compared: {', '.join(not_compared)}."
    return sentence


def _compare(report: Report, metric: Metric, ours: float, row: Row) -> tuple[str, str]:
    other = row.values.get(metric.name)
    if other is None or isnan(other):
        return "", row.name
    gain = metric.gain(ours, other)
    interval = report.gains.get((row.name, metric.name))
    text = f"{row.name} ({other:.{metric.digits}f}"
    if interval is None:
        relation = "beats" if gain > 0 else "loses to" if gain < 0 else "is not clearly different from"
        return relation, f"{text})"
    text += f"; {gain:+.{metric.digits}f}, 95 % interval {interval.low:+.{metric.digits}f} to "
    text += f"{interval.high:+.{metric.digits}f})"
    if interval.low > 0.0:
        return "beats", text
    return ("loses to" if interval.high < 0.0 else "is not clearly different from"), text


def _listed(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _joined(parts: list[str]) -> str:
    return "; it ".join(parts) if parts else "has nothing to be compared with"


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None or isnan(value) else f"{value:.{digits}f}"
