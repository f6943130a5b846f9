"""The demo's folder: complete, or what it was before; never somebody else's files.

Products are made elsewhere and moved into place when all are there, the report last, for its presence says that the
rest is. What an earlier demo of the other kind left (with or without ``pretrain``) goes, so that no file stands beside
numbers that are not its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from scfm.errors import InvalidArgumentError

__all__ = ["FORMAT", "REPORT", "put_in_place", "usable_folder"]

REPORT = "report.json"
FORMAT = "scfm-demo"


def usable_folder(folder: Path) -> Path:
    """The folder, made if needed; one that holds anything but an earlier demo is refused, not overwritten."""
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError("is a file, expected a folder", path=folder, where="out")
    if folder.is_dir():
        found = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".partial-")]
        if found and not _is_demo(folder / REPORT):
            raise InvalidArgumentError(
                f"holds {len(found)} files and is no earlier demo",
                path=folder,
                hint="Give a new or empty folder.",
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_demo(report: Path) -> bool:
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def put_in_place(made: Path, folder: Path, products: Sequence[str], *, others: Sequence[str]) -> None:
    """Move ``products`` out of ``made``; ``others`` are products of the other kind of demo, and disappear."""
    for name in others:
        _remove(folder / name)
    for name in products:
        final = folder / name
        if final.is_dir():
            _remove(final)
        (made / name).replace(final)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
