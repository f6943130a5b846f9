"""Checkpoints of a training run that is killed, damaged, attacked or out of room: the newest that is whole always loads
(fault rows 13, 68, 69, 70, 79; several ranks in ../distributed)."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_writer import expect_whole, made, write
from failing_fs import FailingOs

from scfm.data import atomic_file
from scfm.data.crash_points import CHECKPOINT_POINTS
from scfm.errors import IntegrityError, ScfmWarning, StorageError, VersionError
from scfm.train.checkpoint import CheckpointStore, TrainState, background_write, folder

SHARD = "shard-00000-of-00001.safetensors"


# ---- killed ---------------------------------------------------------------------------------------------------------


def killed(ranks: Any, job: str, *, env: dict[str, str] | None = None, **arguments: Any) -> bool:
    """Whether the job, in a process of its own, ended by SIGKILL."""
    return ranks.run(0, f"checkpoint_writer:{job}", arguments, env=env)[0].code == -signal.SIGKILL


# create_once reaches its points once for each of four files: shard, train_state.json, MANIFEST.json, COMMITTED.
REACHED = {"after_write": 4, "before_link": 4, "after_link": 4, "before_delete": 1}
CRASHES = [
    (point, nth)
    for point in CHECKPOINT_POINTS
    for number in range(REACHED.get(point, 1))
    for nth in [1 if point == "before_delete" else 2 * REACHED.get(point, 1) + number + 1]
]


@pytest.mark.parametrize(("point", "nth"), CRASHES)
def test_row_68_killed_at_every_point_of_the_third_save(ranks, tmp_path, point: str, nth: int) -> None:
    assert killed(ranks, "write", out=tmp_path, last=5, env={"SCFM_CRASH_AT": f"{point}:{nth}"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an unfinished step is no damage and nothing to warn of
        step = expect_whole(CheckpointStore(tmp_path).newest())
    assert step == (3 if point in ("after_rename", "before_delete") else 2)
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())  # leftovers are cleared
    assert write(tmp_path, 5) == []
    assert expect_whole(CheckpointStore(tmp_path).newest()) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_row_69_killed_at_twelve_random_moments(ranks, tmp_path) -> None:
    draw = random.Random(69)
    steps = [0]
    for _ in range(12):
        assert killed(ranks, "write_until_killed", out=tmp_path, delay=draw.uniform(0.02, 0.5))
        found = CheckpointStore(tmp_path).newest()
        steps.append(steps[-1] if found is None and steps[-1] == 0 else expect_whole(found, 500))
        assert found is None or not found.skipped
    assert steps == sorted(steps) and steps[-1] > 12, steps


# ---- damaged --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound")
    write(out, 3, keep_last=3)
    return out


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "checkpoints")


def changed(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def linked(path: Path) -> None:
    shutil.move(path, path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "shard cut off": (SHARD, lambda p: changed(p, lambda c: c[: len(c) // 2])),
    "shard with a flipped bit": (SHARD, lambda p: changed(p, flipped)),
    "shard longer": (SHARD, lambda p: changed(p, lambda c: c + b"\0")),
    "shard empty": (SHARD, lambda p: changed(p, lambda c: b"")),
    "shard zeroed": (SHARD, lambda p: changed(p, lambda c: bytes(len(c)))),
    "shard missing": (SHARD, Path.unlink),
    "shard a folder": (SHARD, lambda p: (p.unlink(), p.mkdir())[0]),
    "shard a link": (SHARD, linked),
    "state with a flipped bit": ("train_state.json", lambda p: changed(p, flipped)),
    "state missing": ("train_state.json", Path.unlink),
    "manifest with a flipped bit": ("MANIFEST.json", lambda p: changed(p, flipped)),
    "manifest cut off": ("MANIFEST.json", lambda p: changed(p, lambda c: c[:40])),
    "manifest missing": ("MANIFEST.json", Path.unlink),
    "never finished": ("COMMITTED", Path.unlink),
    "finished by another": (
        "MANIFEST.json",
        lambda p: (p.parent / "COMMITTED").write_text("00000000\n") and None,
    ),
    "a file too many": ("shard-00001-of-00001.safetensors", lambda p: p.write_bytes(b"") and None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_row_70_a_damaged_checkpoint_gives_way_to_the_one_before(out: Path, damage: str) -> None:
    name, harm = DAMAGES[damage]
    harm(out / "step-00000003" / name)
    with pytest.warns(ScfmWarning) as told:
        found = CheckpointStore(out).newest()
    assert expect_whole(found) == 2
    assert found is not None and len(found.skipped) == 1 and f"step-00000003/{name}" in found.skipped[0]
    assert "resuming from step 2" in str(told[0].message) and f"step-00000003/{name}" in str(told[0].message)
    # The run goes on, past the step that is damaged, and what was damaged is kept aside to be looked at.
    assert any("set aside" in warning for warning in write(out, 3, keep_last=3))
    assert expect_whole(CheckpointStore(out).newest()) == 3
    assert len(list(out.glob("set-aside-step-00000003-*"))) == 1


def test_row_70_none_that_is_whole_is_an_error_that_names_each(out: Path) -> None:
    for step, (name, harm) in zip(
        (1, 2, 3), (DAMAGES["shard missing"], *list(DAMAGES.values())[:2]), strict=True
    ):
        harm(out / f"step-{step:08d}" / name)
    with pytest.raises(IntegrityError) as refused:
        CheckpointStore(out).newest()
    assert all(f"step-{step:08d}/{SHARD}" in str(refused.value) for step in (1, 2, 3))
    assert CheckpointStore(out / "nothing").newest() is None


def test_row_70_a_step_by_another_name_is_refused(out: Path) -> None:
    shutil.rmtree(out / "step-00000003")
    shutil.copytree(out / "step-00000001", out / "step-00000007")
    with pytest.warns(ScfmWarning, match="belongs to step 1, the folder to step 7"):
        assert expect_whole(CheckpointStore(out).newest()) == 2


def resealed(path: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Manifest and COMMITTED as they would be if the folder had been written as it is now."""
    content = json.loads((path / "MANIFEST.json").read_text())
    names = {entry.name for entry in path.iterdir()} - {"MANIFEST.json", "COMMITTED"}
    content["files"] = {n: [(path / n).stat().st_size, zlib.crc32((path / n).read_bytes())] for n in names}
    change(content)
    text = json.dumps(content).encode()
    (path / "MANIFEST.json").write_bytes(text)
    (path / "COMMITTED").write_text(f"{zlib.crc32(text):08x}\n")


