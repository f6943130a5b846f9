"""Full, failing and impossible disks: a typed error, nothing half written, and the same bytes afterwards
(fault rows 56, 57, 62)."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from failing_fs import FailingOs

from scfm.data import atomic_file, lease
from scfm.data.atomic_file import create_once, whole_file, whole_folder
from scfm.embed import embed_to_folder, export_store, verify_store
from scfm.embed.run import check_folder
from scfm.errors import InvalidArgumentError, ScfmError, StorageError


@pytest.fixture
def cells(tiny_adata, tmp_path) -> Path:
    tiny_adata[:24].write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def arrays(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*.npy"))}


def failing(monkeypatch: pytest.MonkeyPatch, nth: int, code: int | str) -> FailingOs:
    shim = FailingOs(nth, code)
    for module in (atomic_file, lease):
        monkeypatch.setattr(module, "os", shim)
    return shim


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_failing_at_every_call_in_turn(tiny_model, cells, tmp_path, monkeypatch, code: int) -> None:
    embed_to_folder([cells], tiny_model, tmp_path / "good", shard_size=12)
    good = arrays(tmp_path / "good")
    nth, failures = 0, []
    while True:
        nth += 1
        out = tmp_path / f"out{nth}"
        with monkeypatch.context() as patch:
            shim = failing(patch, nth, code)
            try:
                embed_to_folder([cells], tiny_model, out, shard_size=12)
            except StorageError as error:
                assert error.errno == code and isinstance(error, OSError) and str(out) in str(error)
                assert ("full" if code == errno.ENOSPC else "failed") in str(error)
            else:
                if shim.failed_at is None:
                    break
                assert shim.failed_at == "pwrite"  # a heartbeat: costs nothing
            failures.append(shim.failed_at)
        assert not list(out.glob("*.tmp")) and not list(out.glob("*.lease")), (nth, shim.failed_at)
        assert all(good[name] == content for name, content in arrays(out).items())
        embed_to_folder([cells], tiny_model, out, shard_size=12)
        assert arrays(out) == good and verify_store(out).ok, (nth, shim.failed_at)
    assert {"open", "write", "fsync", "link", "posix_fallocate"} <= set(failures)
    assert len(failures) > 25


@pytest.mark.parametrize("code", ["short", "interrupted"])
def test_short_and_interrupted_writes_are_finished(tiny_model, cells, tmp_path, monkeypatch, code) -> None:
    embed_to_folder([cells], tiny_model, tmp_path / "good", shard_size=12)
    failing(monkeypatch, 0, code)
    embed_to_folder([cells], tiny_model, tmp_path / "out", shard_size=12)
    assert arrays(tmp_path / "out") == arrays(tmp_path / "good")


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_without_hard_links(tmp_path, monkeypatch, code: int) -> None:
    def no_link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic_file.os, "link", no_link)
    assert create_once(tmp_path / "x", [b"first"])
    assert not create_once(tmp_path / "x", [b"second"])
    assert (tmp_path / "x").read_bytes() == b"first" and os.listdir(tmp_path) == ["x"]
    monkeypatch.setattr(atomic_file, "_GUARD_SECONDS", 0.1)
    (tmp_path / "y.guard").touch()  # of a process that died
    assert create_once(tmp_path / "y", [b"1"]) and sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_without_room_reservation(tmp_path, monkeypatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(atomic_file.os, "posix_fallocate", unsupported)
    assert create_once(tmp_path / "x", [b"ab", memoryview(np.arange(3.0))])
    assert (tmp_path / "x").stat().st_size == 26


FULL_DISK = """
import sys, resource, numpy as np
from pathlib import Path
from scfm.data.atomic_file import create_once, whole_file
from scfm.errors import StorageError
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    create_once(folder / "x.npy", [bytes(4 << 20)])
except StorageError as error:
    print(error.errno, [p.name for p in folder.iterdir()])
try:
    with whole_file(folder / "y.npy") as temporary:
        np.save(temporary.open("wb"), np.zeros(1 << 20, dtype=np.float32))
except StorageError as error:
    print([p.name for p in folder.iterdir()])
"""


def test_a_disk_that_is_really_full(tmp_path) -> None:
    folder, limit = tmp_path / "small", 0
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted:
        limit = 2 << 20
    try:
        command = [sys.executable, "-c", FULL_DISK, str(folder), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
    expected = errno.ENOSPC if mounted else errno.EFBIG
    assert done.stdout.splitlines() == [f"{expected} []", "[]"], done.stderr


def test_places_that_cannot_be_written_are_named_before_anything_runs(tiny_model, cells, tmp_path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    for name, text in (("file", "is a file"), ("dangling", "leads to no folder"), ("other", "thesis.txt")):
        with pytest.raises(InvalidArgumentError, match=text):
            embed_to_folder([cells], tiny_model, tmp_path / name)
    assert (tmp_path / "file").stat().st_size == 0 and os.listdir(tmp_path / "other") == ["thesis.txt"]
    assert embed_to_folder([cells], tiny_model, tmp_path / "linked").complete
    assert (tmp_path / "real" / "plan.json").exists()
    with pytest.raises(ScfmError):
        check_folder(Path("/proc/embeddings"))
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(ScfmError, match=r"permission|may not"):
            check_folder(tmp_path / "locked")


def test_a_read_only_folder(tmp_path, monkeypatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(StorageError, match="read-only"):
        check_folder(tmp_path)


def test_exports_are_whole_or_absent(tiny_model, cells, tmp_path, monkeypatch) -> None:
    embed_to_folder([cells], tiny_model, tmp_path / "out", shard_size=12)
    before = set(tmp_path.iterdir())
    for suffix in (".npy", ".zarr", ".parquet", ".h5ad"):
        nth = 0
        while True:
            nth += 1
            with monkeypatch.context() as patch:
                shim = FailingOs(nth, errno.ENOSPC)
                patch.setattr(atomic_file, "os", shim)
                try:
                    export_store(tmp_path / "out", tmp_path / f"x{suffix}")
                except StorageError:
                    left = set(tmp_path.iterdir()) - before
                    # Only what follows the final name may fail and leave it; then it is whole.
                    assert {path.name for path in left} <= {f"x{suffix}", "x.npy.json"}, (suffix, nth)
                else:
                    if shim.failed_at is None:
                        break
            if suffix == ".zarr":
                shutil.rmtree(tmp_path / "x.zarr", ignore_errors=True)
        assert nth > 2
        assert (tmp_path / f"x{suffix}").exists()
        before = set(tmp_path.iterdir())


def test_a_block_that_fails_leaves_no_folder(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="boom"), whole_folder(tmp_path / "x") as partial:
        (partial / "half").touch()
        raise RuntimeError("boom")
    assert os.listdir(tmp_path) == []
    (tmp_path / "victim").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with whole_file(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "victim").read_bytes() == b"kept" and (tmp_path / "link").read_bytes() == b"new"
