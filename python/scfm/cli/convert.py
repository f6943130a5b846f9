"""``scfm convert``: an authors' checkpoint to a folder that loads anywhere, without pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scfm.cli import options
from scfm.cli.console import emit, reporting, say


def convert(
    model: Annotated[str, typer.Argument(help="The authors' folder or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    dictionaries: options.Dictionaries = None,
    version: options.Version = None,
    as_json: options.Json = False,
) -> None:
    """Write MODEL as scfm's folder: model.safetensors, config.json, vocab.json."""
    with reporting(as_json=as_json):
        from scfm.models.load import load

        loaded = load(model, dictionaries=dictionaries, version=version, dtype="float32", device="cpu")
        folder = loaded.save(out)
        report = loaded.load_report
        assert report is not None
        if as_json:
            emit({"ok": True, "out": str(folder), "report": report.to_dict()})
        else:
            say(str(report))
            say(f"{loaded.num_parameters():,} parameters -> {folder}")
