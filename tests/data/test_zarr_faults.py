"""Damaged zarr stores: always an error that names the array, never a crash, never zeros for what is missing."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs import Blosc
from scipy import sparse

from scfm.data.read import read
from scfm.errors import FormatError, ScfmError, UnsafeFileError

COUNTS = sparse.random(80, 30, 0.5, format="csr", random_state=1, dtype=np.float32)
COUNTS.data[:] = np.random.default_rng(1).integers(1, 300, COUNTS.nnz)
NUM_VALUES = COUNTS.nnz
LAYOUTS = [(2, "plain"), (3, "plain"), (3, "shards")]
READERS = ["native", "zarr"]


def write(path: Path, version: int, layout: str) -> Path:
    """plain: chunks of 100 values, blosc (2) or zstd (3); shards: four of those to a file."""
    adata = anndata.AnnData(COUNTS.copy())
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=version):
        warnings.simplefilter("ignore")
        adata.write_zarr(path)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)["X"]
    for name in ("data", "indices"):
        values = group[name][:]
        del group[name]
        how: dict[str, Any] = {"compressors": Blosc("lz4")} if version == 2 else {}
        if layout == "shards":
            how["shards"] = (400,)
        group.create_array(name, data=values, chunks=(100,), **how)
    return path


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """A whole store of each layout, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("templates")
    return {
        (version, layout): write(folder / f"{version}_{layout}.zarr", version, layout)
        for version, layout in LAYOUTS
    }


def chunk(path: Path, version: int, name: str, number: int) -> Path:
    return path / "X" / name / (f"c/{number}" if version == 3 else str(number))


@pytest.fixture(params=LAYOUTS, ids=str)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, templates: dict[tuple[int, str], Path]
) -> tuple[Path, int]:
    shutil.copytree(templates[request.param], tmp_path / "a.zarr")
    return tmp_path / "a.zarr", request.param[0]


@pytest.fixture(params=READERS, autouse=True)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SCFM_READER", request.param)
    return str(request.param)


def consume(path: Path) -> None:
    for _ in read(path).blocks(16):
        pass


def shuffled_last(path: Path) -> None:
    """Another order than the file's, so that the damaged chunk is not met where it lies."""
    source = read(path)
    for _ in source.select(np.arange(len(source))[::-1]).blocks(16):
        pass


def test_undamaged(store: tuple[Path, int]) -> None:
    source = read(store[0])
    blocks = list(source.blocks(16))
    np.testing.assert_array_equal(np.concatenate([block.data for block in blocks]), COUNTS.data)


@pytest.mark.parametrize("name", ["data", "indices", "indptr"])
def test_a_missing_chunk_is_not_zeros(name: str, store: tuple[Path, int]) -> None:
    path, version = store
    chunk(path, version, name, 0).unlink()
    with pytest.raises(FormatError, match=rf"X/{name}.*0: this chunk is missing"):
        consume(path)


def test_a_missing_chunk_of_dense_counts(tmp_path: Path) -> None:
    with anndata.settings.override(zarr_write_format=3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        anndata.AnnData(COUNTS.toarray()).write_zarr(tmp_path / "a.zarr")
    (tmp_path / "a.zarr/X/c/0/0").unlink()
    with pytest.raises(FormatError, match="X/c/0/0: this chunk is missing"):
        consume(tmp_path / "a.zarr")


@pytest.mark.parametrize("keep", [0, 1, 15, 40, -1])
@pytest.mark.parametrize("name", ["data", "indices"])
def test_a_truncated_chunk(name: str, keep: int, store: tuple[Path, int]) -> None:
    path, version = store
    file = chunk(path, version, name, 1)
    file.write_bytes(file.read_bytes()[:keep])
    for way in (consume, shuffled_last):
        with pytest.raises(FormatError, match=f"X/{name}"):
            way(path)


def test_trailing_bytes_are_not_misread(store: tuple[Path, int]) -> None:
    """A chunk with something behind it: the right values or an error."""
    path, version = store
    file = chunk(path, version, "data", 1)
    file.write_bytes(file.read_bytes() + b"\0" * 8)
    try:
        values = np.concatenate([block.data for block in read(path).blocks(16)])
    except FormatError:
        return
    np.testing.assert_array_equal(values, COUNTS.data)


def test_flipped_bytes(store: tuple[Path, int]) -> None:
    """Any byte of a chunk of indices: the true columns, other legal columns or values, or an error."""
    path, version = store
    file = chunk(path, version, "indices", 0)
    whole = file.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(whole), 40):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for block in read(path).blocks(16):
                    assert block.indices.min() >= 0
                    assert block.indices.max() < 30
        except ScfmError:
            pass


@pytest.mark.parametrize("size", [0, 1, 399, 401, 2**31 - 1])
def test_blosc_header_with_another_size(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 2, "plain")
    file = chunk(path, 2, "data", 2)
    content = bytearray(file.read_bytes())
    content[4:8] = struct.pack("<I", size)
    file.write_bytes(bytes(content))
    with pytest.raises(FormatError, match="X/data"):
        consume(path)


def test_a_chunk_of_another_array(store: tuple[Path, int]) -> None:
    """A well-formed chunk of the wrong length."""
    path, version = store
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    group.create_array("other", data=np.ones(50, np.float32), chunks=(50,), compressors=None)
    other = path / "other" / ("c/0" if version == 3 else "0")
    chunk(path, version, "data", 1).write_bytes(other.read_bytes())
    with pytest.raises(FormatError, match="X/data"):
        consume(path)


# --- shard indices: (offset, size) pairs and a checksum at the end of the file ---


