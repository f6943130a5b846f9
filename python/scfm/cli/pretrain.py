"""``scfm pretrain``: masked-gene pretraining from a TOML file and key=value settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from scfm.cli import options
from scfm.cli.console import console, emit, reporting, say


def pretrain(
    settings: Annotated[
        list[str], typer.Argument(help="A TOML file and/or key=value, e.g. data=atlas.h5ad out=run1.")
    ],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Pretrain a Geneformer on raw counts.

    Example: scfm pretrain config.toml learning_rate=3e-3 'data=["a.h5ad", "b.h5ad"]' out=run1. The settings
    are those of scfm.PretrainConfig; all are checked before any data is read.
    """
    with reporting(as_json=as_json):
        from scfm.train.config import PretrainConfig, parse_overrides
        from scfm.train.objectives import evaluate_masked
        from scfm.train.pretrain import pretrain as run

        files = [item for item in settings if "=" not in item]
        overrides = [item for item in settings if "=" in item]
        if len(files) > 1:
            raise typer.BadParameter(f"one settings file at most, found {files}")
        if files:
            config = PretrainConfig.from_file(Path(files[0]), overrides)
        else:
            config = PretrainConfig.from_mapping(parse_overrides(overrides))
        with Progress(
            TextColumn("pretraining"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or as_json,
        ) as bar:
            task = bar.add_task("pretraining", total=1.0, state="reading")

            def advance(metrics: dict[str, Any]) -> None:
                state = (
                    f"step {metrics['step']:,}  loss {metrics['loss']:.3f}  "
                    f"{metrics['cells_per_s']:,.0f} cells/s, {metrics['tokens_per_s']:,.0f} tokens/s"
                )
                bar.update(task, completed=metrics["progress"], state=state)

            result = run(config, progress=advance)
        facts: dict[str, Any] = {"model": str(result.folder), "metrics": str(result.metrics_file)}
        if result.corpus.held_out.num_cells:
            held_out = evaluate_masked(
                result.model, result.corpus.held_out, seed=config.seed, mask_ratio=config.mask_ratio
            )
            facts |= {"held_out_loss": held_out.loss, "held_out_accuracy": held_out.accuracy}
        if as_json:
            emit({"ok": True, **facts})
        else:
            for name, value in facts.items():
                say(f"{name:>18}: {value}")