def header_changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def without(header: dict[str, Any], metadata: Any) -> None:
    header["__metadata__"] = metadata


def moved(header: dict[str, Any], offsets: Any) -> None:
    told = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    told["model.weight"] = {"saved_offsets": offsets}
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(told)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: without(header, {}),
        lambda header: without(header, {"DCP_SHARDING_INFO": "{}"}),
        lambda header: without(header, {"DCP_SHARDING_INFO": "[" * 5000}),
        lambda header: moved(header, [0, 1]),
        lambda header: moved(header, [-1, 0]),
        lambda header: moved(header, [0]),
        lambda header: moved(header, ["0", 0]),
        lambda header: moved(header, [2**62, 2**62]),
        lambda header: moved(header, None),
        lambda header: header.pop("model.bias"),
        lambda header: header["model.weight"].update(shape=[16, 17]),
        lambda header: header["model.weight"].update(dtype="F8_E4M3", shape=[32, 32]),
    ],
)
def test_row_70_headers_that_lie_under_right_checksums(out: Path, change) -> None:
    path = out / "step-00000003"
    header_changed(path / SHARD, change)
    resealed(path)
    with pytest.warns(ScfmWarning, match="step-00000003"):
        assert expect_whole(CheckpointStore(out).newest()) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("files"),
        lambda m: m.update(files={}),
        lambda m: m.update(files=[]),
        lambda m: m["files"].update({"../../../etc/passwd": [1, 1]}),
        lambda m: m["files"].update({SHARD: [1.5, 2]}),
        lambda m: m["files"].update({SHARD: None}),
        lambda m: m["files"].pop("train_state.json"),
        lambda m: m.update(num_tensors=3),
        lambda m: m.update(num_tensors="8"),
        lambda m: m.update(step=2),
        lambda m: m.update(step=True),
        lambda m: m.update(optimizer=None),
        lambda m: m.update(surprise=1),
        lambda m: m.update(format=None),
    ],
)
def test_row_70_manifests_that_are_none(out: Path, change) -> None:
    resealed(out / "step-00000003", change)
    with pytest.warns(ScfmWarning, match="step-00000003"):
        assert expect_whole(CheckpointStore(out).newest()) == 2


