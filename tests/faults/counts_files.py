"""Small .h5ad files written by hand, stored in every way HDF5 offers, and how tests read them back.

anndata writes slowly and only in its own way; a fault test needs many files a second, chunks of odd lengths,
filters, contiguous storage, and pointers that do not fit.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy import sparse

from scfm.data.read import read
from scfm.data.source import CellSource

# Filters as h5py names them; zstd and blosc need hdf5plugin.
STORAGES: dict[str, dict[str, Any]] = {
    "contiguous": {"chunks": None},
    "chunked": {},
    "gzip": {"compression": "gzip"},
    "gzip_shuffle": {"compression": "gzip", "shuffle": True},
    "lzf": {"compression": "lzf"},
    "lzf_shuffle": {"compression": "lzf", "shuffle": True},
    "fletcher32": {"fletcher32": True},
    "gzip_fletcher32": {"compression": "gzip", "fletcher32": True},
    "zstd": {"plugin": "Zstd"},
    "blosc": {"plugin": "Blosc"},
}
COMPRESSED = [name for name, options in STORAGES.items() if {"compression", "plugin"} & set(options)]


def storage_options(storage: str, chunk: int) -> dict[str, Any]:
    """Arguments of create_dataset; skips the test where a filter is not to be had."""
    options = {"chunks": (chunk,), **STORAGES[storage]}
    plugin = options.pop("plugin", None)
    if plugin is not None:
        hdf5plugin = pytest.importorskip("hdf5plugin", reason="hdf5plugin (zstd, blosc) is not installed")
        options.update(getattr(hdf5plugin, plugin)())
    return options


def import_plugins() -> None:
    """For h5py to read zstd and blosc."""
    if importlib.util.find_spec("hdf5plugin"):
        import hdf5plugin  # noqa: F401


def write_arrays(
    path: Path,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    *,
    num_cells: int,
    num_genes: int,
    storage: str = "gzip",
    chunk: int = 7,
    genes: list[str] | None = None,
    encoding: str = "csr_matrix",
) -> Path:
    """The arrays as they are, right or wrong, under X of an .h5ad file with tables of the given lengths."""
    options = storage_options(storage, chunk)
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["encoding-version"] = encoding, "0.1.0"
        group.attrs["shape"] = np.array([num_cells, num_genes])
        group.create_dataset("indptr", data=indptr)
        # HDF5 has no chunks for nothing.
        group.create_dataset("indices", data=indices, maxshape=_maxshape(options), **options)
        group.create_dataset("data", data=data, maxshape=_maxshape(options), **options)
        names = {"obs": [f"cell{i}" for i in range(num_cells)]}
        names["var"] = genes or [f"GENE{i}" for i in range(num_genes)]
        for place, index in names.items():
            table = file.create_group(place)
            table.attrs["encoding-type"], table.attrs["encoding-version"] = "dataframe", "0.2.0"
            table.attrs["_index"], table.attrs["column-order"] = "_index", np.array([], dtype="S1")
            column = table.create_dataset(
                "_index", data=index, dtype=h5py.string_dtype(), shape=(len(index),)
            )
            column.attrs["encoding-type"], column.attrs["encoding-version"] = "string-array", "0.2.0"
    return path


def _maxshape(options: dict[str, Any]) -> tuple[None] | None:
    return (None,) if options.get("chunks") else None


def write_matrix(path: Path, matrix: sparse.csr_matrix, **options: Any) -> Path:
    num_cells, num_genes = matrix.shape
    return write_arrays(
        path, matrix.indptr, matrix.indices, matrix.data, num_cells=num_cells, num_genes=num_genes, **options
    )


def poisson_matrix(num_cells: int = 60, num_genes: int = 40, *, seed: int = 0) -> sparse.csr_matrix:
    """Float32 counts; cell 0 and every tenth are empty."""
    counts = np.random.default_rng(seed).poisson(0.8, (num_cells, num_genes)).astype(np.float32)
    counts[::10] = 0
    return sparse.csr_matrix(counts)


def dense(source: CellSource, block_size: int = 4096) -> np.ndarray:
    """All counts of the source, cells x genes, in its order."""
    counts = np.zeros((len(source), source.num_genes))
    for block in source.blocks(block_size):
        rows = block.row_start + np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
        np.add.at(counts, (rows, block.indices), block.data)
    return counts


def read_everything(path: str, layer: str | None = None, block_size: int = 5) -> np.ndarray:
    """Counts as a dense array; the tables are read too. For children: a module-level function."""
    import_plugins()
    source = read(path, layer=layer)
    assert len(source.obs) == len(source)
    assert len(source.genes) == source.num_genes
    return dense(source, block_size)


def read_and_sum(path: str) -> float:
    return float(read_everything(path, block_size=300).sum())


def read_plainly(path: str) -> np.ndarray | None:
    """What h5py itself says X holds: the oracle for damage that no check can see. None where it cannot be read."""
    import_plugins()
    try:
        with h5py.File(path) as file:
            group = file["X"]
            shape = tuple(int(n) for n in group.attrs["shape"])
            parts = tuple(group[name][()] for name in ("data", "indices", "indptr"))
        counts = np.zeros(shape)
        rows = np.repeat(np.arange(shape[0]), np.diff(parts[2]))
        np.add.at(counts, (rows, parts[1]), parts[0])
    except Exception:
        return None
    return counts
