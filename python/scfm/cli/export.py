"""``scfm export``: a finished folder of embeddings as one .npy, .zarr, .parquet, or in a copy of the .h5ad."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from scfm.cli import options
from scfm.cli.console import emit, reporting, say, stop_on_sigterm


def export(
    folder: Annotated[Path, typer.Argument(help="A folder written by scfm embed.")],
    out: Annotated[Path, typer.Argument(help="Ends in .npy, .zarr, .parquet or .h5ad.")],
    input_file: Annotated[
        Path | None, typer.Option("--input", help="Which of several inputs the .h5ad is a copy of.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="obsm key in an .h5ad; default X_<family>.")] = None,
    as_json: options.Json = False,
) -> None:
    """Write the embeddings in FOLDER to OUT, whole or not at all; damaged or unfinished ones are refused."""
    with reporting(as_json=as_json), stop_on_sigterm():
        from scfm.embed.export import export_store

        summary = export_store(folder, out, input_file=input_file, key=key)
        if as_json:
            emit({"ok": True, **asdict(summary)})
        else:
            say(f"{summary.shape[0]:,} cells x {summary.shape[1]} in {summary.dtype} -> {out}")
            if summary.num_left_out:
                say(f"{summary.num_left_out:,} cells without known genes were left out")