@pytest.mark.parametrize("file", ["MANIFEST.json", "train_state.json"])
def test_a_checkpoint_of_a_newer_scfm_is_not_passed_over(out: Path, file: str) -> None:
    path = out / "step-00000003"
    if file == "train_state.json":
        changed(path / file, lambda content: content.replace(b'"format": 1', b'"format": 2'))
    resealed(path, lambda m: m.update(format=2 if file == "MANIFEST.json" else 1))
    with pytest.raises(VersionError, match="newer scfm") as refused:
        CheckpointStore(out).newest()
    assert str(path / file) in str(refused.value)


# ---- attacked -------------------------------------------------------------------------------------------------------


class Gadget:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


UNREAD = ("__0_0.distcp", "metadata.pt")


@pytest.mark.parametrize("name", [".metadata", *UNREAD, "shard-00001.safetensors", SHARD, "train_state.json"])
@pytest.mark.parametrize("sealed", [False, True])
def test_row_13_a_pickle_in_the_folder_is_never_opened(
    out: Path, tmp_path: Path, name: str, sealed: bool
) -> None:
    path, canary = out / "step-00000003", tmp_path / "canary"
    (path / name).write_bytes(pickle.dumps(Gadget(canary)))
    if sealed:
        resealed(path)
    if sealed and name in UNREAD:
        assert expect_whole(CheckpointStore(out).newest()) == 3
    else:
        with pytest.warns(ScfmWarning, match="step-00000003"):
            assert expect_whole(CheckpointStore(out).newest()) == 2
    assert not canary.exists()
    pickle.loads((path / name).read_bytes())  # the gadget works
    assert canary.exists()


# ---- out of room ----------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, nth: int, code: int | str) -> FailingOs:
    shim = FailingOs(nth, code)
    for module in (atomic_file, folder):
        monkeypatch.setattr(module, "os", shim)
    return shim


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_row_79_failing_at_every_call_in_turn(tmp_path, monkeypatch, code: int) -> None:
    """One call of the third save fails, each in turn; training goes on, and what stands is whole."""
    two, nth, failed = tmp_path / "two", 0, []
    write(two, 2)
    while True:
        nth += 1
        out = shutil.copytree(two, tmp_path / str(nth))
        store = CheckpointStore(out)
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            shim = failing(patch, nth, code)
            store.save(TrainState(3, 0, 3, 0), *made(3))
            committed = store.finish()
        if shim.failed_at is None:
            break
        failed.append(shim.failed_at)
        says = " ".join(str(warning.message) for warning in told)
        assert ("disk is full" if code == errno.ENOSPC else "disk or network failed") in says, (nth, says)
        partial = [path.name for path in out.iterdir() if path.name.startswith(".tmp")]
        if committed is None:
            assert "step 3 was not checkpointed; training goes on" in says and not partial
        step = expect_whole(CheckpointStore(out).newest())
        # The last call syncs the name: it may have failed and the checkpoint stand all the same.
        assert step == (2 if committed is None and "step-00000003" not in os.listdir(out) else 3)
        store.save(TrainState(4, 0, 4, 0), *made(4))
        assert store.finish() == out / "step-00000004"
        assert expect_whole(CheckpointStore(out).newest()) == 4
    assert {"open", "write", "fsync", "link", "posix_fallocate", "rename"} <= set(failed) and len(failed) > 20


def test_row_79_or_stops_with_the_error(tmp_path, monkeypatch) -> None:
    write(tmp_path, 2)
    store = CheckpointStore(tmp_path, on_storage_error="stop")
    failing(monkeypatch, 1, errno.ENOSPC)
    store.save(TrainState(3, 0, 3, 0), *made(3))
    with pytest.raises(StorageError, match="disk is full") as refused:
        store.finish()
    assert refused.value.errno == errno.ENOSPC and "step-00000003" in str(refused.value)
    assert expect_whole(CheckpointStore(tmp_path).newest()) == 2


def test_row_79_a_file_that_the_system_really_does_not_take(ranks, tmp_path) -> None:
    write(tmp_path, 2)
    ended = ranks.run(0, "checkpoint_writer:write_with_little_room", {"out": tmp_path, "num_bytes": 100_000})[
        0
    ]
    assert ended.code == 0 and "not checkpointed" in ended.said[0] and "too large" in ended.said[0], ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert expect_whole(CheckpointStore(tmp_path).newest()) == 2


def test_what_is_no_fault_of_the_disk_is_raised(tmp_path, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a mistake in the program")

    monkeypatch.setattr(background_write, "create_once", broken)
    store = CheckpointStore(tmp_path)
    store.save(TrainState(1, 0, 1, 0), *made(1))
    with pytest.raises(ZeroDivisionError):
        store.finish()
    assert not list(tmp_path.iterdir())
