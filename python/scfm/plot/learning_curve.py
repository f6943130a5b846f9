"""Training loss by step, with the baselines' losses as lines: a falling curve alone says little."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import FormatError, InvalidArgumentError, MissingFileError
from scfm.plot.figure import OKABE_ITO, plain_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["learning_curve"]

HELD_OUT_KEYS = ("held_out_loss", "validation_loss")
HELD_OUT_COLOR, TRAIN_COLOR, BASELINE_COLOR = OKABE_ITO[3], OKABE_ITO[0], "#666666"


def learning_curve(
    metrics: str | PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    baselines: Mapping[str, float] | None = None,
    title: str | None = None,
    path: str | PathLike[str] | None = None,
    loss_key: str = "loss",
) -> Figure:
    """Draw masked-gene loss (nats) by training step and return the matplotlib figure; saved with ``path``.

    metrics: the JSON-lines file of ``scfm pretrain``, or its records as dictionaries with ``step`` and
    ``loss``, some also with ``held_out_loss``. baselines: name -> loss, drawn as labelled lines. The thin
    line is each record, the thick one a running mean over a twentieth of them. Needs the extra ``plot``.
    Raises FormatError naming the line that is not JSON, InvalidArgumentError when no record has a step and
    a loss.
    """
    records = _read(metrics) if isinstance(metrics, str | PathLike) else list(metrics)
    steps, losses = _series(records, (loss_key,))
    if steps.size == 0:
        raise InvalidArgumentError(f"no record has 'step' and {loss_key!r}", where="learning_curve")
    figure, axes = plain_figure(6.5, 4.0)
    width = max(1, steps.size // 20)
    if width > 1:
        axes.plot(steps, losses, color=TRAIN_COLOR, alpha=0.3, linewidth=0.8)
    axes.plot(steps, _running_mean(losses, width), color=TRAIN_COLOR, linewidth=1.8, label="training")
    held_steps, held_losses = _series(records, HELD_OUT_KEYS)
    if held_steps.size:
        marker = "o" if held_steps.size < 30 else None
        axes.plot(
            held_steps, held_losses, color=HELD_OUT_COLOR, linewidth=1.8, marker=marker, label="held out"
        )
        axes.legend(frameon=False, fontsize=9)
    _draw_baselines(axes, baselines or {})
    axes.set(xlabel="step", ylabel="masked-gene loss (nats)")
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    save_figure(figure, path)
    return figure


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    for name, loss in baselines.items():
        axes.axhline(loss, color=BASELINE_COLOR, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} {loss:.2f}",
            xy=(1.0, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color=BASELINE_COLOR,
        )


def _read(file: str | PathLike[str]) -> list[Mapping[str, Any]]:
    path = Path(file)
    if not path.is_file():
        raise MissingFileError(
            "no such metrics file", path=path, hint="scfm pretrain writes one beside the model."
        )
    records: list[Mapping[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FormatError(f"not JSON ({error.msg})", path=path, where=f"line {number}") from error
        if not isinstance(record, dict):
            raise FormatError(
                f"a {type(record).__name__}, expected an object", path=path, where=f"line {number}"
            )
        records.append(record)
    return records


def _series(
    records: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of the records that have a step and one of the keys."""
    pairs = [
        (float(record["step"]), float(record[key]))
        for record in records
        for key in keys
        if record.get("step") is not None and record.get(key) is not None
    ]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean over a centred window, narrower at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    low = np.maximum(index - width // 2, 0)
    high = np.minimum(index + width // 2 + 1, values.size)
    return np.asarray((total[high] - total[low]) / (high - low))
