"""``scfm plan``: what a pretraining run will take, in time, memory and money, before anything is trained."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scfm.cli import options
from scfm.cli.console import emit, reporting, say
from scfm.cli.pretrain import Settings, read_settings

if TYPE_CHECKING:
    from scfm.train.config import PretrainConfig
    from scfm.train.cost.cost import RunCost
    from scfm.train.cost.device_peaks import DeviceSheet

_THIS_CPU = "cpu"


def plan(
    settings: Settings,
    gpu: Annotated[
        str,
        typer.Option(help='Name in the table of peaks, such as H100 or A100-40GB; "cpu" measures this one.'),
    ] = "H100",
    num_gpus: Annotated[int, typer.Option(help="GPUs that share the work, one process each.")] = 1,
    price: Annotated[float | None, typer.Option(help="Of one GPU for an hour.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak that the run is assumed to reach.")] = 0.4,
    cells: Annotated[int | None, typer.Option(help="Plan for so many training cells; reads no data.")] = None,
    tokens_per_cell: Annotated[
        float | None, typer.Option(help="With --cells: genes that a cell expresses, in the mean.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Estimate time, memory and cost of a pretraining run without running it.

    Example: scfm plan config.toml --gpu H100 --num-gpus 8 --price 2.5. The settings are those of scfm pretrain and
    checked as it checks them. The data are tokenized once, for the cells' lengths, which are kept in OUT for the run;
    with --cells and --tokens-per-cell nothing is read. Exit code 3 where the run would not fit into memory.
    """
    with reporting(as_json=as_json):
        from scfm.errors import InvalidArgumentError, ResourceError

        config = read_settings(settings)
        if (cells is None) != (tokens_per_cell is None):
            raise InvalidArgumentError("goes with --cells, and --cells with it", where="--tokens-per-cell")
        sheet = _sheet(gpu)
        from scfm.train.cost.cost import run_cost
        from scfm.train.cost.planned_epoch import guessed_epoch, planned_epoch

        if cells is not None and tokens_per_cell is not None:
            epoch = guessed_epoch(config, cells, tokens_per_cell)
        else:
            epoch = planned_epoch(config)
        found = run_cost(
            config,
            epoch,
            sheet=sheet,
            dtype=_dtype(gpu, config),
            num_gpus=num_gpus,
            mfu=mfu,
            price=price,
        )
        if as_json:
            emit({"ok": not found.problems, **found.to_dict()})
        else:
            _show(found)
        if found.problems:
            raise ResourceError("; ".join(found.problems)) if not as_json else typer.Exit(3)


def _sheet(gpu: str) -> DeviceSheet:
    from scfm.train.cost.device_peaks import DeviceSheet, device_sheet, measured_peak_flops

    if gpu.lower() != _THIS_CPU:
        return device_sheet(gpu)
    import torch

    from scfm.data.available_memory import available_memory

    return DeviceSheet(
        _THIS_CPU,
        bfloat16=measured_peak_flops(torch.bfloat16),
        float32=measured_peak_flops(torch.float32),
        memory=available_memory(),
        pattern="",
    )


def _dtype(gpu: str, config: PretrainConfig) -> Any:
    """Of the products; "auto" is bfloat16 on every GPU of the table."""
    import torch

    from scfm.models.nn.precision import resolve_dtype

    if gpu.lower() == _THIS_CPU:
        return resolve_dtype(config.precision, torch.device("cpu"))
    return torch.float32 if config.precision == "float32" else torch.bfloat16


def _show(found: RunCost) -> None:
    facts = found.facts
    guessed = " (guessed)" if facts["guessed"] else ""
    rows = {
        "training cells": f"{facts['cells']:,}{guessed}, {facts['tokens_per_cell']:,.0f} tokens each",
        "an epoch": f"{facts['tokens_per_epoch']:,} tokens in {facts['microbatches_per_epoch']:,} microbatches, "
        f"{facts['unused_budget']:.2%} of the token budget unused",
        "the run": f"{facts['epochs']:,} epochs, {facts['steps']:,} steps of {facts['tokens_per_step']:,} tokens, "
        f"{facts['microbatches_per_rank']:,} microbatches a GPU and step",
        "model": f"{facts['parameters']:,} weights; {facts['flops']:.3g} FLOPs in all",
        "time": f"{_duration(facts['seconds'])} on {facts['gpus']:,} x {facts['gpu']} at an assumed "
        f"{facts['assumed_mfu']:.0%} of {facts['peak_flops_per_gpu'] / 1e12:,.4g} TFLOP/s each: "
        f"{facts['tokens_per_second']:,.0f} tokens/s, {facts['seconds_per_step']:.3g} s a step",
        "cost": f"{facts['gpu_hours']:,.2f} GPU hours"
        + ("" if facts["cost"] is None else f", {facts['cost']:,.2f} at the given price"),
        "checkpoints": f"{_size(facts['checkpoint_bytes'])} each, up to {_size(facts['checkpoints_bytes'])} at once",
    }
    for name, text in rows.items():
        say(f"{name:>16}: {text}")
    say("\nMemory of a GPU (the first line is what the settings say):")
    for name, memory in found.memory.items():
        say(
            f"{_size(memory.total):>12}  {name}: weights {_size(memory.weights + memory.working_copies)}, gradients "
            f"{_size(memory.gradients)}, optimiser {_size(memory.optimizer)}, gathered {_size(memory.gathered)}, "
            f"activations {_size(memory.activations)}, reserve {_size(memory.reserve)}"
        )
    for note in found.notes:
        say(f"note: {note}")


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if seconds >= 1 else f"{seconds:.2g} s"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
