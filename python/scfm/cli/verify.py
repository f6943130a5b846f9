"""``scfm verify``: is a folder of embeddings whole, and every byte still the one that was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scfm.cli import options
from scfm.cli.console import EXIT_FAILURE, emit, reporting, say

_MAX_SHOWN = 20


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder written by scfm embed.")],
    as_json: options.Json = False,
) -> None:
    """Compare every shard in FOLDER with its checksum. Exit code 1 if any is damaged or missing."""
    with reporting(as_json=as_json):
        from scfm.embed.verify import verify_store

        report = verify_store(folder)
        if as_json:
            emit(report.to_dict())
        else:
            for problem in report.problems[:_MAX_SHOWN]:
                say(f"{problem.shard} {problem.kind}: {problem.message}")
            if len(report.problems) > _MAX_SHOWN:
                say(f"... {len(report.problems) - _MAX_SHOWN:,} more")
            say(
                f"{report.num_good:,} of {report.num_shards:,} shards are good, {report.num_cells:,} cells planned; "
                f"{report.num_without_genes:,} cells without known genes, {report.num_truncated:,} truncated, "
                f"{report.num_not_finite:,} not finite"
            )
            if report.leftovers:
                say(
                    f"{len(report.leftovers)} files of unfinished or killed work (harmless; a resume clears them)"
                )
            if report.unknown:
                say(f"not part of the plan: {', '.join(report.unknown[:5])}")
    if not report.ok:
        raise typer.Exit(EXIT_FAILURE)
