"""Checkpoints of one process: what is saved comes back to the last bit, only sound ones are found, few are kept."""

from __future__ import annotations

import json
import os
import pickletools
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from scfm.data import atomic_file
from scfm.data.process_name import host_name, start_time
from scfm.errors import CheckpointError, InvalidArgumentError, ScfmWarning, StorageError
from scfm.models.safetensors_header import read_header
from scfm.train.checkpoint import CheckpointStore, TrainState, background_write, retention
from scfm.train.checkpoint.agreement import _fitting
from scfm.train.checkpoint.ownership import owned_chunks
from scfm.train.checkpoint.retention import doomed_steps
from scfm.train.checkpoint.snapshot import Snapshot


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.table.weight
        self.narrow = nn.Parameter(torch.randn(3, 5).to(torch.bfloat16))
        self.unused = nn.Linear(2, 3)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.table(tokens))).square().mean() + self.narrow.float().sum()


def made(seed: int = 0, **options: Any) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(seed)
    net = Net()
    return net, torch.optim.AdamW(net.parameters(), **{"lr": 1e-2, **options})


def stepped(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    tokens = torch.randint(20, (6,), generator=torch.Generator().manual_seed(step))
    loss = net(tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def state(step: int) -> TrainState:
    return TrainState(step, 0, step, 0, settings={"a": 1})


def saved(folder: Path, steps: range = range(1, 3), **options: Any) -> tuple[Net, torch.optim.AdamW]:
    net, optimizer = made(0)
    store = CheckpointStore(folder, **options)
    for step in steps:
        stepped(net, optimizer, step)
        store.save(state(step), net, optimizer)
    store.finish()
    return net, optimizer


def is_pickle(content: bytes) -> bool:
    try:
        return bool(list(pickletools.genops(content)))
    except ValueError:
        return False


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": False, "lr": 1e-2}])
def test_the_run_goes_on_to_the_same_bits(tmp_path, options) -> None:
    net, optimizer = made(0, **options)
    store = CheckpointStore(tmp_path)
    assert store.newest() is None and store.last is None
    for step in (1, 2, 3):
        stepped(net, optimizer, step)
    store.save(state(3), net, optimizer)
    losses = [stepped(net, optimizer, step) for step in (4, 5, 6)]  # while it is being written
    assert store.finish() == store.last == tmp_path / "step-00000003"
    other, its_optimizer = made(9, **options)
    again = CheckpointStore(tmp_path)
    found = again.newest()
    assert found is not None and found.step == 3 and found.skipped == ()
    assert again.load(found, other, its_optimizer) == state(3) and again.last == found.path
    assert [stepped(other, its_optimizer, step) for step in (4, 5, 6)] == losses
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_what_lies_in_the_folder(tmp_path) -> None:
    saved(tmp_path)
    folder = tmp_path / "step-00000002"
    shard = "shard-00000-of-00001.safetensors"
    assert names(folder) == sorted(["COMMITTED", "MANIFEST.json", shard, "train_state.json"])
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    tensors = load_file(folder / shard)
    assert "model.table.weight" in tensors and "model.head.weight" not in tensors  # tied: kept once
    assert tensors["model.narrow"].dtype == tensors["optim.narrow.exp_avg"].dtype == torch.bfloat16
    assert "optim.frozen.step" not in tensors and "optim.unused.weight.step" not in tensors
    assert "model.passing" not in tensors and float(tensors["optim.table.weight.step"]) == 2
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["files"][shard][0] == (folder / shard).stat().st_size
    assert manifest["num_tensors"] == len(tensors)
    assert not any(is_pickle(path.read_bytes()) for path in folder.iterdir())


def test_a_snapshot_is_of_its_moment(tmp_path, monkeypatch) -> None:
    """The file is written long after the weights have changed, and still holds what they were."""
    go = threading.Event()
    real = background_write.create_once

    def late(*arguments: Any, **options: Any) -> bool:
        go.wait(20)
        return real(*arguments, **options)

    monkeypatch.setattr(background_write, "create_once", late)
    net, optimizer = made()
    stepped(net, optimizer, 1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    store = CheckpointStore(tmp_path)
    store.save(state(1), net, optimizer)
    assert store.poll() is None and store.last is None
    for step in (2, 3, 4):
        stepped(net, optimizer, step)
    assert store.poll() is None and not list(tmp_path.glob("step-*"))
    go.set()
    assert store.finish() == tmp_path / "step-00000001"
    assert store.poll() is None and store.finish() is None
    other, its_optimizer = made(5)
    found = store.newest()
    assert found is not None
    store.load(found, other, its_optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_poll_commits_when_all_is_written(tmp_path) -> None:
    net, optimizer = made()
    stepped(net, optimizer, 1)
    store = CheckpointStore(tmp_path)
    store.save(state(1), net, optimizer)
    path, waits = None, 0
    while path is None and waits < 2000:
        path, waits = store.poll(), waits + 1
        threading.Event().wait(0.005)
    assert path == tmp_path / "step-00000001" == store.last


def test_one_save_is_in_flight_and_a_step_is_saved_once(tmp_path, monkeypatch) -> None:
    alive, most = [], []
    real = background_write.BackgroundWrite._run

    def counted(self: Any) -> None:
        alive.append(self)
        most.append(len(alive))
        real(self)
        alive.remove(self)

    monkeypatch.setattr(background_write.BackgroundWrite, "_run", counted)
    net, optimizer = made()
    store = CheckpointStore(tmp_path, keep_last=9)
    for step in (1, 2, 3, 3):
        stepped(net, optimizer, step)
        store.save(state(step), net, optimizer)
    store.finish()
    stamp = (tmp_path / "step-00000003" / "COMMITTED").stat().st_mtime_ns
    store.save(state(3), net, optimizer)
    assert store.finish() is None
    assert most == [1, 1, 1] and names(tmp_path) == [f"step-{n:08d}" for n in (1, 2, 3)]
    assert (tmp_path / "step-00000003" / "COMMITTED").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("wrap", ["ddp-like", "recomputed", "compiled"])
def test_names_do_not_depend_on_wrappers(tmp_path, wrap: str) -> None:
    net, optimizer = saved(tmp_path)
    other, _ = made(3)
    module: nn.Module
    if wrap == "compiled":
        module = torch.compile(other)
    elif wrap == "recomputed":
        other.norm = checkpoint_wrapper(other.norm)
        module = other
    else:
        module = nn.Module()
        module.module = other
    its_optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    store = CheckpointStore(tmp_path)
    found = store.newest()
    assert found is not None
    store.load(found, module, its_optimizer)
    assert stepped(other, its_optimizer, 8) == stepped(net, optimizer, 8)
    store.save(state(3), module, its_optimizer)
    store.finish()
    again = store.newest()
    assert again is not None and again.tensors == found.tensors


def test_hyperparameters_are_those_of_the_settings(tmp_path) -> None:
    saved(tmp_path)
    net, optimizer = made(1, lr=0.5, weight_decay=0.25, betas=(0.1, 0.2))
    store = CheckpointStore(tmp_path)
    found = store.newest()
    assert found is not None
    store.load(found, net, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.1, 0.2))


@pytest.mark.parametrize("fused", [True, False])
def test_fused_and_ordinary_optimisers_read_each_other(tmp_path, fused: bool) -> None:
    net, optimizer = made(0, fused=not fused)
    stepped(net, optimizer, 1)
    store = CheckpointStore(tmp_path)
    store.save(state(1), net, optimizer)
    store.finish()
    other, its_optimizer = made(1, fused=fused)
    found = store.newest()
    assert found is not None
    store.load(found, other, its_optimizer)
    assert abs(stepped(other, its_optimizer, 2) - stepped(net, optimizer, 2)) < 1e-6
    assert abs(stepped(other, its_optimizer, 3) - stepped(net, optimizer, 3)) < 1e-5


def refused(tmp_path: Path, change: Callable[[Net], None]) -> str:
    saved(tmp_path)
    net, _ = made(1)
    change(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    store = CheckpointStore(tmp_path)
    found = store.newest()
    assert found is not None
    with pytest.raises(CheckpointError) as error:
        store.load(found, net, torch.optim.AdamW(net.parameters()))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    return str(error.value)


def test_tensors_that_do_not_fit_are_named(tmp_path) -> None:
    def more(net: Net) -> None:
        net.extra = nn.Parameter(torch.zeros(2))

    def fewer(net: Net) -> None:
        del net.unused

    def other_shape(net: Net) -> None:
        net.narrow = nn.Parameter(torch.zeros(5, 3, dtype=torch.bfloat16))

    def other_dtype(net: Net) -> None:
        net.narrow = nn.Parameter(torch.zeros(3, 5))

    def untied(net: Net) -> None:
        net.head.weight = nn.Parameter(torch.zeros(20, 8))

    assert "1 missing (model.extra)" in refused(tmp_path / "a", more)
    told = refused(tmp_path / "b", fewer)
    assert "2 not this model's (model.unused.bias, model.unused.weight)" in told
    assert "model.narrow is [3, 5], expected [5, 3]" in refused(tmp_path / "c", other_shape)
    assert "model.narrow is torch.bfloat16, expected torch.float32" in refused(tmp_path / "d", other_dtype)
    assert "1 missing (model.head.weight)" in refused(tmp_path / "e", untied)


def test_another_optimiser_or_other_trained_parts_are_named(tmp_path) -> None:
    saved(tmp_path)
    store = CheckpointStore(tmp_path)
    found = store.newest()
    assert found is not None
    net, _ = made(1)
    with pytest.raises(CheckpointError, match="state of AdamW, the optimiser is SGD"):
        store.load(found, net, torch.optim.SGD(net.parameters()))
    with pytest.raises(CheckpointError, match=r"1 parameters that this optimiser does not train: narrow"):
        store.load(found, net, torch.optim.AdamW(p for n, p in net.named_parameters() if n != "narrow"))
    with pytest.raises(CheckpointError, match="not the model's"):
        store.load(found, net, torch.optim.AdamW(nn.Linear(2, 2).parameters()))
    assert store.load(found, net, None).step == 2  # the model alone
    optimizer = torch.optim.LBFGS([net.table.weight])
    optimizer.state[net.table.weight]["n_iter"] = 3
    with pytest.raises(CheckpointError, match=r"optim.table.weight.n_iter: is a int"):
        store.save(state(5), net, optimizer)


def test_other_optimisers_are_saved_as_well(tmp_path) -> None:
    for number, kind in enumerate((torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop)):
        options: dict[str, Any] = {"momentum": 0.9} if kind is not torch.optim.Adagrad else {}
        net, other = made(0)[0], made(1)[0]
        optimizer, its_optimizer = (kind(n.parameters(), lr=1e-2, **options) for n in (net, other))
        stepped(net, optimizer, 1)
        store = CheckpointStore(tmp_path / str(number))
        store.save(state(1), net, optimizer)
        store.finish()
        found = store.newest()
        assert found is not None
        store.load(found, other, its_optimizer)
        assert [stepped(other, its_optimizer, s) for s in (2, 3)] == [
            stepped(net, optimizer, s) for s in (2, 3)
        ]


def test_the_newest_few_and_every_so_many_th_stay(tmp_path) -> None:
    saved(tmp_path, range(1, 12), keep_last=2, keep_every=4)
    assert names(tmp_path) == [f"step-{n:08d}" for n in (4, 8, 10, 11)]


@given(
    st.sets(st.integers(0, 60)),
    st.sets(st.integers(0, 60)),
    st.integers(2, 5),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_retention_never_takes_what_it_promised(whole, damaged, keep_last, keep_every) -> None:
    damaged = damaged - whole
    doomed = set(doomed_steps(list(whole), list(damaged), keep_last, keep_every))
    newest = sorted(whole)[-keep_last:]
    assert not doomed & set(newest) and doomed <= whole | damaged
    assert not doomed or len(newest) == keep_last
    assert not any(keep_every and step % keep_every == 0 for step in doomed & whole)
    assert not any(step > newest[0] for step in doomed)
    if len(newest) == keep_last:
        assert all(
            step in doomed or (keep_every and step % keep_every == 0) for step in whole if step < newest[0]
        )


def test_nothing_is_deleted_unless_what_stays_is_whole(tmp_path, monkeypatch) -> None:
    saved(tmp_path, range(1, 3))
    waits = retention.committed_steps

    def damage(folder: Path) -> list[int]:
        for step in (2, 3):  # of the right size, so only reading them shows it
            shard = next((folder / f"step-{step:08d}").glob("*.safetensors"))
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        return waits(folder)

    monkeypatch.setattr(retention, "committed_steps", damage)
    store = CheckpointStore(tmp_path)
    net, optimizer = made()
    stepped(net, optimizer, 3)
    store.save(state(3), net, optimizer)
    with pytest.warns(ScfmWarning, match="older ones are kept") as told:
        store.finish()
    assert "step-00000003" in str(told[0].message)
    with pytest.warns(ScfmWarning, match="step 1"):
        found = CheckpointStore(tmp_path).newest()
    assert found is not None and found.step == 1


def test_a_step_that_stands_in_the_way_is_set_aside(tmp_path) -> None:
    saved(tmp_path, range(1, 5), keep_last=9)
    net, optimizer = made(7)
    store = CheckpointStore(tmp_path, keep_last=9)
    store.save(state(3), net, optimizer)  # a new course of the run, from step 2 on
    with pytest.warns(ScfmWarning, match="set aside"):
        assert store.finish() == tmp_path / "step-00000003"
    stand = [name for name in names(tmp_path) if name.startswith("step")]
    assert stand == [f"step-{n:08d}" for n in (1, 2, 3)]
    assert (
        sum(
            name.startswith(("set-aside-step-00000003", "set-aside-step-00000004"))
            for name in names(tmp_path)
        )
        == 2
    )
    found = store.newest()
    assert found is not None and found.step == 3
    other, _ = made(1)
    store.load(found, other, None)
    assert torch.equal(other.table.weight, net.table.weight)


def test_leftovers_of_the_dead_are_cleared_and_the_living_are_left(tmp_path) -> None:
    saved(tmp_path)
    living = f".tmp-step-00000009-{host_name()}.{os.getpid()}.{start_time(os.getpid())}.00ff00ff"
    dead = [
        f".tmp-step-00000009-{host_name()}.{os.getpid()}.1.00ff00ff",
        f".old-step-00000001-{host_name()}.999999999.5.00ff00ff",
        ".tmp-step-00000009-elsewhere-0a0b0c0d.7.5.00ff00ff",
    ]
    others = ["notes.txt", ".tmp-step-x", "step-1", "step-00000007.bak"]
    for name in (living, *dead, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").touch()
    found = CheckpointStore(tmp_path).newest()
    assert found is not None and found.step == 2
    assert set(names(tmp_path)) == {living, *others, "step-00000001", "step-00000002"}


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").touch()
    net, optimizer = made()
    store = CheckpointStore(tmp_path / "file" / "checkpoints", on_storage_error="stop")
    store.save(state(1), net, optimizer)
    with pytest.raises(StorageError, match="file"):
        store.finish()


def test_arguments_are_checked(tmp_path) -> None:
    for options, named in (({"keep_last": 1}, "keep_last"), ({"keep_every": 0}, "keep_every")):
        with pytest.raises(InvalidArgumentError, match=named):
            CheckpointStore(tmp_path, **options)
    with pytest.raises(InvalidArgumentError, match="on_storage_error"):
        CheckpointStore(tmp_path, on_storage_error="ignore")  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 8))
def test_replicated_tensors_are_written_once_and_shared_out(sizes: list[int], world_size: int) -> None:
    tensors = {f"t{i}": torch.empty(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    shares = [owned_chunks(tensors, rank, world_size) for rank in range(world_size)]
    assert sorted(chunk.name for share in shares for chunk in share) == sorted(tensors)
    loads = [sum(chunk.values.nbytes for chunk in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_a_rank_without_tensors_writes_a_file_of_none(tmp_path) -> None:
    snapshot = Snapshot()
    for tensors in ({}, {"a": torch.ones(3)}, {}):
        snapshot.take(owned_chunks(tensors, 0, 1))
        path = tmp_path / f"{len(os.listdir(tmp_path))}.safetensors"
        assert atomic_file.create_once(path, snapshot.pieces())
        found = load_file(path)
        assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in found)
        assert read_header(path).keys() == tensors.keys()


def test_what_ranks_tell_fits_whatever_it_is() -> None:
    for text in ("x" * 5000, "ü" * 3000, "\u2028" * 900, ""):
        told = json.loads(_fitting({"kind": "StorageError", "text": text, "errno": 28}))
        assert told["kind"] == "StorageError" and told["errno"] == 28
        assert text.startswith(told["text"]) and len(told["text"]) >= min(len(text), 100)


def test_nothing_is_told_when_nothing_is_wrong(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, _ = saved(tmp_path, range(1, 5))
        store = CheckpointStore(tmp_path)
        found = store.newest()
        assert found is not None
        store.load(found, net, None)
    assert atomic_file.os is os
