"""Writing embeddings: a .npy with its provenance, or a copy of the .h5ad with obsm. Whole files or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from anndata.io import write_elem

from scfm.data.atomic_file import whole_file
from scfm.data.h5_file import Hdf5File, locate
from scfm.errors import FormatError, InvalidArgumentError, ScfmError, UnsafeFileError


def write_npy(path: Path, embedding: np.ndarray, facts: dict[str, Any]) -> None:
    """``path`` (.npy) and ``path``.json with the provenance."""
    description = _description_of(path)
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, embedding, allow_pickle=False)
    _describe(description, facts)


# Numbers too large for memory: their shape, their dtype, and who fills the dataset (or array on disk).
Filled = tuple[tuple[int, ...], np.dtype[Any], Callable[[Any], None]]


def write_npy_as_filled(path: Path, filled: Filled, facts: Callable[[], dict[str, Any]]) -> None:
    """As ``write_npy``, of an array on disk that ``filled`` writes into; ``facts`` is asked afterwards."""
    shape, dtype, fill = filled
    description = _description_of(path)
    with whole_file(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        fill(array)
        array.flush()
        del array
    _describe(description, facts())


def _description_of(path: Path) -> Path:
    """Where the provenance of ``path`` goes. An old one must never stand beside new numbers."""
    description = path.with_name(path.name + ".json")
    description.unlink(missing_ok=True)
    return description


def _describe(description: Path, facts: dict[str, Any]) -> None:
    with whole_file(description) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def write_h5ad_copy(
    source: Path,
    path: Path,
    embedding: np.ndarray | Filled,
    key: str,
    facts: dict[str, Any] | Callable[[], dict[str, Any]],
    *,
    room: Literal["obsm", "layers"] = "obsm",
) -> None:
    """A copy of ``source`` with ``obsm[key]`` (or a layer) and ``uns["scfm"][key]``; the source stays as it is.

    facts: the provenance, or who tells it once everything is written.
    """
    check_h5ad_copy(source, path)
    with whole_file(path) as temporary:
        shutil.copyfile(source, temporary)
        with h5py.File(temporary, "r+") as file:
            group = _mapping(file, room, source)
            if isinstance(embedding, np.ndarray):
                _write_into(group, key, embedding)
            else:
                _fill_into(group, key, *embedding)
            _write_into(
                _mapping(_mapping(file, "uns", source), "scfm", source),
                key,
                facts() if callable(facts) else facts,
            )


def _fill_into(
    group: h5py.Group,
    key: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    fill: Callable[[h5py.Dataset], None],
) -> None:
    if key in group:
        del group[key]
    dataset = group.create_dataset(key, shape=shape, dtype=dtype)
    dataset.attrs["encoding-type"] = "array"
    dataset.attrs["encoding-version"] = "0.2.0"
    fill(dataset)


def check_h5ad_copy(source: Path, path: Path) -> None:
    """Raise now what write_h5ad_copy would raise after hours of embedding."""
    if path.exists() and path.samefile(source):
        raise InvalidArgumentError("is the input itself", path=path, hint="Write to another file.")
    if path.exists() and not _is_copy_of_ours(path):
        raise InvalidArgumentError(
            "exists already and holds no embedding of scfm: it may be somebody's counts",
            path=path,
            hint="Remove it first, or write to another file.",
        )
    with Hdf5File(source).opened() as file:
        for place in ("obsm", "uns", "uns/scfm"):
            node = locate(file, place, path=str(source))
            if not isinstance(node, h5py.Group | None):
                raise FormatError(
                    "is a table of an anndata older than 0.7, beside which nothing can be written",
                    path=source,
                    where=place,
                    hint="Write the embedding to .npy, or rewrite the file: anndata.read_h5ad(...).write_h5ad(...).",
                )


def _is_copy_of_ours(path: Path) -> bool:
    try:
        with Hdf5File(path).opened() as file:
            return locate(file, "uns/scfm", path=str(path)) is not None
    except ScfmError:
        return False


def _mapping(parent: h5py.Group, name: str, source: Path) -> h5py.Group:
    """The group ``name``, of this file and no other, marked so that anndata reads it as a mapping."""
    link = parent.get(name, getlink=True)
    if link is not None and not isinstance(link, h5py.HardLink):
        raise UnsafeFileError(
            "is a link: writing there would change what it points to",
            path=source,
            where=f"{parent.name}/{name}",
        )
    group = parent.require_group(name)
    group.attrs.setdefault("encoding-type", "dict")
    group.attrs.setdefault("encoding-version", "0.1.0")
    return group


def _write_into(group: h5py.Group, key: str, value: Any) -> None:
    if key in group:
        del group[key]
    write_elem(group, key, value)
