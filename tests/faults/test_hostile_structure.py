"""Fault rows 19 to 21, 27, 28 and 31: pointers, indices and shapes drawn at random or beyond 32 and 64 bits, and
HDF5 objects that point elsewhere.

What is sound must come out right and what is not must be refused by name, whichever way the file is read.
"""

from __future__ import annotations

import os
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from counts_files import dense, poisson_matrix, read_everything, write_arrays, write_matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_child import run_child

from scfm import _native
from scfm.data.csr import gather_rows
from scfm.data.read import read
from scfm.errors import FormatError, ScfmError, ScfmWarning, UnsafeFileError

NUM_CELLS, NUM_GENES = 9, 6
SPARE_MEMORY = 1 << 29
# The reader fixture only sets an environment variable, which holds for all examples.
EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --- row 19: row pointers ---


@st.composite
def pointers(draw: st.DrawFn) -> np.ndarray:
    """Pointers of nine rows with 20 values, often with something wrong."""
    cuts = sorted(draw(st.lists(st.integers(0, 20), min_size=NUM_CELLS - 1, max_size=NUM_CELLS - 1)))
    indptr = [0, *cuts, 20]
    wild = st.one_of(
        st.integers(-3, 24), st.sampled_from([2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, -(2**63), -(2**31)])
    )
    for _ in range(draw(st.integers(0, 2))):
        indptr[draw(st.integers(0, len(indptr) - 1))] = draw(wild)
    if draw(st.integers(0, 5)) == 0:
        indptr = indptr[: draw(st.integers(0, len(indptr)))] + draw(st.lists(wild, max_size=2))
    kinds = ["i8"]
    if all(-(2**31) <= value < 2**31 for value in indptr):
        kinds.append("i4")
    if all(value >= 0 for value in indptr):
        kinds.append("u8")
    return np.array(indptr, dtype=draw(st.sampled_from(kinds)))


@given(indptr=pointers(), storage=st.sampled_from(["chunked", "gzip", "contiguous"]))
@EXAMPLES
def test_row_19_any_pointers(indptr: np.ndarray, storage: str, reader: str, tmp_path: Path) -> None:
    columns = (np.arange(20) % NUM_GENES).astype(np.int32)
    values = np.arange(1, 21, dtype=np.float32)
    path = write_arrays(
        tmp_path / "p.h5ad",
        indptr,
        columns,
        values,
        num_cells=NUM_CELLS,
        num_genes=NUM_GENES,
        storage=storage,
    )
    exact = [int(pointer) for pointer in indptr]
    lengths = np.diff(np.array(exact, dtype=object))
    sound = len(exact) == NUM_CELLS + 1 and exact[0] == 0 and exact[-1] == 20 and bool((lengths >= 0).all())
    if not sound or max(lengths) > 4 * NUM_GENES:
        with pytest.raises(FormatError, match=r"p\.h5ad: X.*(row|indptr|entries)"):
            read(path)
        return
    expected = np.zeros((NUM_CELLS, NUM_GENES))
    np.add.at(expected, (np.repeat(np.arange(NUM_CELLS), lengths.astype(int)), columns), values)
    source = read(path)
    repeated = [len(set(columns[a:b])) < b - a for a, b in pairwise(exact)]
    if any(repeated):
        with pytest.warns(ScfmWarning, match=f"{sum(repeated)} of {NUM_CELLS} cells"):
            np.testing.assert_array_equal(dense(source, 4), expected)
    else:
        np.testing.assert_array_equal(dense(source, 4), expected)


# --- row 20: column indices ---


