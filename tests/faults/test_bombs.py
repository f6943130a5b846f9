"""Fault row 32: small files that claim, or inflate to, far more than they should.

The child may allocate 1 GB beyond what it starts with; what must come back is a typed error, or the right
counts, and soon.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from counts_files import poisson_matrix, read_everything, write_matrix
from run_child import Outcome, run_child
from scipy import sparse

SPARE_MEMORY = 1 << 30
# Python with everything imported takes 110 to 140 MB; a bomb of 100 MB must not go off.
LARGEST = 200 << 20


def outcome_of(path: Path) -> Outcome:
    start = time.perf_counter()
    outcome = run_child(read_everything, str(path), timeout=20, memory=SPARE_MEMORY)
    assert outcome.kind in ("ok", "raised"), outcome
    assert time.perf_counter() - start < 10
    return outcome


def write_tables(file: h5py.File, num_cells: int, num_genes: int) -> None:
    for place, length in (("obs", num_cells), ("var", num_genes)):
        table = file.create_group(place)
        table.attrs["_index"], table.attrs["column-order"] = "_index", np.array([], dtype="S1")
        table.create_dataset("_index", shape=(length,), dtype="S1")


def test_row_32_terabytes_of_zeros_in_a_megabyte(reader: str, tmp_path: Path) -> None:
    """1 TB of logical values in consistent rows of 80,000 entries, a real chunk of 128 MB before them.

    Such a chunk is below the limit of size, deflates to half a megabyte, and is read for the first cells.
    """
    path = tmp_path / "bomb.h5ad"
    num_cells, per_row, chunk = 2**21, 80_000, 2**25
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", [num_cells, 20_000]
        pointers = np.arange(0, num_cells * per_row + 1, per_row, dtype=np.int64)
        group.create_dataset("indptr", data=pointers, compression="gzip", compression_opts=1, shuffle=True)
        zeros = zlib.compressobj(1)
        piece = bytes(2**20)
        stream = b"".join([zeros.compress(piece) for _ in range(chunk * 4 // 2**20)]) + zeros.flush()
        for name, kind in (("data", "f4"), ("indices", "i4")):
            dataset = group.create_dataset(
                name, shape=(num_cells * per_row,), chunks=(chunk,), dtype=kind, compression="gzip"
            )
            dataset.id.write_direct_chunk((0,), stream)
        write_tables(file, num_cells, 20_000)
    assert path.stat().st_size < 16 << 20
    outcome = outcome_of(path)
    assert outcome.raised("ScfmError"), outcome


@pytest.mark.parametrize("name", ["data", "indices"])
def test_row_32_chunk_beyond_a_gigabyte(name: str, reader: str, tmp_path: Path) -> None:
    path = write_matrix(tmp_path / "chunk.h5ad", poisson_matrix())
    with h5py.File(path, "r+") as file:
        count, kind = file[f"X/{name}"].shape, file[f"X/{name}"].dtype
        del file[f"X/{name}"]
        file["X"].create_dataset(
            name, shape=count, maxshape=(None,), chunks=(2**28 + 1,), dtype=kind, compression="gzip"
        )
    outcome = outcome_of(path)
    assert outcome.raised("FormatError") and "chunk" in outcome.message, outcome


def replace_stream(path: Path, place: str, number: int, change: Callable[[bytes], bytes]) -> None:
    """Another deflate stream in place of one gzip chunk's."""
    with h5py.File(path, "r+") as file:
        dataset = file[place]
        offset = dataset.id.get_chunk_info(number).chunk_offset
        _, stored = dataset.id.read_direct_chunk(offset)
        dataset.id.write_direct_chunk(offset, zlib.compress(change(zlib.decompress(stored)), 1))


