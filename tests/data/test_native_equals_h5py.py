"""The native reader against h5py and against scipy: the same rows, whatever the file's chunks, filters and types.

The requests are any rows in any order, repeats and none at all included, in blocks of any size; empty rows lie at
the borders of chunks. Both readers are asked through scfm.read, and each must say that it was the one that read.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from anndata import AnnData
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.data.csr import CsrBlock
from scfm.data.read import read

FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "gzip": {"compression": "gzip", "compression_opts": 4},
    "gzip, shuffle": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
    "lzf": {"compression": "lzf"},
    "lzf, shuffle": {"compression": "lzf", "shuffle": True},
    "shuffle": {"shuffle": True},
    "fletcher32": {"fletcher32": True},
    "gzip, shuffle, fletcher32": {"compression": "gzip", "shuffle": True, "fletcher32": True},
}
if importlib.util.find_spec("hdf5plugin"):
    import hdf5plugin

    FILTERS["zstd"] = dict(hdf5plugin.Zstd())
    FILTERS["zstd, shuffle"] = {**hdf5plugin.Zstd(clevel=1), "shuffle": True}
    for codec in ("lz4", "zstd", "blosclz", "zlib"):
        for shuffle in (0, 1, 2):
            FILTERS[f"blosc {codec} {shuffle}"] = dict(hdf5plugin.Blosc(cname=codec, shuffle=shuffle))

DATA_TYPES = ["f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
INDEX_TYPES = ["i4", "i8", "u1", "u2", "u4"]


def write(
    path: Path, matrix: sparse.csr_matrix, *, data_type: str, index_type: str, chunk: int | None, filters: str
) -> None:
    """X as CSR, in chunks of ``chunk`` values, or contiguous for None."""
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", list(matrix.shape)
        group["indptr"] = matrix.indptr
        layout: dict[str, Any] = {}
        if chunk is not None:
            layout = {"chunks": (chunk,), "maxshape": (None,), **FILTERS[filters]}
        group.create_dataset("data", data=matrix.data.astype(data_type), **layout)
        group.create_dataset("indices", data=matrix.indices.astype(index_type), **layout)
        for place, length in zip(("obs", "var"), matrix.shape, strict=True):
            table = file.create_group(place)
            table.attrs["_index"], table.attrs["column-order"] = "_index", np.array([], dtype="S1")
            table["_index"] = np.array([f"n{i}" for i in range(length)], dtype="S12")


def blocks_of(path: Path, rows: Any, block_size: int, reader: str) -> list[CsrBlock]:
    with pytest.MonkeyPatch.context() as environment:
        if reader == "native":
            environment.delenv("SCFM_READER", raising=False)
        else:
            environment.setenv("SCFM_READER", reader)
        source = read(path)
        assert source.reader.startswith(reader), source.reader
        return list((source if rows is None else source.select(rows)).blocks(block_size))


def assert_alike(path: Path, matrix: sparse.csr_matrix, rows: Any, block_size: int) -> None:
    native, plain = (blocks_of(path, rows, block_size, reader) for reader in ("native", "h5py"))
    wanted = np.arange(matrix.shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
    assert len(native) == len(plain) == -(-len(wanted) // block_size)
    for number, (block, twin) in enumerate(zip(native, plain, strict=True)):
        start = number * block_size
        chosen = wanted[start : start + block_size]
        expected = matrix[chosen]
        assert block.row_start == twin.row_start == start
        assert block.num_genes == twin.num_genes == matrix.shape[1]
        for found in (block, twin):
            assert found.indptr.dtype == np.int64
            assert found.indices.dtype in (np.int32, np.int64)
            np.testing.assert_array_equal(found.rows, chosen)
            np.testing.assert_array_equal(found.indptr, expected.indptr)
            np.testing.assert_array_equal(found.indices, expected.indices)
            np.testing.assert_array_equal(found.data, expected.data)
        assert block.data.dtype == twin.data.dtype
        assert block.data.flags.c_contiguous and block.indices.flags.c_contiguous


def matrix_of(lengths: list[int], num_genes: int, seed: int) -> sparse.csr_matrix:
    """Rows with these numbers of distinct ascending columns; values 1 to 100, which every type holds."""
    rng = np.random.default_rng(seed)
    columns = [np.sort(rng.choice(num_genes, length, replace=False)) for length in lengths]
    indices = np.concatenate([*columns, np.empty(0, np.int64)]).astype(np.int32)
    values = rng.integers(1, 101, len(indices)).astype(np.float32)
    return sparse.csr_matrix(
        (values, indices, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
        shape=(len(lengths), num_genes),
    )


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    num_genes = draw(st.sampled_from([1, 3, 40, 200, 256]))
    one = st.integers(0, min(num_genes, 60))
    lengths = draw(st.lists(st.one_of(st.just(0), one), max_size=40))
    num_cells = len(lengths)
    row = st.integers(0, max(num_cells - 1, 0))
    rows = st.one_of(
        st.none(),
        st.just([]),
        st.lists(row, max_size=60) if num_cells else st.just([]),
        st.permutations(range(num_cells)),
        st.tuples(row, row).map(lambda ends: list(range(min(ends), min(max(ends) + 1, num_cells)))),
    )
    return {
        "matrix": matrix_of(lengths, num_genes, draw(st.integers(0, 2**32 - 1))),
        "rows": draw(rows),
        "block_size": draw(st.sampled_from([1, 2, 7, 64, 4096])),
        "chunk": draw(st.sampled_from([None, 1, 7, 31, 101, 10**4])),
        "filters": draw(st.sampled_from(sorted(FILTERS))),
        "data_type": draw(st.sampled_from(DATA_TYPES)),
        "index_type": draw(st.sampled_from(INDEX_TYPES)),
    }


EMPTY_AT_BORDERS = {
    # Chunks of 7 values end exactly where rows 1, 4 and 7 do, and empty rows follow; the last chunk is partial.
    "matrix": matrix_of([7, 0, 0, 3, 4, 0, 7, 0, 2, 0], 40, 1),
    "rows": [9, 1, 2, 0, 5, 5, 7, 8, 6, 3, 1, 9],
    "block_size": 2,
    "chunk": 7,
    "filters": "gzip",
    "data_type": "f4",
    "index_type": "i4",
}


@given(case=cases())
@example(case=EMPTY_AT_BORDERS)
@example(case={**EMPTY_AT_BORDERS, "rows": None})
@example(case={**EMPTY_AT_BORDERS, "chunk": 1, "block_size": 1})
@example(case={**EMPTY_AT_BORDERS, "matrix": matrix_of([0] * 5, 3, 0), "rows": None})
@example(case={**EMPTY_AT_BORDERS, "matrix": matrix_of([], 3, 0), "rows": None})
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_native_equals_h5py(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "case.h5ad"
    layout = {name: case[name] for name in ("chunk", "filters", "data_type", "index_type")}
    write(path, case["matrix"], **layout)
    assert_alike(path, case["matrix"], case["rows"], case["block_size"])


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("chunk", [7, 10_007])
def test_every_filter_on_thousands_of_values(filters: str, chunk: int, tmp_path: Path) -> None:
    """Chunks large enough that filters do compress, and many more chunks than threads."""
    matrix = matrix_of([37] * 400 if chunk > 7 else [37] * 60, 300, 3)
    path = tmp_path / "case.h5ad"
    write(path, matrix, data_type="f4", index_type="i4", chunk=chunk, filters=filters)
    assert_alike(path, matrix, None, 64)
    assert_alike(path, matrix, np.random.default_rng(0).permutation(matrix.shape[0]), 48)


@pytest.mark.parametrize("data_type", DATA_TYPES)
@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_extreme_values_of_every_type(data_type: str, index_type: str, tmp_path: Path) -> None:
    """The largest value and the largest column that a type holds come through unchanged."""
    kind = np.dtype(data_type)
    largest = np.iinfo(kind).max if kind.kind in "iu" else 2.0**23
    last = min(int(np.iinfo(index_type).max), 2**31 - 2)
    indptr, indices = np.array([0, 2, 2, 3]), np.array([0, last, last], dtype=index_type)
    values = np.array([1, largest, largest], dtype=kind)
    path = tmp_path / "extreme.h5ad"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", [3, last + 1]
        group["indptr"] = indptr
        group.create_dataset("data", data=values, chunks=(2,), compression="gzip", shuffle=True)
        group.create_dataset("indices", data=indices, chunks=(2,), compression="gzip", shuffle=True)
        for place, length in (("obs", 3), ("var", last + 1)):
            table = file.create_group(place)
            table.attrs["_index"], table.attrs["column-order"] = "_index", np.array([], dtype="S1")
            table.create_dataset("_index", shape=(length,), dtype="S1", chunks=(3,))
    for reader in ("native", "h5py"):
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SCFM_READER", reader)
            blocks = read(path).select([2, 0, 1]).blocks(2)
            first = next(blocks)
        assert first.indices.tolist() == [last, 0, last]
        assert first.data.tolist() == [values[2], values[0], values[1]]
        assert first.data.dtype == kind


def test_chunks_without_their_filters(tmp_path: Path) -> None:
    """A filter mask says of single chunks that a filter was left out; such chunks are stored as they are."""
    matrix = matrix_of([20] * 30, 50, 4)
    path = tmp_path / "masks.h5ad"
    write(path, matrix, data_type="f4", index_type="i4", chunk=50, filters="gzip, shuffle")
    with h5py.File(path, "r+") as file:
        for name, kind in (("data", "f4"), ("indices", "i4")):
            plain = getattr(matrix, name).astype(kind)
            for number in (1, 5, 11):
                piece = plain[number * 50 : (number + 1) * 50]
                # Bit 0: no shuffle; bit 1: no gzip.
                file[f"X/{name}"].id.write_direct_chunk((number * 50,), piece.tobytes(), filter_mask=0b11)
    assert_alike(path, matrix, None, 7)
    assert_alike(path, matrix, list(range(29, -1, -1)), 4)


def test_unequal_chunks_of_data_and_indices(tmp_path: Path) -> None:
    matrix = matrix_of([11, 0, 30, 1, 0, 17] * 20, 60, 5)
    path = tmp_path / "unequal.h5ad"
    write(path, matrix, data_type="u2", index_type="u1", chunk=13, filters="lzf")
    with h5py.File(path, "r+") as file:
        del file["X/indices"]
        file["X"].create_dataset("indices", data=matrix.indices, chunks=(89,), compression="gzip")
    assert_alike(path, matrix, None, 10)
    assert_alike(path, matrix, np.random.default_rng(1).integers(0, 120, 200), 33)


@pytest.mark.parametrize("version", ["earliest", "latest", ("v110", "v110")])
def test_every_chunk_index_of_hdf5(version: Any, tmp_path: Path) -> None:
    """HDF5 keeps chunk addresses in B-trees, fixed and extensible arrays, or implicitly: all give the same."""
    matrix = matrix_of([9] * 50, 40, 6)
    path = tmp_path / "index.h5ad"
    for limit in ((None,), None, (1000,)):
        with h5py.File(path, "w", libver=version) as file:
            group = file.create_group("X")
            group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", list(matrix.shape)
            group["indptr"] = matrix.indptr
            for name in ("data", "indices"):
                values = getattr(matrix, name)
                group.create_dataset(name, data=values, chunks=(64,), maxshape=limit, compression="gzip")
            for place, length in zip(("obs", "var"), matrix.shape, strict=True):
                table = file.create_group(place)
                table.attrs["_index"], table.attrs["column-order"] = "_index", np.array([], dtype="S1")
                table["_index"] = np.array([f"n{i}" for i in range(length)], dtype="S12")
        assert_alike(path, matrix, None, 7)


def test_a_user_block_is_left_to_h5py(tmp_path: Path) -> None:
    """Addresses in HDF5 count from behind a user block: whoever reads must not forget it."""
    matrix = matrix_of([9] * 50, 40, 7)
    path, plain = tmp_path / "block.h5ad", tmp_path / "plain.h5ad"
    for filters, chunk in (("gzip", 64), ("none", None)):
        write(plain, matrix, data_type="f4", index_type="i4", chunk=chunk, filters=filters)
        with h5py.File(plain) as source, h5py.File(path, "w", userblock_size=1024) as target:
            for name in source:
                source.copy(name, target)
        source = read(path)
        assert "user block" in source.reader
        found = [block.data for block in source.blocks(7)]
        np.testing.assert_array_equal(np.concatenate(found), matrix.data)


def test_rows_out_of_order_are_sorted_by_both(tmp_path: Path) -> None:
    matrix = matrix_of([12] * 20, 40, 8)
    ragged = matrix.copy()
    for start, stop in pairwise(matrix.indptr):
        ragged.indices[start:stop] = ragged.indices[start:stop][::-1].copy()
        ragged.data[start:stop] = ragged.data[start:stop][::-1].copy()
    path = tmp_path / "ragged.h5ad"
    write(path, ragged, data_type="f4", index_type="i4", chunk=31, filters="gzip")
    assert_alike(path, matrix, None, 6)


@pytest.mark.parametrize("name", ["data", "indices"])
def test_numbers_in_some_of_their_bits_are_left_to_hdf5(name: str, tmp_path: Path) -> None:
    """HDF5 may keep a number in 12 of 16 bits, shifted by 4: its bytes are not the number."""
    path = tmp_path / "bits.h5ad"
    AnnData(sparse.csr_matrix(np.arange(12, dtype=np.int32).reshape(3, 4))).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        values = file["X"][name][:]
        del file["X"][name]
        kept = h5py.h5t.STD_U16LE.copy()
        kept.set_precision(12)
        kept.set_offset(4)
        space = h5py.h5s.create_simple(values.shape)
        stored = h5py.h5d.create(file["X"].id, name.encode(), kept, space)
        stored.write(h5py.h5s.ALL, h5py.h5s.ALL, values.astype(np.uint16))
    source = read(path)
    assert source.reader.startswith("h5py")
    (block,) = source.blocks()
    dense = sparse.csr_matrix((block.data, block.indices, block.indptr), shape=(3, 4)).toarray()
    assert (dense == np.arange(12).reshape(3, 4)).all()