@given(
    kind=st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", ">i4", ">u2"]),
    position=st.integers(0, 10**6),
    wrong=st.sampled_from([-1, -128, 40, 127, 255, 2**31 - 1, -(2**31), 2**31, 2**32, 2**32 + 3, 2**63 - 1]),
    storage=st.sampled_from(["chunked", "gzip_shuffle", "contiguous"]),
)
@EXAMPLES
def test_row_20_any_index_out_of_range(
    kind: str, position: int, wrong: int, storage: str, reader: str, tmp_path: Path
) -> None:
    """One wrong index in any type that can hold it: the error names the row (and no type wraps around)."""
    matrix = poisson_matrix()
    position %= matrix.nnz
    columns = matrix.indices.astype(kind)
    limits = np.iinfo(kind) if np.dtype(kind).kind in "iu" else None
    if limits is not None and not limits.min <= wrong <= limits.max:
        wrong = max(limits.max, 40)
    columns[position] = wrong
    path = write_arrays(
        tmp_path / "i.h5ad", matrix.indptr, columns, matrix.data, num_cells=60, num_genes=40, storage=storage
    )
    row = int(np.searchsorted(matrix.indptr, position, side="right")) - 1
    # What int64 cannot hold is named by its position among the indices.
    with pytest.raises(FormatError, match=rf"i\.h5ad: /?X.*(row {row}: column index|at position)"):
        read_everything(str(path))
    good = np.setdiff1d(np.arange(60), [row])
    path = write_arrays(
        tmp_path / "i.h5ad",
        matrix.indptr,
        matrix.indices.astype(kind),
        matrix.data,
        num_cells=60,
        num_genes=40,
        storage=storage,
    )
    np.testing.assert_array_equal(dense(read(path).select(good), 7), matrix.toarray()[good])


# --- row 21: lengths and shapes ---


@given(data_length=st.integers(0, 30), index_length=st.integers(0, 30), shape=st.tuples(
    st.sampled_from([0, 8, 9, 10, 2**31, 2**40, 2**63 - 1, -1]), st.sampled_from([0, 5, 6, 7, 2**40, -6])
))  # fmt: skip
@EXAMPLES
def test_row_21_lengths_and_shapes(
    data_length: int, index_length: int, shape: tuple[int, int], reader: str, tmp_path: Path
) -> None:
    indptr = np.minimum(np.arange(NUM_CELLS + 1) * 2, 18)
    indptr[-1] = 20
    path = write_arrays(
        tmp_path / "s.h5ad",
        indptr,
        np.tile(np.arange(2, dtype=np.int32), 15)[:index_length],
        np.ones(data_length, np.float32),
        num_cells=NUM_CELLS,
        num_genes=NUM_GENES,
    )
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = np.array(shape)
    if data_length == index_length == 20 and shape == (NUM_CELLS, NUM_GENES):
        with pytest.warns(ScfmWarning):
            assert dense(read(path)).sum() == 20
    else:
        with pytest.raises(FormatError, match=r"s\.h5ad: .*X"):
            read_everything(str(path))


# --- row 27: more than 2^31 stored values ---


def test_row_27_positions_beyond_32_bits() -> None:
    indptr = np.array([0, 2**33, 2**33 + 3, 2**33 + 3, 2**33 + 5], dtype=np.int64)
    chosen, positions = gather_rows(indptr, np.array([3, 1], dtype=np.int64))
    assert chosen.tolist() == [0, 2, 5]
    assert positions.tolist() == [2**33 + 3, 2**33 + 4, 2**33, 2**33 + 1, 2**33 + 2]


def _huge_file(path: Path, *, storage: str) -> tuple[int, np.ndarray, np.ndarray]:
    """2^32 + 2^20 stored values: zeros, in a hole of the file or deflated to nearly nothing, but for the last two
    rows. Rows of 4,096 values over 2,048 genes; the zeros' cells list gene 0 again and again.
    """
    num_genes, per_row, chunk = 2048, 4096, 2**22
    num_cells = 2**20 + 2**8
    num_values = num_cells * per_row
    assert num_values > 2**32
    columns = np.tile(np.arange(num_genes, dtype=np.uint16), 4)
    values = (np.arange(2 * per_row) % 200 + 1).astype(np.uint8)
    options = {"contiguous": {}, "gzip": {"chunks": (chunk,), "compression": "gzip"}}[storage]
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", [num_cells, num_genes]
        group["indptr"] = np.arange(0, num_values + 1, per_row, dtype=np.int64)
        for name, tail in (("data", values), ("indices", columns)):
            dataset = group.create_dataset(name, shape=(num_values,), dtype=tail.dtype, **options)
            if storage == "gzip":
                zeros = zlib.compress(bytes(chunk * tail.itemsize), 1)
                for start in range(0, num_values - chunk, chunk):
                    dataset.id.write_direct_chunk((start,), zeros)
            dataset[num_values - len(tail) :] = tail
        for place, length in (("obs", num_cells), ("var", num_genes)):
            table = file.create_group(place)
            table.attrs["_index"], table.attrs["column-order"] = "_index", np.array([], dtype="S1")
            table.create_dataset("_index", shape=(length,), dtype="S1")
    expected = np.zeros((2, num_genes))
    np.add.at(expected, (np.repeat([0, 1], per_row), columns), values)
    return num_cells, np.array([num_cells - 2, num_cells - 1]), expected