MISFITS: dict[str, Callable[[bytes], bytes]] = {
    "one byte short": lambda content: content[:-1],
    "one value short": lambda content: content[:-4],
    "nearly nothing": lambda content: content[:4],
    "nothing": lambda content: b"",
    "one byte more": lambda content: content + b"\0",
    "twice": lambda content: content * 2,
    "a hundred megabytes more": lambda content: content + bytes(10**8),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("place", ["X/data", "X/indices"])
def test_row_32_chunk_that_inflates_to_another_size(
    place: str, misfit: str, reader: str, tmp_path: Path
) -> None:
    """Too short a stream leaves part of a chunk undefined: never read. Too long a one is at most cut off."""
    matrix = poisson_matrix()
    path = write_matrix(tmp_path / "misfit.h5ad", matrix, chunk=101)
    replace_stream(path, place, 3, MISFITS[misfit])
    outcome = outcome_of(path)
    assert outcome.peak < LARGEST
    if outcome.kind == "ok":
        assert "more" in misfit or misfit == "twice", "values that are not in the file"
        np.testing.assert_array_equal(outcome.value, matrix.toarray())
    else:
        assert outcome.raised("FormatError") or outcome.raised("ResourceError"), outcome
        assert "misfit.h5ad" in outcome.message and place in outcome.message


def columns(path: Path, matrix: sparse.csr_matrix) -> str:
    turned = matrix.tocsc()
    write_matrix(path, matrix, chunk=101)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-type"] = "csc_matrix"
        for name in ("data", "indices", "indptr"):
            del file[f"X/{name}"]
            values = getattr(turned, name)
            file["X"].create_dataset(name, data=values, chunks=(min(101, len(values)),), compression="gzip")
    return "X/data"


def pointers(path: Path, matrix: sparse.csr_matrix) -> str:
    write_matrix(path, matrix, chunk=101)
    with h5py.File(path, "r+") as file:
        del file["X/indptr"]
        file["X"].create_dataset("indptr", data=matrix.indptr, chunks=(16,), compression="gzip")
    return "X/indptr"


def rectangle(path: Path, matrix: sparse.csr_matrix) -> str:
    write_matrix(path, matrix)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=matrix.toarray(), chunks=(8, 9), compression="gzip")
        file["X"].attrs["encoding-type"], file["X"].attrs["encoding-version"] = "array", "0.2.0"
    return "X"


def table(path: Path, matrix: sparse.csr_matrix) -> str:
    write_matrix(path, matrix)
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        obs.create_dataset("n", data=np.arange(60.0), chunks=(16,), compression="gzip")
        obs["n"].attrs["encoding-type"], obs["n"].attrs["encoding-version"] = "array", "0.2.0"
        obs.attrs["column-order"] = np.array(["n"], dtype="S1")
    return "obs"


@pytest.mark.parametrize("misfit", ["nearly nothing", "a hundred megabytes more"])
@pytest.mark.parametrize("layout", [columns, pointers, rectangle, table])
def test_row_32_other_layouts(
    layout: Callable[[Path, sparse.csr_matrix], str], misfit: str, tmp_path: Path
) -> None:
    """What only h5py reads: HDF5 takes whatever lies behind a chunk that inflates short, or crashes."""
    matrix = poisson_matrix()
    place = layout(tmp_path / "misfit.h5ad", matrix)
    replace_stream(tmp_path / "misfit.h5ad", place + ("/n" if place == "obs" else ""), 1, MISFITS[misfit])
    outcome = outcome_of(tmp_path / "misfit.h5ad")
    assert outcome.peak < LARGEST
    if outcome.kind == "ok":
        assert misfit == "a hundred megabytes more", "values that are not in the file"
        np.testing.assert_array_equal(outcome.value, matrix.toarray())
    else:
        assert outcome.raised("FormatError") or outcome.raised("ResourceError"), outcome
        assert place in outcome.message


def test_row_32_large_chunk_that_inflates_short(reader: str, tmp_path: Path) -> None:
    """h5py 3.16 with HDF5 2.0 dies of this file: it reads 400 MB from a buffer of a few bytes."""
    path = tmp_path / "short.h5ad"
    num_cells, per_row = 50_000, 2000
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", [num_cells, 1000]
        pointers = np.arange(0, num_cells * per_row + 1, per_row)
        group.create_dataset("indptr", data=pointers, compression="gzip", shuffle=True)
        columns = group.create_dataset(
            "indices", shape=(10**8,), chunks=(10**7,), dtype="u2", compression="gzip"
        )
        for start in range(0, 10**8, 10**7):
            columns.id.write_direct_chunk((start,), zlib.compress(bytes(2 * 10**7), 1))
        data = group.create_dataset("data", shape=(10**8,), chunks=(10**8,), dtype="f4", compression="gzip")
        data.id.write_direct_chunk((0,), zlib.compress(np.ones(1, "f4").tobytes()))
        write_tables(file, num_cells, 1000)
    outcome = outcome_of(path)
    assert outcome.raised("FormatError") and "X/data" in outcome.message
