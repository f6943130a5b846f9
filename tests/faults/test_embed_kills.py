"""Killed at any moment, resumed, and the bytes are the same (fault rows 58, 59, 64)."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from embed_server import Children

from scfm.data.crash_points import EMBED_POINTS
from scfm.data.lease import LeaseWatcher
from scfm.embed.plan import read_plan
from scfm.embed.verify import verify_store
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.tokenize.dictionaries import GeneformerDictionaries

SHARD = {"shard_size": 16}
GENES = [f"ENSG{i:011d}" for i in range(1, 121)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def data(folder: Path) -> list[Path]:
    paths = [folder / "a.h5ad", folder / "b.h5ad"]
    for seed, (path, num_cells) in enumerate(zip(paths, (100, 23), strict=True)):
        counts = np.random.default_rng(seed).poisson(0.8, size=(num_cells, len(GENES))).astype(np.float32)
        ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=GENES)).write_h5ad(path)
    return paths


@pytest.fixture(scope="module")
def children(folder: Path) -> Iterator[Children]:
    config = GeneformerConfig(
        num_layers=1, hidden_size=32, num_heads=2, ffn_size=32, max_tokens=96, vocab_size=len(GENES) + 4,
        hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.3,
    )  # fmt: skip
    vocab = GeneformerDictionaries.from_vocabulary(GENES, dict.fromkeys(GENES, 1.0), version="V2")
    Geneformer.from_config(config, vocab, seed=1).save(folder / "model")
    children = Children(folder / "model")
    yield children
    children.close()


@pytest.fixture(scope="module")
def undisturbed(children: Children, data: list[Path], folder: Path) -> dict[str, bytes]:
    code, said = children.run(data, folder / "undisturbed", layer=0, **SHARD)
    assert code == 0 and said["summary"]["complete"] and said["summary"]["num_computed"] == 9, said
    return arrays(folder / "undisturbed")


def arrays(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*.npy"))}


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Of every finished shard's two files: when and under which inode they were written."""
    files = [f for m in out.glob("part-*.json") for f in (m, m.with_suffix(".npy"))]
    return {f.name: (f.stat().st_mtime_ns, f.stat().st_ino) for f in files}


def expect_whole(out: Path, undisturbed: dict[str, bytes]) -> None:
    assert arrays(out) == undisturbed
    report = verify_store(out)
    assert report.ok and not report.leftovers and not report.unknown, report


@pytest.mark.parametrize("point", EMBED_POINTS)
def test_killed_at_every_point(children, data, undisturbed, tmp_path, point: str) -> None:
    out = tmp_path / "out"
    code, _ = children.run(data, out, layer=0, env={"SCFM_CRASH_AT": f"{point}:3"}, **SHARD)
    assert code == -signal.SIGKILL
    before = finished(out)
    assert len(before) == 2 * (3 if point == "after_manifest" else 2)
    # An array may stand without its manifest; whatever stands under a final name is whole.
    assert all(undisturbed[name] == content for name, content in arrays(out).items())
    assert not verify_store(out).ok
    code, said = children.run(data, out, layer=0, **SHARD)
    assert code == 0 and said["summary"]["complete"], said
    assert said["summary"]["num_computed"] == 9 - len(before) // 2
    assert {name: stamp for name, stamp in finished(out).items() if name in before} == before
    expect_whole(out, undisturbed)


def test_killed_at_random_moments(children, data, undisturbed, tmp_path) -> None:
    generator = np.random.default_rng(0)
    kills = run = 0
    while kills < 15:
        out = tmp_path / f"out{run}"
        run += 1
        complete = False
        while not complete:
            before = finished(out)
            pid = children.start(data, out, layer=0, slow=0.02, **SHARD)
            if kills < 15:
                time.sleep(generator.uniform(0.0, 0.25))
                os.kill(pid, signal.SIGKILL)
            code, said = children.wait(pid)
            kills += code == -signal.SIGKILL
            complete = code == 0 and said["summary"]["complete"]
            now = finished(out)
            assert {name: now[name] for name in before} == before
        expect_whole(out, undisturbed)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_share_a_folder_and_each_shard_is_made_once(
    children, data, undisturbed, tmp_path, num_workers
) -> None:
    out = tmp_path / "out"
    pids = [
        children.start(
            data, out, layer=0, slow=0.03, env={"RANK": str(rank), "WORLD_SIZE": str(num_workers)}, **SHARD
        )
        for rank in range(num_workers)
    ]
    said = [children.wait(pid) for pid in pids]
    assert all(code == 0 and told["summary"]["complete"] for code, told in said), said
    assert sum(told["summary"]["num_computed"] for _, told in said) == 9
    assert max(told["summary"]["num_computed"] for _, told in said) < 9
    expect_whole(out, undisturbed)