@pytest.mark.filterwarnings("ignore::scfm.errors.ScfmWarning")
@pytest.mark.parametrize("storage", ["contiguous", "gzip"])
def test_row_27_rows_behind_2_32_stored_values(storage: str, reader: str, tmp_path: Path) -> None:
    path = tmp_path / "huge.h5ad"
    num_cells, last, expected = _huge_file(path, storage=storage)
    assert path.stat().st_blocks * 512 < 100 << 20
    source = read(path)
    assert len(source) == num_cells
    np.testing.assert_array_equal(dense(source.select(last[[1, 0, 1]])), expected[[1, 0, 1]])
    # Rows astride 2^31 values are zeros, not the values from 2^31 positions further on.
    middle = dense(source.select([2**31 // 4096 - 1, 2**31 // 4096, 2**32 // 4096]))
    assert middle.shape == (3, 2048) and not middle.any()


def test_row_27_a_chunk_that_was_never_written_is_no_row_of_zeros(reader: str, tmp_path: Path) -> None:
    matrix = poisson_matrix()
    path = write_matrix(tmp_path / "hole.h5ad", matrix, chunk=101)
    with h5py.File(path, "r+") as file:
        values = file["X/data"][()]
        del file["X/data"]
        data = file["X"].create_dataset("data", shape=values.shape, chunks=(101,), dtype="f4")
        data[:303], data[404:] = values[:303], values[404:]
    with pytest.raises(FormatError, match=r"hole\.h5ad: /?X/data.*never written"):
        read_everything(str(path))


# --- row 28: products beyond 2^31 and 2^63 ---


def test_row_28_many_genes(reader: str, tmp_path: Path) -> None:
    """cells x genes far beyond 2^63 is only a shape: what matters is what is stored."""
    path = tmp_path / "wide.h5ad"
    num_genes = 2**61
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", [30, num_genes]
        group["indptr"] = np.arange(31, dtype=np.int64)
        group["indices"] = np.arange(30, dtype=np.int64) * (2**55) + 2**33
        group["data"] = np.arange(1, 31, dtype=np.int32)
        for place, length in (("obs", 30), ("var", num_genes)):
            table = file.create_group(place)
            table.attrs["_index"], table.attrs["column-order"] = "_index", np.array([], dtype="S1")
            table.create_dataset("_index", shape=(length,), dtype="S1", chunks=(16,))
    block = next(read(path).blocks())
    assert block.num_genes == num_genes
    assert block.indices.tolist() == [i * 2**55 + 2**33 for i in range(30)]
    assert block.data.tolist() == list(range(1, 31))


def _dense_giant(path: str, shape: tuple[int, int]) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("X", shape=shape, chunks=(16, 16), dtype="f8")
        for place, length in (("obs", shape[0]), ("var", shape[1])):
            table = file.create_group(place)
            table.attrs["_index"], table.attrs["column-order"] = "_index", np.array([], dtype="S1")
            table.create_dataset("_index", shape=(length,), dtype="S1", chunks=(16,))


def _first_block(path: str) -> tuple[int, int]:
    block = next(read(path).blocks(block_size=2))
    return block.num_cells, len(block.data)


@pytest.mark.parametrize("shape", [(2**16, 2**16), (2**33, 40), (40, 2**33), (2**33, 2**33)], ids=str)
def test_row_28_dense_of_any_shape(shape: tuple[int, int], tmp_path: Path) -> None:
    path = str(tmp_path / "giant.h5ad")
    try:
        _dense_giant(path, shape)
    except (OSError, ValueError):
        pytest.skip("HDF5 itself refuses to make this")
    outcome = run_child(_first_block, path, memory=SPARE_MEMORY)
    assert outcome.kind == "ok" or outcome.raised("ScfmError"), outcome
    if outcome.kind == "ok":
        assert outcome.value == (2, 0)


@pytest.mark.parametrize("num_genes", [2**31, 2**32 + 1, 2**62, 2**63 - 1])
def test_row_28_native_check_of_many_genes(num_genes: int) -> None:
    columns = np.array([0, num_genes - 1], dtype=np.int64)
    pointers = np.array([0, 2], dtype=np.int64)
    values = np.ones(2, np.float32)
    assert _native.check_csr(pointers, columns, values, num_genes).error == ""
    if num_genes < 2**63 - 1:
        assert _native.check_csr(pointers, columns + 1, values, num_genes).error == "index_range"


# --- row 31: what points outside, or at nothing ---


def _object_references(file: h5py.File) -> None:
    target = file["X/indices"].ref
    count = file["X/data"].shape[0]
    del file["X/data"]
    file.create_dataset("X/data", data=[target] * count, dtype=h5py.ref_dtype)


def _region_references(file: h5py.File) -> None:
    target = file["X/indices"].regionref[0:2]
    count = file["X/indptr"].shape[0]
    del file["X/indptr"]
    file.create_dataset("X/indptr", data=[target] * count, dtype=h5py.regionref_dtype)


def _named_type_for_x(file: h5py.File) -> None:
    del file["X"]
    file["X"] = np.dtype("f4")


def _virtual_indices(file: h5py.File) -> None:
    _virtual(file, "X/indices", "i4")


def _virtual_pointers(file: h5py.File) -> None:
    _virtual(file, "X/indptr", "i4")


def _virtual(file: h5py.File, place: str, kind: str) -> None:
    shape = file[place].shape
    layout = h5py.VirtualLayout(shape=shape, dtype=kind)
    layout[:] = h5py.VirtualSource("nowhere.h5", "data", shape=shape)
    del file[place]
    file.create_virtual_dataset(place, layout)


def _external(file: h5py.File, place: str, kind: str) -> None:
    shape = file[place].shape
    del file[place]
    size = shape[0] * np.dtype(kind).itemsize
    file.create_dataset(place, shape=shape, dtype=kind, external=[("/etc/hostname", 0, size)])


def _external_indices(file: h5py.File) -> None:
    _external(file, "X/indices", "i4")


def _external_pointers(file: h5py.File) -> None:
    _external(file, "X/indptr", "i4")


def _external_names(file: h5py.File) -> None:
    _external(file, "var/_index", "S1")


def _external_in_layers(file: h5py.File) -> None:
    file["layers/counts"] = h5py.ExternalLink("elsewhere.h5", "/X")


def _external_in_raw(file: h5py.File) -> None:
    file["raw"] = h5py.ExternalLink("elsewhere.h5", "/raw")


OUTSIDE: dict[str, tuple[Any, type[ScfmError]]] = {
    "object references": (_object_references, FormatError),
    "region references": (_region_references, FormatError),
    "named type": (_named_type_for_x, FormatError),
    "virtual indices": (_virtual_indices, UnsafeFileError),
    "virtual pointers": (_virtual_pointers, UnsafeFileError),
    "external indices": (_external_indices, UnsafeFileError),
    "external pointers": (_external_pointers, UnsafeFileError),
    "external names": (_external_names, UnsafeFileError),
    "external layer": (_external_in_layers, UnsafeFileError),
    "external raw": (_external_in_raw, UnsafeFileError),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_row_31_outside(name: str, reader: str, tmp_path: Path) -> None:
    change, error = OUTSIDE[name]
    path = write_matrix(tmp_path / "outside.h5ad", poisson_matrix())
    with h5py.File(path, "r+") as file:
        change(file)
    outcome = run_child(read_everything, str(path), memory=SPARE_MEMORY)
    assert outcome.raised(error.__name__), outcome
    assert "outside.h5ad" in outcome.message


def test_row_31_a_link_to_the_file_itself_by_path(reader: str, tmp_path: Path) -> None:
    """An external link is refused even where it leads back: what it finds depends on the current folder."""
    path = write_matrix(tmp_path / "self.h5ad", poisson_matrix())
    with h5py.File(path, "r+") as file:
        file.move("X", "kept")
        file["X"] = h5py.ExternalLink(os.fspath(path), "/kept")
    with pytest.raises(UnsafeFileError, match="another file"):
        read(path)


def test_row_31_a_symbolic_link_to_a_file_is_an_ordinary_file(reader: str, tmp_path: Path) -> None:
    write_matrix(tmp_path / "kept.h5ad", poisson_matrix())
    (tmp_path / "link.h5ad").symlink_to("kept.h5ad")
    np.testing.assert_array_equal(read_everything(str(tmp_path / "link.h5ad")), poisson_matrix().toarray())
