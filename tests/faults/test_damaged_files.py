"""Fault rows 16 to 18: files cut off, of another kind, with damaged chunks or flipped bytes.

The oracle for damage that nothing can detect (a flipped bit of an uncompressed count) is what h5py itself
reads there: a typed error, the right counts, or exactly the bytes in the file; never a crash or a third answer.
"""

from __future__ import annotations

import os
import struct
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from counts_files import (
    COMPRESSED,
    dense,
    import_plugins,
    poisson_matrix,
    read_everything,
    read_plainly,
    write_matrix,
)
from mutate_h5ad import good_anndata
from run_child import run_child

from scfm.data.read import read
from scfm.errors import FormatError, ScfmError

SPARE_MEMORY = 1 << 29
NUM_SEEDS = 300 if os.environ.get("SCFM_LONG_FAULTS") == "1" else 48
BATCH = 12


# --- row 16: cut off, or no HDF5 file at all ---


@pytest.mark.parametrize("compression", ["gzip", None])
def test_row_16_truncated_anywhere(compression: str | None, reader: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole.h5ad"
    good_anndata().write_h5ad(whole, compression=compression)
    content = whole.read_bytes()
    cut = tmp_path / "cut.h5ad"
    for length in [*np.linspace(0, len(content) - 2, 24, dtype=int).tolist(), len(content) - 1]:
        cut.write_bytes(content[:length])
        start = time.perf_counter()
        with pytest.raises(FormatError, match=r"cut\.h5ad"):
            read_everything(str(cut))
        assert time.perf_counter() - start < 1


def _outcomes(paths: list[str], expected: np.ndarray) -> list[tuple[str, str]]:
    """Of each file, what is wrong with the way it ended; nothing for the right counts or a typed error."""
    wrong = []
    for path in paths:
        try:
            counts = read_everything(path)
        except ScfmError:
            continue
        except BaseException as error:
            wrong.append((path, repr(error)))
            continue
        if not np.array_equal(counts, expected):
            plain = read_plainly(path)
            if plain is None or not np.array_equal(counts, plain):
                wrong.append((path, "neither the right counts nor what h5py reads"))
    return wrong


@pytest.mark.parametrize("storage", ["gzip", "chunked", "contiguous"])
def test_row_16_truncated_with_an_amended_header(storage: str, reader: str, tmp_path: Path) -> None:
    """The header claims that the file ends where it was cut, so that HDF5 opens it."""
    matrix = poisson_matrix()
    whole = write_matrix(tmp_path / "whole.h5ad", matrix, storage=storage)
    content = whole.read_bytes()
    assert content[8] == 0 and struct.unpack_from("<Q", content, 40)[0] == len(content)
    paths = []
    for length in np.linspace(96, len(content) - 1, 25, dtype=int).tolist():
        path = tmp_path / f"cut{length}.h5ad"
        path.write_bytes(content[:40] + struct.pack("<Q", length) + content[48:length])
        paths.append(str(path))
    outcome = run_child(_outcomes, paths, matrix.toarray(), memory=SPARE_MEMORY)
    assert outcome.kind == "ok", outcome
    assert outcome.value == []


def test_row_16_not_hdf5_at_all(tmp_path: Path) -> None:
    text = tmp_path / "text.h5ad"
    text.write_text("gene,cell\n" * 500)
    archive = tmp_path / "archive.h5ad"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("X", "1 2 3" * 1000)
    empty = tmp_path / "empty.h5ad"
    empty.touch()
    for path, words in ((text, "not an HDF5 file"), (archive, "not an HDF5 file"), (empty, "empty")):
        with pytest.raises(FormatError, match=words):
            read(path)


# --- row 17: a damaged chunk ---

CHECKED = [*COMPRESSED, "fletcher32"]


def damaged_chunk(folder: Path, storage: str, name: str, *, whole: bool) -> tuple[Path, list[int], int]:
    """A file of 600 cells with one chunk of ``name`` overwritten; the rows in it, and its number.

    The rows lie between those that scfm.read samples.
    """
    matrix = poisson_matrix(600, 30)
    path = write_matrix(folder / "damaged.h5ad", matrix, storage=storage, chunk=101)
    number = int(matrix.indptr[150]) // 101
    with h5py.File(path) as file:
        stored = next(
            info
            for info in map(file[f"X/{name}"].id.get_chunk_info, range(file[f"X/{name}"].id.get_num_chunks()))
            if info.chunk_offset[0] == number * 101
        )
    with open(path, "r+b") as raw:
        raw.seek(stored.byte_offset + (0 if whole else stored.size // 2))
        raw.write(b"\xff" * (stored.size - 4 if whole else 2))  # a checksum at the end stays
    touched = np.flatnonzero(
        (matrix.indptr[1:] > number * 101) & (matrix.indptr[:-1] < (number + 1) * 101)
    ).tolist()
    return path, touched, number


@pytest.mark.parametrize("name", ["data", "indices"])
@pytest.mark.parametrize("storage", CHECKED)
def test_row_17_damaged_chunk_is_named(storage: str, name: str, reader: str, tmp_path: Path) -> None:
    path, touched, _ = damaged_chunk(tmp_path, storage, name, whole=True)
    outcome = run_child(read_everything, str(path), memory=SPARE_MEMORY)
    assert outcome.raised("FormatError"), outcome
    assert "damaged.h5ad" in outcome.message and f"X/{name}" in outcome.message
    assert "chunk" in outcome.message or "[" in outcome.message
    # The other cells are as readable as before.
    import_plugins()
    source = read(path)
    others = np.setdiff1d(np.arange(600), touched)
    np.testing.assert_array_equal(dense(source.select(others), 64), poisson_matrix(600, 30).toarray()[others])


@pytest.mark.parametrize("storage", CHECKED)
def test_row_17_two_damaged_bytes(storage: str, reader: str, tmp_path: Path) -> None:
    """Filters without a checksum (lzf, blosc) may not notice: then the values are those that h5py decodes."""
    for name in ("data", "indices"):
        path, _, _ = damaged_chunk(tmp_path, storage, name, whole=False)
        outcome = run_child(read_everything, str(path), memory=SPARE_MEMORY)
        if outcome.kind == "ok":
            assert "gzip" not in storage and "fletcher32" not in storage
            np.testing.assert_array_equal(outcome.value, read_plainly(str(path)))
        else:
            assert outcome.raised("ScfmError"), outcome


# --- row 18: flipped bytes ---


def test_row_18_flipped_bytes(reader: str, tmp_path: Path) -> None:
    matrix = poisson_matrix(100, 100)
    expected = matrix.toarray()
    contents = [
        write_matrix(tmp_path / f"{storage}.h5ad", matrix, storage=storage, chunk=1000).read_bytes()
        for storage in ("gzip", "chunked", "contiguous", "lzf_shuffle")
    ]
    for first in range(0, NUM_SEEDS, BATCH):
        paths = []
        for seed in range(first, first + BATCH):
            rng = np.random.default_rng(seed)
            content = bytearray(contents[seed % len(contents)])
            # Half of the seeds aim at the head of the file, where its structure lies.
            end = len(content) if seed % 8 < 4 else min(8192, len(content))
            for position in rng.integers(0, end, 3):
                content[position] ^= int(rng.integers(1, 256))
            path = tmp_path / f"flipped{seed}.h5ad"
            path.write_bytes(content)
            paths.append(str(path))
        outcome = run_child(_outcomes, paths, expected, timeout=60, memory=SPARE_MEMORY)
        assert outcome.kind == "ok", (f"seeds from {first}", outcome)
        assert outcome.value == []
        for path in paths:
            os.unlink(path)


@pytest.mark.parametrize("ending", [".h5ad", ".h5", ".loom"])
def test_row_18_names_that_are_no_text(ending: str, tmp_path: Path) -> None:
    """A flipped byte in a name: h5py then gives bytes among the texts."""
    path = write_matrix(tmp_path / f"names{ending}", poisson_matrix())
    with h5py.File(path, "r+") as file:
        file.move("obs", b"\xef\xff")
        file.create_group("layers")[b"\xff"] = file["X"]
    with pytest.raises(FormatError, match="names"):
        read(path)