def test_the_shard_of_a_killed_worker_is_taken_over(children, data, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    first = children.start(data, out, layer=0, slow=0.4, lease_seconds=0.6, **SHARD)
    while not list(out.glob("*.lease")):
        time.sleep(0.01)
    second = children.start(data, out, layer=0, lease_seconds=0.6, **SHARD)
    os.kill(first, signal.SIGKILL)
    assert children.wait(first)[0] == -signal.SIGKILL
    code, said = children.wait(second)
    assert code == 0 and said["summary"]["complete"] and said["summary"]["num_computed"] == 9, said
    expect_whole(out, undisturbed)


def foreign_lease(out: Path, index: int, beat: int, skew: float) -> None:
    """The lease of a worker on another machine, whose clock is off by ``skew`` seconds."""
    path = out / read_plan(out).shards[index].lease_name
    path.write_text(json.dumps({"host": "elsewhere-00000000", "pid": 7, "started": "1", "beat": beat}))
    os.utime(path, (time.time() + skew, time.time() + skew))


@pytest.mark.parametrize("skew", [-3600.0, 0.0, 3600.0])
def test_leases_are_judged_by_change_and_not_by_clocks(children, data, undisturbed, tmp_path, skew) -> None:
    out = tmp_path / "out"
    code, said = children.run(data, out, layer=0, env={"SCFM_CRASH_AT": "after_manifest:1"}, **SHARD)
    assert code == -signal.SIGKILL
    foreign_lease(out, 4, beat=0, skew=skew)
    pid = children.start(data, out, layer=0, lease_seconds=0.7, **SHARD)
    deadline = time.monotonic() + 1.6
    beat = 0
    while time.monotonic() < deadline:  # alive for longer than a lease lasts
        beat += 1
        foreign_lease(out, 4, beat=beat, skew=skew)
        time.sleep(0.1)
        assert not (out / "part-00004.json").exists()
    code, said = children.wait(pid)  # now it is silent, and is taken over
    assert code == 0 and said["summary"]["complete"], said
    expect_whole(out, undisturbed)


def test_without_waiting_a_worker_leaves_what_others_hold(children, data, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    children.run(data, out, layer=0, env={"SCFM_CRASH_AT": "after_manifest:1"}, **SHARD)
    foreign_lease(out, 4, beat=1, skew=0.0)
    code, said = children.run(data, out, layer=0, wait=False, **SHARD)
    assert code == 0 and not said["summary"]["complete"] and said["summary"]["num_done"] == 8
    (out / read_plan(out).shards[4].lease_name).unlink()
    assert children.run(data, out, layer=0, **SHARD)[1]["summary"]["num_computed"] == 1
    expect_whole(out, undisturbed)


def test_a_lease_renewed_at_the_last_moment_stays(children, data, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    children.run(data, out, layer=0, env={"SCFM_CRASH_AT": "after_manifest:1"}, **SHARD)
    lease = out / read_plan(out).shards[4].lease_name
    watcher = LeaseWatcher(lease_seconds=0.05)
    foreign_lease(out, 4, beat=1, skew=0.0)
    assert not watcher.is_stale(lease)
    time.sleep(0.06)
    assert watcher.is_stale(lease)
    foreign_lease(out, 4, beat=2, skew=0.0)
    watcher.clear(lease)
    assert lease.exists()


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(children, data, undisturbed, tmp_path) -> None:
    from scfm.data.process_name import host_name

    out = tmp_path / "out"
    code, _ = children.run(data, out, layer=0, env={"SCFM_CRASH_AT": "before_link:2"}, **SHARD)
    assert code == -signal.SIGKILL and len(list(out.glob("*.tmp"))) == 1
    living = out / f"part-00099.npy.{host_name()}.{os.getpid()}.abcd.tmp"
    elsewhere = out / "part-00099.npy.other-00000000.1.abcd.tmp"
    living.touch()
    elsewhere.touch()
    assert children.run(data, out, layer=0, **SHARD)[0] == 0
    assert set(out.glob("*.tmp")) == {living, elsewhere}
    assert arrays(out) == undisturbed
