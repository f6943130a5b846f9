"""The same matrix read from every format gives the same checked blocks, whatever its type and shape."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.io import mmwrite

from scfm.data.read import read
from scfm.data.source import CellSource


def as_anndata(counts: sparse.csr_matrix, kind: str) -> anndata.AnnData:
    values = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[kind]
    num_cells, num_genes = counts.shape
    return anndata.AnnData(
        values,
        obs=pd.DataFrame(index=[f"c{i}" for i in range(num_cells)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(num_genes)]),
    )


def write_h5ad(kind: str) -> Callable[[sparse.csr_matrix, Path], Path]:
    def write(counts: sparse.csr_matrix, folder: Path) -> Path:
        as_anndata(counts, kind).write_h5ad(folder / "a.h5ad", compression="gzip")
        return folder / "a.h5ad"

    return write


def write_zarr(
    kind: str, version: int, *, sharded: bool = False, zipped: bool = False
) -> Callable[[sparse.csr_matrix, Path], Path]:
    def write(counts: sparse.csr_matrix, folder: Path) -> Path:
        path = folder / ("a.zarr.zip" if zipped else "a.zarr")
        store = zarr.storage.ZipStore(path, mode="w") if zipped else zarr.storage.LocalStore(path)
        with (
            warnings.catch_warnings(),
            # Chunks of nothing but zeros must be there: see test_zarr_faults.
            zarr.config.set({"array.write_empty_chunks": True}),
            anndata.settings.override(zarr_write_format=version, auto_shard_zarr_v3=sharded),
        ):
            warnings.simplefilter("ignore")
            as_anndata(counts, kind).write_zarr(store)
        store.close()
        return path

    return write


def write_tenx(version: int) -> Callable[[sparse.csr_matrix, Path], Path]:
    def write(counts: sparse.csr_matrix, folder: Path) -> Path:
        num_cells, num_genes = counts.shape
        with h5py.File(folder / "a.h5", "w") as file:
            group = file.create_group("matrix" if version == 3 else "GRCh38")
            names = np.array([f"g{i}".encode() for i in range(num_genes)], dtype="S8")
            if version == 3:
                group["features/id"] = group["features/name"] = names
                group["features/feature_type"] = np.full(num_genes, b"Gene Expression", dtype="S15")
                group["features/genome"] = np.full(num_genes, b"GRCh38", dtype="S6")
            else:
                group["genes"] = group["gene_names"] = names
            group["barcodes"] = np.array([f"c{i}".encode() for i in range(num_cells)], dtype="S8")
            group["shape"] = np.array([num_genes, num_cells], dtype=np.int32)
            options = {"chunks": (5,), "maxshape": (None,), "compression": "gzip", "shuffle": True}
            group.create_dataset("data", data=counts.data, **options)
            group.create_dataset("indices", data=counts.indices.astype(np.int64), **options)
            group["indptr"] = counts.indptr.astype(np.int64)
        return folder / "a.h5"

    return write


def write_mtx(counts: sparse.csr_matrix, folder: Path) -> Path:
    num_cells, num_genes = counts.shape
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        mmwrite(file, counts.T.tocoo(), symmetry="general")
    features = "".join(f"g{i}\ts{i}\tGene Expression\n" for i in range(num_genes))
    (folder / "features.tsv.gz").write_bytes(gzip.compress(features.encode()))
    (folder / "barcodes.tsv").write_text("".join(f"c{i}\n" for i in range(num_cells)))
    return folder


def write_loom(counts: sparse.csr_matrix, folder: Path) -> Path:
    with h5py.File(folder / "a.loom", "w") as file:
        file["matrix"] = counts.T.toarray()
        file["row_attrs/Gene"] = np.array([f"g{i}".encode() for i in range(counts.shape[1])], dtype="S8")
        file["col_attrs/CellID"] = np.array([f"c{i}".encode() for i in range(counts.shape[0])], dtype="S8")
    return folder / "a.loom"


WRITERS: dict[str, Callable[[sparse.csr_matrix, Path], Path]] = {
    "h5ad csr": write_h5ad("csr"),
    "h5ad csc": write_h5ad("csc"),
    "h5ad dense": write_h5ad("dense"),
    "zarr 2 csr": write_zarr("csr", 2),
    "zarr 2 csc": write_zarr("csc", 2),
    "zarr 2 dense": write_zarr("dense", 2),
    "zarr 3 csr": write_zarr("csr", 3),
    "zarr 3 csr sharded": write_zarr("csr", 3, sharded=True),
    "zarr 3 dense sharded": write_zarr("dense", 3, sharded=True),
    "zarr 3 csr zip": write_zarr("csr", 3, zipped=True),
    "zarr 2 csr zip": write_zarr("csr", 2, zipped=True),
    "10x h5 3": write_tenx(3),
    "10x h5 2": write_tenx(2),
    "10x mtx": write_mtx,
    "loom": write_loom,
}
ALL_TYPES = ("h5ad csr", "zarr 2 csr", "zarr 3 csr sharded", "zarr 2 csr zip", "10x h5 3", "10x mtx", "loom")
DTYPES = ["f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


def assert_reads_as(source: CellSource, counts: sparse.csr_matrix) -> None:
    """Rows with ascending columns and the values, block by block; the tables name cells and genes."""
    expected = counts.sorted_indices()
    assert (source.num_cells, source.num_genes) == counts.shape
    assert source.reader
    row = 0
    for block in source.blocks(3):
        stop = row + block.num_cells
        start = expected.indptr[row]
        np.testing.assert_array_equal(block.indptr, expected.indptr[row : stop + 1] - start)
        np.testing.assert_array_equal(block.indices, expected.indices[start : expected.indptr[stop]])
        np.testing.assert_array_equal(block.data, expected.data[start : expected.indptr[stop]])
        row = stop
    assert row == counts.shape[0]
    assert source.genes.index.tolist() == [f"g{i}" for i in range(counts.shape[1])]
    assert source.obs.index.tolist() == [f"c{i}" for i in range(counts.shape[0])]


def example(dtype: str, seed: int = 0) -> sparse.csr_matrix:
    """Eleven cells of which two are empty, columns in no order."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 100, (11, 6)) * (rng.random((11, 6)) < 0.5)
    dense[[0, 7]] = 0
    dense[3] = np.arange(1, 7)
    counts = sparse.csr_matrix(dense.astype(dtype))
    for start, stop in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        order = rng.permutation(stop - start) + start
        counts.indices[start:stop] = counts.indices[order]
        counts.data[start:stop] = counts.data[order]
    counts.has_sorted_indices = False
    return counts


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in WRITERS for dtype in (DTYPES if name in ALL_TYPES else DTYPES[:1])],
)
def test_types(name: str, dtype: str, tmp_path: Path) -> None:
    counts = example(dtype)
    source = read(WRITERS[name](counts, tmp_path))
    assert_reads_as(source, counts)
    order = [10, 0, 3, 3, 9, 1]
    parts = list(source.select(order).blocks(4))
    values = np.concatenate([np.add.reduceat(np.append(b.data, 0), b.indptr[:-1]) for b in parts])
    lengths = np.concatenate([np.diff(block.indptr) for block in parts])
    np.testing.assert_array_equal(lengths, np.diff(counts.indptr)[order])
    sums = counts.toarray().astype(np.float64).sum(1)[order]
    np.testing.assert_array_equal(values[lengths > 0], sums[lengths > 0])


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (4, 1), (5, 3)], ids=str)
def test_shapes(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """No cells, one gene, no values at all."""
    counts = sparse.csr_matrix(np.arange(shape[0] * shape[1]).reshape(shape).astype(np.float32))
    assert_reads_as(read(WRITERS[name](counts, tmp_path)), counts)
    empty = sparse.csr_matrix(shape, dtype=np.float32)
    (tmp_path / "empty").mkdir()
    assert_reads_as(read(WRITERS[name](empty, tmp_path / "empty")), empty)


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_matrix(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = data.draw(st.tuples(st.integers(0, 9), st.integers(1, 7)))
    values = data.draw(
        st.lists(
            st.sampled_from([0, 0, 0, 1, 2, 300]), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
        )
    )
    counts = sparse.csr_matrix(np.array(values, dtype=np.float32).reshape(shape))
    name = data.draw(st.sampled_from(sorted(WRITERS)))
    assert_reads_as(read(WRITERS[name](counts, tmp_path_factory.mktemp("any"))), counts)
