"""``scfm demo``: the main job on real cells, start to finish, in about three minutes."""

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
    minutes: Annotated[float, typer.Option(help="About how long it all takes.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of split, masks and weights.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few seconds of training, to see that it runs.")] = False,
    as_json: options.Json = False,
) -> None:
    """Pretrain a small Geneformer on real blood cells, embed them, and judge it beside its baselines."""
    with reporting(as_json=as_json):
        from scfm.demo.run import run_demo

        result = run_demo(out, minutes=minutes, seed=seed, quick=quick, console=None if as_json else console)
        if as_json:
            emit(
                {
                    "ok": True,
                    "out": str(result.folder),
                    "masked_genes": result.masked.to_dict(),
                    "embedding": result.embedding.to_dict(),
                    "verdict": result.verdict,
                    "seconds": result.seconds,
                }
            )
