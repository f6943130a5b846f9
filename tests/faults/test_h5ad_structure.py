"""Fault rows 16-21, 25-32 (structure): every malformed file ends in an error that says where, never in a
crash, a hang, a memory bomb or wrong numbers; every unusual but sound file gives the counts unharmed."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mutate_h5ad import MUTATIONS, good_anndata, good_counts, mutated
from run_child import run_child

from scfm.data.read import read
from scfm.errors import FormatError, IntegrityError, InvalidArgumentError, MissingFileError

SPARE_MEMORY = 1 << 30


def read_everything(path: str, layer: str | None = None) -> np.ndarray:
    """Counts as a dense array; the tables are read too."""
    source = read(path, layer=layer)
    assert len(source.obs) == len(source)
    assert len(source.genes) == source.num_genes
    counts = np.zeros((len(source), source.num_genes))
    for block in source.blocks(block_size=5):
        rows = np.repeat(block.rows, np.diff(block.indptr))
        np.add.at(counts, (rows, block.indices), block.data)
    return counts


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name: str, tmp_path: Path) -> None:
    expected = MUTATIONS[name]
    outcome = run_child(read_everything, str(mutated(name, tmp_path)), memory=SPARE_MEMORY)
    if expected.expect == "same":
        assert outcome.kind == "ok", outcome
        np.testing.assert_array_equal(outcome.value, good_counts())
    else:
        assert outcome.raised(expected.expect), outcome
        assert outcome.raised("ScfmError")
        assert f"{name}.h5ad" in outcome.message
        for word in expected.words:
            assert word in outcome.message, outcome.message


def test_registry_has_both_kinds() -> None:
    expectations = [entry.expect for entry in MUTATIONS.values()]
    assert expectations.count("same") > 20
    assert len(expectations) - expectations.count("same") > 40


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = tmp_path / "whole.h5ad"
    good_anndata().write_h5ad(whole, compression="gzip")
    content = whole.read_bytes()
    cut = tmp_path / "cut.h5ad"
    for length in [*np.linspace(0, len(content) - 2, 24, dtype=int).tolist(), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(FormatError, match=r"cut\.h5ad"):
            read_everything(str(cut))


def test_not_hdf5_at_all(tmp_path: Path) -> None:
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


def test_missing_folder_pipe_and_permission(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere\.h5ad"):
        read(tmp_path / "nowhere.h5ad")
    folder = tmp_path / "folder.h5ad"
    folder.mkdir()
    with pytest.raises(InvalidArgumentError, match="folder"):
        read(folder)
    pipe = tmp_path / "pipe.h5ad"
    os.mkfifo(pipe)
    outcome = run_child(read_everything, str(pipe), timeout=10)
    assert outcome.raised("InvalidArgumentError"), outcome
    closed = tmp_path / "closed.h5ad"
    good_anndata().write_h5ad(closed)
    closed.chmod(0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may read anything")
    with pytest.raises(InvalidArgumentError, match="permission"):
        read(closed)
    closed.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """Row 18, sampled: the outcome is the right counts or an error, whatever byte is flipped."""
    path = tmp_path / "whole.h5ad"
    good_anndata().write_h5ad(path, compression="gzip")
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    for seed in range(40):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 3):
            damaged[position] ^= int(rng.integers(1, 256))
        flipped = tmp_path / f"flipped{seed}.h5ad"
        flipped.write_bytes(damaged)
        outcome = run_child(read_everything, str(flipped), timeout=10, memory=SPARE_MEMORY)
        assert outcome.kind == "ok" or outcome.raised("ScfmError"), (seed, outcome)


def test_unusual_names(tmp_path: Path) -> None:
    path = tmp_path / "größe 細胞.h5ad"
    good_anndata().write_h5ad(path)
    np.testing.assert_array_equal(read_everything(str(path)), good_counts())


def test_file_replaced_while_in_use(tmp_path: Path) -> None:
    path, other = tmp_path / "a.h5ad", tmp_path / "b.h5ad"
    good_anndata().write_h5ad(path)
    good_anndata()[:5].copy().write_h5ad(other)
    source = read(path)
    shutil.move(other, path)
    with pytest.raises(IntegrityError, match=r"a\.h5ad"):
        next(source.blocks())


def test_child_reports_a_crash_and_a_hang() -> None:
    """The harness itself: without this, a crash might pass for success."""
    assert run_child(os.abort).message == "SIGABRT"
    assert run_child(_sleep, timeout=0.5).kind == "timeout"
    assert run_child(_allocate, memory=1 << 28).raised("MemoryError")


def _sleep() -> None:
    import time

    time.sleep(30)


def _allocate() -> None:
    np.ones(1 << 30)
