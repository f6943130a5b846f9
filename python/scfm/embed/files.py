"""Writing embeddings: a .npy with its provenance, or a copy of the .h5ad with obsm. Whole files or none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata.io import write_elem

from scfm.errors import InvalidArgumentError, MissingFileError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place, synced, only when the block ends well."""
    if not path.parent.is_dir():
        raise MissingFileError("the folder to write to does not exist", path=path.parent)
    if path.is_dir():
        raise InvalidArgumentError("is a folder; expected a file name", path=path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_npy(path: Path, embedding: np.ndarray, facts: dict[str, Any]) -> None:
    """``path`` (.npy) and ``path``.json with the provenance."""
    with whole_file(path.with_name(path.name + ".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, embedding, allow_pickle=False)


def write_h5ad_copy(source: Path, path: Path, embedding: np.ndarray, key: str, facts: dict[str, Any]) -> None:
    """A copy of ``source`` with ``obsm[key]`` and ``uns["scfm"][key]``; the source stays as it is."""
    if path.exists() and path.samefile(source):
        raise InvalidArgumentError("is the input itself", path=path, hint="Write to another file.")
    with whole_file(path) as temporary:
        shutil.copyfile(source, temporary)
        with h5py.File(temporary, "r+") as file:
            obsm = file.require_group("obsm")
            _ensure_mapping(obsm)
            if key in obsm:
                del obsm[key]
            write_elem(obsm, key, embedding)
            uns = file.require_group("uns")
            _ensure_mapping(uns)
            scfm_group = uns.require_group("scfm")
            _ensure_mapping(scfm_group)
            if key in scfm_group:
                del scfm_group[key]
            write_elem(scfm_group, key, facts)


def _ensure_mapping(group: h5py.Group) -> None:
    """A group that anndata reads as a mapping, also when this call made it."""
    group.attrs.setdefault("encoding-type", "dict")
    group.attrs.setdefault("encoding-version", "0.1.0")
