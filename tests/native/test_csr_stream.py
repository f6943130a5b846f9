"""The native row stream against plain slicing: any rows, any chunks, any encoding; and what it does with
files that lie, threads that fork and chunks that cannot be read."""

from __future__ import annotations

import gzip
import os
import signal
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm import _native as native
from scfm.data.codec_libraries import codec_in_use

NUM_GENES = 50


def blosc(payload: bytes, cname: str) -> bytes:
    from numcodecs import Blosc

    return bytes(Blosc(cname=cname, clevel=3, shuffle=Blosc.SHUFFLE).encode(np.frombuffer(payload, np.int32)))


def zstd(payload: bytes) -> bytes:
    from numcodecs import Zstd

    return bytes(Zstd(level=1).encode(payload))


def lz4(payload: bytes) -> bytes:
    from numcodecs import LZ4

    return bytes(LZ4().encode(payload))


def shuffled(payload: bytes, size: int) -> bytes:
    whole = len(payload) // size * size
    planes = np.frombuffer(payload[:whole], np.uint8).reshape(-1, size).T
    return planes.tobytes() + payload[whole:]


def crc32c(payload: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in payload:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return struct.pack("<I", crc ^ 0xFFFFFFFF)


ENCODINGS = {
    "plain": ((), lambda payload: payload),
    "zlib": ((("zlib", 0),), lambda payload: zlib.compress(payload)),
    "gzip": ((("gzip", 0),), lambda payload: gzip.compress(payload)),
    "shuffle zlib": ((("shuffle", 4), ("zlib", 0)), lambda payload: zlib.compress(shuffled(payload, 4))),
    "shuffle of 8": ((("shuffle", 8),), lambda payload: shuffled(payload, 8)),
    "shuffle of 3": ((("shuffle", 3),), lambda payload: shuffled(payload, 3)),
    "zstd": ((("zstd", 0),), zstd),
    "lz4": ((("lz4", 0),), lz4),
    "blosc lz4": ((("blosc", 0),), lambda payload: blosc(payload, "lz4")),
    "blosc zstd crc": (
        (("blosc", 0), ("crc32c", 0)),
        lambda payload: (lambda packed: packed + crc32c(packed))(blosc(payload, "zstd")),
    ),
    "crc before zlib": (
        (("crc32c", 0), ("zlib", 0)),
        lambda payload: zlib.compress(payload + crc32c(payload)),
    ),
}


def stored(path: Path, name: str, values: np.ndarray, chunk: int, encoding: str) -> native.StoredArray:
    """The values written chunk by chunk into a file of their own, every chunk full."""
    filters, encode = ENCODINGS[encoding]
    num_chunks = -(-len(values) // chunk)
    padded = np.zeros(num_chunks * chunk, values.dtype)
    padded[: len(values)] = values
    offsets, sizes = [], []
    with path.open("wb") as file:
        file.write(b"something else first")
        for start in range(0, len(padded), chunk):
            payload = encode(padded[start : start + chunk].tobytes())
            offsets.append(file.tell())
            sizes.append(len(payload))
            file.write(payload)
    return native.StoredArray(
        name,
        f"{values.dtype.kind}{values.dtype.itemsize}",
        len(values),
        chunk,
        [str(path)],
        None,
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        None,
        list(filters),
    )


def random_csr(num_rows: int, seed: int, data_type: str = "f4", index_type: str = "i4"):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, num_rows) * (rng.random(num_rows) < 0.8)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns = [np.sort(rng.permutation(NUM_GENES)[:length]) for length in lengths]
    indices = np.concatenate([*columns, []]).astype(index_type)
    return indptr, indices, rng.integers(0, 100, len(indices)).astype(data_type)


def rows_of(indptr, values, rows):
    pieces = [values[indptr[row] : indptr[row + 1]] for row in rows]
    return np.concatenate([*pieces, values[:0]])


def open_codecs() -> None:
    assert codec_in_use("zlib") and codec_in_use("zstd") and codec_in_use("blosc") and codec_in_use("lz4")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_encoding(tmp_path: Path, encoding: str, threads: int) -> None:
    open_codecs()
    indptr, indices, data = random_csr(300, 1)
    stream = native.CsrStream(
        stored(tmp_path / "data", "data", data, 64, encoding),
        stored(tmp_path / "indices", "indices", indices, 96, encoding),
        indptr,
        NUM_GENES,
        threads,
    )
    rng = np.random.default_rng(2)
    requests = [
        np.arange(300),
        rng.permutation(300),
        rng.integers(0, 300, 50),
        np.empty(0, int),
        np.array([299]),
    ]
    for rows in requests:
        stream.submit(rows.astype(np.int64))
    assert stream.num_waiting() == len(requests)
    for rows in requests:
        got_indptr, columns, values, facts, in_range = stream.take()
        assert in_range and facts is not None and facts.sorted and not facts.error
        np.testing.assert_array_equal(np.diff(got_indptr), np.diff(indptr)[rows])
        np.testing.assert_array_equal(columns, rows_of(indptr, indices, rows))
        np.testing.assert_array_equal(values, rows_of(indptr, data, rows))
        assert facts.num_zeros == (values == 0).sum()
        assert facts.max_value == values.max(initial=0)
    stream.close()


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    data_chunk=st.integers(1, 40),
    index_chunk=st.integers(1, 40),
    data_type=st.sampled_from(["f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]),
    index_type=st.sampled_from(["i4", "i8", "u1", "u2", "u4", "u8", "i1", "i2"]),
    encoding=st.sampled_from(["plain", "zlib"]),
)
def test_any_shape(
    tmp_path_factory, num_rows, seed, data_chunk, index_chunk, data_type, index_type, encoding
) -> None:
    folder = tmp_path_factory.mktemp("any")
    indptr, indices, data = random_csr(num_rows, seed, data_type, index_type)
    rows = np.random.default_rng(seed).integers(0, num_rows, 30)
    stream = native.CsrStream(
        stored(folder / "data", "data", data, data_chunk, encoding),
        stored(folder / "indices", "indices", indices, index_chunk, encoding),
        indptr,
        NUM_GENES,
        2,
    )
    stream.submit(rows)
    _, columns, values, facts, in_range = stream.take()
    assert in_range and facts is not None
    assert columns.dtype == np.int32 and values.dtype == data.dtype
    np.testing.assert_array_equal(columns, rows_of(indptr, indices, rows))
    np.testing.assert_array_equal(values, rows_of(indptr, data, rows))


def simple_stream(
    tmp_path: Path, indptr, indices, data, encoding="zlib", chunk=8, genes=NUM_GENES, validate=True
):
    return native.CsrStream(
        stored(tmp_path / "data", "X/data", np.asarray(data), chunk, encoding),
        stored(tmp_path / "indices", "X/indices", np.asarray(indices), chunk, encoding),
        np.asarray(indptr, np.int64),
        genes,
        2,
        validate,
    )


@pytest.mark.parametrize("encoding", ["plain", "zlib"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize(
    "change",
    [
        "falls",
        "repeats",
        "too high",
        "negative column",
        "nan",
        "negative",
        "fraction",
        "infinite",
        "minus zero",
    ],
)
def test_unsound_blocks_have_no_facts(tmp_path: Path, encoding: str, chunk: int, change: str) -> None:
    """Wherever in a row and whatever the chunks: the full check must get to see such a block."""
    indptr, indices, data = random_csr(20, 5)
    row = int(np.argmax(np.diff(indptr)))
    for at in range(indptr[row] + 1, indptr[row + 1]):
        wrong_indices, wrong_data = indices.copy(), data.copy()
        if change == "falls":
            wrong_indices[at - 1 : at + 1] = wrong_indices[at - 1 : at + 1][::-1]
        elif change == "repeats":
            wrong_indices[at] = wrong_indices[at - 1]
        elif change == "too high":
            wrong_indices[at] = NUM_GENES
        elif change == "negative column":
            wrong_indices[at] = -1
        else:
            wrong_data[at] = {
                "nan": np.nan,
                "negative": -1,
                "fraction": 0.5,
                "infinite": np.inf,
                "minus zero": -0.0,
            }[change]
        stream = simple_stream(tmp_path, indptr, wrong_indices, wrong_data, encoding, chunk)
        stream.submit(np.arange(20))
        _, columns, values, facts, _ = stream.take()
        assert facts is None
        np.testing.assert_array_equal(columns, wrong_indices)
        np.testing.assert_array_equal(values, wrong_data)


@pytest.mark.parametrize("index_type", ["i8", "u4", "u8"])
def test_columns_that_do_not_fit(tmp_path: Path, index_type: str) -> None:
    indices = np.array([1, 2**32 - 5 if index_type == "u4" else 2**32 + 1, 3], dtype=index_type)
    stream = simple_stream(tmp_path, [0, 3], indices, np.ones(3, np.float32))
    stream.submit(np.zeros(1, np.int64))
    _, columns, _, facts, in_range = stream.take()
    assert not in_range and facts is None and columns.tolist() == [1, -1, 3]


@pytest.mark.parametrize("indptr", [[0, 5, 3], [0, -1, 3], [-1, 2, 3], [0, 2, 2**62], [0, 2**63 - 1, 3]])
def test_impossible_row_pointers(tmp_path: Path, indptr: list[int]) -> None:
    stream = simple_stream(tmp_path, indptr, np.arange(3, dtype=np.int32), np.ones(3, np.float32))
    with pytest.raises(ValueError, match="row"):
        stream.submit(np.arange(2))


@pytest.mark.parametrize("row", [-1, 2, 2**62, -(2**63)])
def test_rows_out_of_range(tmp_path: Path, row: int) -> None:
    stream = simple_stream(tmp_path, [0, 1, 3], np.arange(3, dtype=np.int32), np.ones(3, np.float32))
    with pytest.raises(ValueError, match="out of range"):
        stream.submit(np.array([0, row]))
    stream.submit(np.array([1]))  # and nothing is broken by that
    assert stream.take()[1].tolist() == [1, 2]


@pytest.mark.parametrize(
    "encoding", [name for name in ENCODINGS if name not in ("plain", "shuffle of 3", "shuffle of 8")]
)
def test_damaged_chunks(tmp_path: Path, encoding: str) -> None:
    """Any byte of a compressed chunk changed: an error that names the chunk, or values of the right length."""
    open_codecs()
    indptr, indices, data = random_csr(100, 3)
    data_array = stored(tmp_path / "data", "X/data", data, 32, encoding)
    stored(tmp_path / "indices", "X/indices", indices, 32, encoding)
    original = (tmp_path / "indices").read_bytes()
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(60):
        damaged = bytearray(original)
        at = int(rng.integers(20, len(damaged)))
        damaged[at] ^= int(rng.integers(1, 256))
        array = stored(tmp_path / "indices", "X/indices", indices, 32, encoding)
        (tmp_path / "indices").write_bytes(damaged)
        stream = native.CsrStream(data_array, array, indptr, NUM_GENES, 2)
        stream.submit(np.arange(100))
        try:
            _, columns, _, _, _ = stream.take()
            assert len(columns) == len(indices)
        except native.ChunkError as error:
            failures += 1
            reason, name, chunk, path, offset, size = error.args
            assert reason and name == "X/indices" and path == str(tmp_path / "indices")
            assert offset <= at < offset + size and 0 <= chunk < 100
        stream.close()
    assert failures > 0 or encoding == "zstd" or "lz4" in encoding


def test_truncated_file_and_missing_chunk(tmp_path: Path) -> None:
    indptr, indices, data = random_csr(100, 3)
    for encoding in ("plain", "zlib"):
        stream = simple_stream(tmp_path, indptr, indices, data, encoding)
        os.truncate(tmp_path / "data", (tmp_path / "data").stat().st_size - 40)
        stream.submit(np.arange(100))
        with pytest.raises(native.ChunkError, match="ends before"):
            stream.take()
        stream.submit(np.arange(1))  # the stream itself goes on
        assert len(stream.take()[0]) == 2
    array = native.StoredArray(
        "d", "f4", 3, 3, [str(tmp_path / "data")], None, np.array([-1]), np.array([12]), None, []
    )
    columns = stored(tmp_path / "columns", "i", np.arange(3, dtype=np.int32), 3, "plain")
    stream = native.CsrStream(array, columns, np.array([0, 3]), 5)
    stream.submit(np.array([0]))
    with pytest.raises(native.ChunkError, match="never written"):
        stream.take()


def test_bomb_is_refused_by_length(tmp_path: Path) -> None:
    """A kilobyte that inflates to a gigabyte is not let past the length of its chunk."""
    bomb = zlib.compress(bytes(1 << 24), 9)
    (tmp_path / "data").write_bytes(bomb)
    for chunk_values, message in ((8, "length of a chunk"), (1 << 23, "length of a chunk")):
        array = native.StoredArray(
            "d", "f4", 8, chunk_values, [str(tmp_path / "data")], None, np.array([0]), np.array([len(bomb)]), None,
            [("zlib", 0)],
        )  # fmt: skip
        columns = stored(tmp_path / "columns", "i", np.arange(8, dtype=np.int32), 8, "plain")
        stream = native.CsrStream(array, columns, np.array([0, 8]), 8)
        stream.submit(np.array([0]))
        with pytest.raises(native.ChunkError, match=message):
            stream.take()


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": np.array([0, 0])},
        {"sizes": np.array([-1])},
        {"chunk_values": 0},
        {"num_values": -1},
        {"num_values": 2**62},
        {"paths": []},
        {"file_of_chunk": np.array([1], np.int32)},
        {"filter_masks": np.zeros(2, np.uint32)},
        {"filters": [("shuffle", 0)]},
        {"filters": [("rot13", 0)]},
        {"dtype": "c8"},
    ],
)
def test_tables_that_do_not_hold_together(change: dict) -> None:
    sound = {
        "name": "d", "dtype": "f4", "num_values": 4, "chunk_values": 4, "paths": ["x"], "file_of_chunk": None,
        "offsets": np.array([0]), "sizes": np.array([16]), "filter_masks": None, "filters": [],
    }  # fmt: skip
    native.StoredArray(**sound)
    with pytest.raises(ValueError, match="StoredArray"):
        native.StoredArray(**sound | change)


def test_blocks_outlive_their_stream_and_do_not_alias(tmp_path: Path) -> None:
    indptr, indices, data = random_csr(200, 7)
    stream = simple_stream(tmp_path, indptr, indices, data)
    kept = []
    for start in range(0, 200, 20):
        stream.submit(np.arange(start, start + 20))
        kept.append(stream.take())
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.take()
    np.testing.assert_array_equal(np.concatenate([block[1] for block in kept]), indices)
    np.testing.assert_array_equal(np.concatenate([block[2] for block in kept]), data)


def test_closing_with_work_under_way(tmp_path: Path) -> None:
    indptr, indices, data = random_csr(2000, 7)
    for _ in range(20):
        stream = simple_stream(tmp_path, indptr, indices, data)
        for _ in range(5):
            stream.submit(np.arange(2000))
        stream.close()


def test_without_validation_there_are_no_facts(tmp_path: Path) -> None:
    stream = simple_stream(tmp_path, [0, 1], np.zeros(1, np.int32), np.ones(1, np.float32), validate=False)
    stream.submit(np.zeros(1, np.int64))
    assert stream.take()[3] is None


def test_fork_leaves_both_sides_sound(tmp_path: Path) -> None:
    indptr, indices, data = random_csr(500, 7)
    stream = simple_stream(tmp_path, indptr, indices, data)
    stream.submit(np.arange(500))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            stream.take()
        except ValueError:
            stream.close()
            del stream
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    np.testing.assert_array_equal(stream.take()[1], indices)


def test_every_instruction_set_finds_the_same(tmp_path: Path) -> None:
    indptr, indices, data = random_csr(300, 11)
    data[17] = 0.5
    before = native.active_isa()
    try:
        for isa in native.available_isas():
            native.set_isa(isa)
            stream = simple_stream(tmp_path, indptr, indices, data, chunk=7)
            stream.submit(np.arange(300))
            assert stream.take()[3] is None
            clean = np.flatnonzero(indptr[1:] <= 17)
            stream.submit(clean)
            facts = stream.take()[3]
            assert facts is not None
            assert facts.max_value == data[: indptr[clean[-1] + 1]].max(initial=0)
    finally:
        native.set_isa(before)


def test_many_files(tmp_path: Path) -> None:
    """More files than are kept open: one chunk each, as in a zarr store."""
    values = np.arange(200, dtype=np.float32)
    paths = []
    for number, value in enumerate(values):
        path = tmp_path / f"c{number}"
        path.write_bytes(struct.pack("<f", value))
        paths.append(str(path))
    array = native.StoredArray(
        "d", "f4", 200, 1, paths, np.arange(200, dtype=np.int32), np.zeros(200, np.int64),
        np.full(200, 4, np.int64), None, [],
    )  # fmt: skip
    columns = stored(tmp_path / "columns", "i", np.arange(200, dtype=np.int32), 64, "zlib")
    stream = native.CsrStream(array, columns, np.array([0, 200]), 200)
    stream.submit(np.array([0]))
    np.testing.assert_array_equal(stream.take()[2], values)


def test_fletcher32_of_hdf5(tmp_path: Path) -> None:
    """Checksums as the HDF5 library writes them, odd lengths too."""
    import h5py

    from scfm.data.h5_chunks import chunk_table

    path = tmp_path / "f.h5"
    rng = np.random.default_rng(0)
    values = rng.integers(0, 255, 1001).astype(np.uint8)
    with h5py.File(path, "w") as file:
        file.create_dataset("d", data=values, chunks=(77,), fletcher32=True, compression="gzip")
        file.create_dataset(
            "i", data=np.arange(1001, dtype=np.int32), chunks=(50,), fletcher32=True, shuffle=True
        )
    with h5py.File(path) as file:
        tables = [chunk_table(file[name], path=str(path)).native() for name in "di"]
    stream = native.CsrStream(*tables, np.array([0, 1001]), 1001)
    stream.submit(np.array([0]))
    _, columns, data, _, _ = stream.take()
    np.testing.assert_array_equal(data, values)
    np.testing.assert_array_equal(columns, np.arange(1001))