def reindexed(content: bytes, change: Callable[[np.ndarray], None]) -> bytes:
    """The shard with another index under a right checksum."""
    index = np.frombuffer(content[-4 * 16 - 4 : -4], dtype="<u8").reshape(4, 2).copy()
    change(index)
    table = index.tobytes()
    return content[: -4 * 16 - 4] + table + google_crc32c.value(table).to_bytes(4, "little")


def beyond(index: np.ndarray) -> None:
    index[2] = (10**6, 10)


def wraps(index: np.ndarray) -> None:
    index[2] = (2**64 - 8, 16)


def too_long(index: np.ndarray) -> None:
    index[2, 1] = 2**63


def empty(index: np.ndarray) -> None:
    index[2] = 2**64 - 1


def swapped(index: np.ndarray) -> None:
    index[[0, 1]] = index[[1, 0]]
    index[0, 1] -= 1


@pytest.mark.parametrize("change", [beyond, wraps, too_long, empty, swapped], ids=lambda f: f.__name__)
def test_shard_indices_are_not_believed(change: Callable[[np.ndarray], None], tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 3, "shards")
    file = chunk(path, 3, "indices", 0)
    file.write_bytes(reindexed(file.read_bytes(), change))
    with pytest.raises(FormatError, match="X/indices"):
        consume(path)


def test_shard_checksum(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 3, "shards")
    file = chunk(path, 3, "data", 1)
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(FormatError, match="X/data/c/1: the checksum of the shard's index does not match"):
        consume(path)


# --- structure ---


def test_indices_out_of_range(store: tuple[Path, int]) -> None:
    path, _ = store
    for wrong in (-1, 30, 2**31 - 1):
        indices = zarr.open_group(path, mode="r+", use_consolidated=False)["X/indices"]
        indices[150] = wrong
        row = int(np.searchsorted(COUNTS.indptr, 150, side="right")) - 1
        with pytest.raises(FormatError, match=rf"row {row}: column index {wrong} is outside 0\.\.29"):
            consume(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.__setitem__(0, 1), "starts at 1"),
        (lambda p: p.__setitem__(5, -3), "decreases"),
        (lambda p: p.__setitem__(40, 10**6), "decreases"),
        (lambda p: p.__setitem__(80, NUM_VALUES - 1), "decreases|ends at"),
        (lambda p: p.resize((80,)), "80 entries, expected 81"),
    ],
)
def test_row_pointers(change: Callable[[Any], None], message: str, store: tuple[Path, int]) -> None:
    change(zarr.open_group(store[0], mode="r+", use_consolidated=False)["X/indptr"])
    with pytest.raises(FormatError, match=f"indptr.*({message})"):
        consume(store[0])


def edit(store: tuple[Path, int], name: str, **entries: Any) -> None:
    path, version = store
    file = path / "X" / name / ("zarr.json" if version == 3 else ".zarray")
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("length", [NUM_VALUES - 1, NUM_VALUES + 1, 2**40, 2**62, -1, "many", 1.5])
def test_claimed_lengths(length: Any, store: tuple[Path, int]) -> None:
    """A longer or shorter array than stored, in one array or in both."""
    edit(store, "data", shape=[length])
    with pytest.raises(FormatError, match="X"):
        consume(store[0])
    edit(store, "indices", shape=[length])
    with pytest.raises(FormatError, match="X"):
        consume(store[0])


def test_absurd_chunks(store: tuple[Path, int]) -> None:
    path, version = store
    for length in (2**40, 0, -5):
        if version == 2:
            edit(store, "data", chunks=[length])
        else:
            edit(store, "data", chunk_grid={"name": "regular", "configuration": {"chunk_shape": [length]}})
        with pytest.raises(FormatError, match="X/data"):
            consume(path)


@pytest.mark.parametrize("dtype", ["|S4", "<c8", "<M8[s]", "nonsense", None, [["a", "<f4"]]])
def test_types_that_are_no_counts(dtype: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 2, "plain")
    edit((path, 2), "data", dtype=dtype)
    with pytest.raises(FormatError, match="X/data"):
        consume(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"node_type": 3}', "\xff"])
def test_metadata_that_are_no_metadata(text: str, store: tuple[Path, int]) -> None:
    path, version = store
    name = "zarr.json" if version == 3 else ".zarray"
    (path / "X/data" / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match="X/data"):
        consume(path)


def test_other_shape_than_the_tables(store: tuple[Path, int]) -> None:
    group = zarr.open_group(store[0], mode="r+", use_consolidated=False)["X"]
    group.attrs["shape"] = [80, 31]
    with pytest.raises(FormatError, match=r"X: has shape \[80, 31\]; obs and var describe \(80, 30\)"):
        consume(store[0])


def test_a_pipe_in_place_of_a_chunk_does_not_hang(store: tuple[Path, int]) -> None:
    path, version = store
    file = chunk(path, version, "data", 1)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(FormatError, match="pipe"):
        consume(path)


def test_zip_names_that_lead_outside(tmp_path: Path) -> None:
    import zipfile

    path = write(tmp_path / "a.zarr", 2, "plain")
    attributes = path / "obs/.zattrs"
    attributes.write_text(json.dumps(json.loads(attributes.read_text()) | {"_index": "../../secret"}))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in path.rglob("*"):
            if file.is_file():
                archive.write(file, str(file.relative_to(path)))
    with pytest.raises(UnsafeFileError, match="outside the table"):
        consume(tmp_path / "a.zip")
    (tmp_path / "b.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-30])
    with pytest.raises(ScfmError):
        consume(tmp_path / "b.zip")
