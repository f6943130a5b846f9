"""Fault rows 33 and 34: files that change under the reader, and paths that cannot be read."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from counts_files import dense, poisson_matrix, read_everything, write_matrix
from run_child import run_child

from scfm.data.read import read
from scfm.errors import FormatError, IntegrityError, InvalidArgumentError, MissingFileError, ScfmError

# --- row 33: the file is another one ---


def replace_by_rename(path: Path) -> None:
    other = path.with_name("other.h5ad")
    write_matrix(other, poisson_matrix(seed=1))
    os.replace(other, path)


def overwrite_in_place(path: Path) -> None:
    other = path.with_name("other.h5ad")
    write_matrix(other, poisson_matrix(seed=1))
    content = other.read_bytes()
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()


def change_one_byte(path: Path) -> None:
    """Same size, same inode; only the time tells."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    if path.stat().st_mtime_ns == before.st_mtime_ns:  # a coarse clock
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


CHANGES: list[Callable[[Path], None]] = [replace_by_rename, overwrite_in_place, change_one_byte, truncate]


@pytest.mark.parametrize("storage", ["gzip", "contiguous"])
@pytest.mark.parametrize("change", CHANGES)
def test_row_33_changed_before_reading(
    change: Callable[[Path], None], storage: str, reader: str, tmp_path: Path
) -> None:
    path = write_matrix(tmp_path / "a.h5ad", poisson_matrix(), storage=storage)
    source = read(path)
    part = source.select(slice(10, 20))
    change(path)
    for act in (lambda: next(source.blocks()), lambda: dense(part), lambda: source.obs):
        with pytest.raises(IntegrityError, match=r"a\.h5ad"):
            act()


@pytest.mark.parametrize("storage", ["gzip", "contiguous"])
@pytest.mark.parametrize("change", CHANGES)
def test_row_33_changed_while_reading(
    change: Callable[[Path], None], storage: str, reader: str, tmp_path: Path
) -> None:
    """No block of the new file is ever handed out after blocks of the old one: the pass ends in an error.

    Blocks that were read ahead may still come, and must be the old ones.
    """
    matrix = poisson_matrix(2000, 40)
    path = write_matrix(tmp_path / "a.h5ad", matrix, storage=storage, chunk=997)
    expected = matrix.toarray()
    blocks = read(path).blocks(block_size=20)
    next(blocks)
    change(path)
    with pytest.raises(IntegrityError, match=r"a\.h5ad"):
        for block in blocks:
            counts = np.zeros((block.num_cells, 40))
            counts[np.repeat(np.arange(block.num_cells), np.diff(block.indptr)), block.indices] = block.data
            np.testing.assert_array_equal(counts, expected[block.rows])


def test_row_33_removed_while_in_use(reader: str, tmp_path: Path) -> None:
    path = write_matrix(tmp_path / "a.h5ad", poisson_matrix())
    source = read(path)
    path.unlink()
    with pytest.raises((MissingFileError, IntegrityError), match=r"a\.h5ad"):
        next(source.blocks())


def test_row_33_touched_and_put_back_is_the_same_file(reader: str, tmp_path: Path) -> None:
    """Reading twice, or a stat in between, is no change."""
    path = write_matrix(tmp_path / "a.h5ad", poisson_matrix())
    source = read(path)
    path.read_bytes()
    os.stat(path)
    np.testing.assert_array_equal(dense(source), poisson_matrix().toarray())
    np.testing.assert_array_equal(dense(source), poisson_matrix().toarray())


# --- row 34: paths ---


def test_row_34_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere\.h5ad"):
        read(tmp_path / "nowhere.h5ad")
    with pytest.raises(MissingFileError, match=r"nowhere\.h5ad"):
        read(tmp_path / "no" / "folder" / "nowhere.h5ad")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(MissingFileError, match=r"x\.h5ad"):
        read(file / "x.h5ad")
    folder = tmp_path / "folder.h5ad"
    folder.mkdir()
    with pytest.raises(InvalidArgumentError, match="folder"):
        read(folder)
    dangling = tmp_path / "dangling.h5ad"
    dangling.symlink_to("nothing")
    with pytest.raises(MissingFileError, match="dangling"):
        read(dangling)
    circle = tmp_path / "circle.h5ad"
    circle.symlink_to("circle.h5ad")
    with pytest.raises(ScfmError, match="circle"):
        read(circle)


