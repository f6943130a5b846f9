"""What a run keeps of its corpus beside its checkpoints, so that a resumed run and all ranks but one need no pass.

Two results take a pass over all cells: the vocabulary and the cells' lengths. Each is one file, and a description in
JSON that is written after it: the key it was made from (files with size and time, settings) and its checksum. Whoever
has the very same key may read it; everybody else makes it anew. Rank 0 makes it and touches a sign of life meanwhile;
the others wait as long as that sign moves.

Data in memory, or behind a URL, have no size and time to go by: they have no key, and every process reads them itself.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scfm.data.atomic_file import storage_errors, whole_file
from scfm.data.source import CellSource
from scfm.errors import ResourceError

__all__ = ["CorpusFolder", "file_stamp", "file_stamps"]

_SIGN_OF_LIFE = "reading"
_SIGN_SECONDS = 1.0
_POLL_SECONDS = 0.1


def file_stamps(parts: Sequence[CellSource]) -> list[dict[str, Any]] | None:
    """Name, size, time and shape of each part's file; None if one of them is no file."""
    stamps = []
    for part in parts:
        stamp = file_stamp(part.name)
        if stamp is None:
            return None
        shape = {"cells": len(part), "genes": part.num_genes, "counts_from": part.counts_from}
        stamps.append({**stamp, **shape, "rows": zlib.crc32(part.rows.tobytes())})
    return stamps


def file_stamp(path: str | Path) -> dict[str, Any] | None:
    """Name, size and time of a file, or of all files of a folder; None where there is none."""
    path = Path(path)
    try:
        files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
        found = [entry.stat() for entry in files]
    except (OSError, ValueError):
        return None
    newest = max((status.st_mtime_ns for status in found), default=0)
    return {"name": str(path), "size": sum(status.st_size for status in found), "mtime_ns": newest}


class CorpusFolder:
    """path: the run's folder for it; rank: 0 writes, the others wait; patience: seconds without a sign of life;
    watch: called now and then while something is made or waited for.
    """

    def __init__(self, path: Path, *, rank: int, patience: float, watch: Callable[[], None]) -> None:
        self.path = path
        self._rank = rank
        self._patience = patience
        self._watch = watch
        self._last_sign = 0.0

    def found(self, name: str, key: dict[str, Any] | None) -> dict[str, Any] | None:
        """Facts about the file ``name`` if it was made from this key (None: from any) and is whole."""
        try:
            described = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
            same = key is None or described["key"] == json.loads(json.dumps(key))
            whole = same and described["crc32"] == _crc32(self.path / name)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return described["facts"] if whole else None

    def made(
        self,
        name: str,
        key: dict[str, Any] | None,
        make: Callable[[], tuple[dict[str, Any], Callable[[Path], None]]],
    ) -> dict[str, Any] | None:
        """Facts about ``name``: found, waited for, or made here, by whoever is to make it.

        make: gives the facts and a function that writes the file. None where nothing is kept: then the caller has what
        ``make`` left with it.
        """
        if key is None:
            make()
            return None
        facts = self.found(name, key)
        if facts is None and self._rank:
            return self._wait(name, key)
        if facts is None:
            with storage_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            facts, write = make()
            self._write(name, key, facts, write)
            (self.path / _SIGN_OF_LIFE).unlink(missing_ok=True)
        return facts

    def sign(self) -> None:
        """Still at work."""
        self._watch()
        now = time.monotonic()
        if now - self._last_sign >= _SIGN_SECONDS and self.path.is_dir():
            self._last_sign = now
            with storage_errors(self.path / _SIGN_OF_LIFE):
                (self.path / _SIGN_OF_LIFE).write_text(str(time.time_ns()), encoding="utf-8")

    def _write(
        self, name: str, key: dict[str, Any], facts: dict[str, Any], write: Callable[[Path], None]
    ) -> None:
        described = self.path / f"{name}.json"
        with storage_errors(described):
            described.unlink(missing_ok=True)
        with whole_file(self.path / name) as temporary:
            write(temporary)
            crc32 = _crc32(temporary)
        with whole_file(described) as temporary:
            text = json.dumps({"key": key, "crc32": crc32, "facts": facts}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")

    def _wait(self, name: str, key: dict[str, Any]) -> dict[str, Any]:
        last, since = self._seen(name), time.monotonic()
        while True:
            facts = self.found(name, key)
            if facts is not None:
                return facts
            if self._seen(name) != last:
                last, since = self._seen(name), time.monotonic()
            if time.monotonic() - since > self._patience:
                raise ResourceError(
                    f"rank 0 was to make it, and nothing has moved for {self._patience:g} s",
                    path=self.path / name,
                    hint="All ranks must see the same ``out`` and the same data files.",
                )
            self._watch()
            time.sleep(_POLL_SECONDS)

    def _seen(self, name: str) -> list[dict[str, Any] | None]:
        """What moves while rank 0 is at work, by its own clock."""
        return [file_stamp(self.path / one) for one in (_SIGN_OF_LIFE, name, f"{name}.json")]


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as stream:
        while piece := stream.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc
