"""``scfm demo``: the main job on real cells, start to finish: at once with scfm-mini, in minutes with --pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scfm.cli import options
from scfm.cli.console import console, emit, reporting


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything it makes.")] = Path(
        "scfm-demo"
    ),
    pretrain: Annotated[
        bool,
        typer.Option(
            "--pretrain", help="Train a small Geneformer on these cells from nothing, and judge that."
        ),
    ] = False,
    minutes: Annotated[float, typer.Option(help="About how long --pretrain takes.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of split, masks and weights.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few steps and no UMAP, to see that it runs.")] = False,
    as_json: options.Json = False,
) -> None:
    """Embed real blood cells with scfm-mini and judge it beside its baselines."""
    with reporting(as_json=as_json):
        from scfm.demo.run import run_demo

        result = run_demo(
            out,
            pretrain=pretrain,
            minutes=minutes,
            seed=seed,
            quick=quick,
            console=None if as_json else console,
        )
        if as_json:
            emit(
                {
                    "ok": True,
                    "out": str(result.folder),
                    "masked_genes": None if result.masked is None else result.masked.to_dict(),
                    "embedding": result.embedding.to_dict(),
                    "verdict": result.verdict,
                    "seconds": result.seconds,
                }
            )