def test_row_34_pipe_and_device_do_not_hang(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.h5ad"
    os.mkfifo(pipe)
    device = tmp_path / "device.h5ad"
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        start = time.perf_counter()
        outcome = run_child(read_everything, str(path), timeout=10)
        assert outcome.raised("InvalidArgumentError"), outcome
        assert time.perf_counter() - start < 3


def _read_as_nobody(path: str) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    read_everything(path)


def test_row_34_permission_denied() -> None:
    """As root one may read anything, so the child becomes nobody."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = write_matrix(folder / "closed.h5ad", poisson_matrix())
        path.chmod(0)
        outcome = run_child(_read_as_nobody, str(path))
        assert outcome.raised("InvalidArgumentError"), outcome
        assert "permission" in outcome.message and "closed.h5ad" in outcome.message
        path.chmod(0o644)
        folder.chmod(0)
        outcome = run_child(_read_as_nobody, str(path))
        folder.chmod(0o755)
        assert outcome.raised("InvalidArgumentError") or outcome.raised("MissingFileError"), outcome


@pytest.mark.parametrize("name", ["größe 細胞.h5ad", "with space & quote'.h5ad", "a\nb.h5ad", "{0}%s.h5ad"])
def test_row_34_unusual_names(name: str, reader: str, tmp_path: Path) -> None:
    path = write_matrix(tmp_path / "plain.h5ad", poisson_matrix())
    path.rename(tmp_path / name)
    np.testing.assert_array_equal(read_everything(str(tmp_path / name)), poisson_matrix().toarray())


def test_row_34_a_name_that_is_no_utf_8(reader: str, tmp_path: Path) -> None:
    path = write_matrix(tmp_path / "plain.h5ad", poisson_matrix())
    odd = os.fsencode(tmp_path) + b"/\xff\xfe.h5ad"
    try:
        os.rename(path, odd)
    except OSError as error:
        if error.errno in (errno.EILSEQ, errno.EINVAL):
            pytest.skip("this file system takes only UTF-8 names")
        raise
    for given in (os.fsdecode(odd), Path(os.fsdecode(odd))):
        np.testing.assert_array_equal(dense(read(given)), poisson_matrix().toarray())
    with open(odd, "r+b") as raw:
        with h5py.File(os.fsdecode(odd)) as file:
            stored = file["X/data"].id.get_chunk_info(5)
        raw.seek(stored.byte_offset)
        raw.write(b"\xff" * stored.size)
    with pytest.raises(FormatError, match="X/data"):
        dense(read(os.fsdecode(odd)))
    with pytest.raises(MissingFileError) as caught:
        read(os.fsdecode(odd) + ".h5ad")
    str(caught.value).encode("utf-8", "backslashreplace")


def test_row_34_a_layer_whose_name_is_no_utf_8(reader: str, tmp_path: Path) -> None:
    path = write_matrix(tmp_path / "plain.h5ad", poisson_matrix())
    with h5py.File(path, "r+") as file:
        file.create_group("layers")[b"\xff\xfe"] = file["X"]
    np.testing.assert_array_equal(dense(read(path)), poisson_matrix().toarray())
    label = b"\xff\xfe".decode("utf-8", "surrogateescape")
    try:
        counts = dense(read(path, layer=label))
    except ScfmError as error:
        ascii(str(error))
    else:
        np.testing.assert_array_equal(counts, poisson_matrix().toarray())


@pytest.mark.parametrize("name", ["a\0b.h5ad", "x" * 300 + ".h5ad"])
def test_row_34_impossible_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ScfmError):
        read(os.fspath(tmp_path) + "/" + name)


WRITER = """
import sys, h5py
file = h5py.File(sys.argv[1], "r+")
print("open", flush=True)
sys.stdin.readline()
"""


def test_row_34_locked_by_a_writer(reader: str, tmp_path: Path) -> None:
    path = write_matrix(tmp_path / "busy.h5ad", poisson_matrix())
    environment = {name: value for name, value in os.environ.items() if name != "HDF5_USE_FILE_LOCKING"}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, os.fspath(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "open\n"
        with pytest.raises(InvalidArgumentError, match=r"busy\.h5ad.*another program"):
            read(path)
    finally:
        writer.communicate("\n", timeout=30)
    np.testing.assert_array_equal(dense(read(path)), poisson_matrix().toarray())


def test_row_34_open_for_writing_in_this_process(reader: str, tmp_path: Path) -> None:
    """A notebook that has the file open in backed mode "r+": an error with a remedy, or the counts."""
    path = write_matrix(tmp_path / "busy.h5ad", poisson_matrix())
    with h5py.File(path, "r+"):
        try:
            counts = dense(read(path))
        except ScfmError as error:
            assert "busy.h5ad" in str(error)
        else:
            np.testing.assert_array_equal(counts, poisson_matrix().toarray())


def test_row_34_a_copy_that_is_still_running(reader: str, tmp_path: Path) -> None:
    """A file that grows: what is not all there yet is truncated, and so it is said."""
    whole = write_matrix(tmp_path / "whole.h5ad", poisson_matrix())
    part = tmp_path / "part.h5ad"
    part.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ScfmError, match="truncated"):
        read(part)
    shutil.copy(whole, part)
    np.testing.assert_array_equal(dense(read(part)), poisson_matrix().toarray())
