"""What `make bench-gpu` keeps and compares: sections replaced one by one, contenders that compute the same."""

from __future__ import annotations

import json
from types import SimpleNamespace

import bench
import contenders
import pytest
import rows
import torch
from timing import Clock, Peaks

from scfm import ops

PEAKS = Peaks(2.0, 10.0)


def measure(*peers: rows.Contender) -> list[rows.Row]:
    subject = rows.Subject("varlen_attention", "a shape", "float32", 1e-6, goals={"forward": 400.0})
    return rows.measure(subject, peers, Clock("cpu"), PEAKS)


@pytest.fixture
def pack() -> contenders.Pack:
    return contenders.random_pack([3, 1, 5, 4, 2, 5, 1, 1, 6, 2], 2, 8, torch.float32, "cpu")


@pytest.fixture
def ours(pack) -> rows.Contender:
    cells = pack.cu_seqlens
    call = lambda q, k, v: ops.varlen_attention_reference(q, k, v, cells)  # noqa: E731
    return rows.Contender("scfm", pack.qkv, {"": call}, is_ours=True)


def test_peers_compute_what_we_compute(pack, ours) -> None:
    """More cells than a batch, of many lengths: padded, sorted and put back in order."""
    found = measure(contenders.padded_peer(pack), ours)
    assert [row.contender for row in found if row.direction == "forward"] == ["scfm", "torch SDPA, padded"]
    assert not [row.absent for row in found if row.absent]
    assert {row.direction for row in found} == {"forward", "forward+backward", "backward"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_keeps_to_its_cells(pack, ours) -> None:
    found = measure(ours, contenders.flex_peer(pack))
    flex = [row for row in found if row.contender.startswith("torch Flex")]
    assert flex[0].direction == "forward"
    assert "does not support backward on CPU" in (flex[-1].absent or "")


def test_a_contender_that_computes_something_else_is_none(pack, ours) -> None:
    wrong = rows.Contender("wrong", pack.qkv, {"a": lambda q, k, v: v * 1.5, "b": lambda q, k, v: v / 0})
    absent = [row.absent for row in measure(ours, wrong) if row.contender == "wrong"]
    assert len(absent) == 2 and "of the largest value away from ours" in absent[0]


def test_the_fastest_way_of_a_peer_stands(pack, ours) -> None:
    class Slow(Clock):
        calls = 0

        def time(self, call):
            self.calls += 1
            return rows.Time(*[10.0 - self.calls] * 2)  # each later call is faster

    call = ours.ways[""]
    peer = rows.Contender("peer", pack.qkv, {"one": call, "two": call})
    found = rows.measure(rows.Subject("a", "b", "c", 1.0), [ours, peer], Slow("cpu"), PEAKS)
    assert [row.contender for row in found if row.direction == "forward"] == ["scfm", "peer (two)"]


def test_rates_shares_and_ratios() -> None:
    subject = rows.Subject("a", "b", "c", work=3.0, goals={"forward": 400.0})
    row = rows._row(subject, "peer", "forward", rows.Time(6.0, 5.0), Peaks(1000.0, 1.0), ours=2.0)
    assert (row.rate, row.share_of_peak, row.ratio, row.goal) == (500.0, 0.5, 3.0, 400.0)
    back = rows._row(subject, "peer", "backward", rows.Time(6.0, 5.0), Peaks(1000.0, 1.0), ours=None)
    assert (back.rate, back.ratio, back.goal) == (1250.0, None, None)


def test_a_part_of_a_run_replaces_its_sections_only(tmp_path) -> None:
    path = tmp_path / "results" / "some-gpu.json"
    facts = {"gpu": "Some GPU", "commit": "one"}
    bench._keep(path, facts, "graph", {"rows": [1]})
    bench._keep(path, facts, "varlen", {"rows": [2]})
    bench._keep(path, {**facts, "commit": "two"}, "graph", {"rows": [3]})
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["gpu"] == "Some GPU" and list(kept["sections"]) == ["varlen", "graph"]
    assert kept["sections"]["graph"] == {"gpu": "Some GPU", "commit": "two", "rows": [3]}
    assert kept["sections"]["varlen"]["commit"] == "one"
    assert [p.name for p in path.parent.iterdir()] == ["some-gpu.json"]


def test_a_call_is_timed_by_itself_behind_a_cold_cache(monkeypatch) -> None:
    """With stand-ins for CUDA: what is queued, in which order, and what is made of the times."""
    queued: list[str] = []
    elapsed = iter([5.0] * 3 + [3.0, 1.0, 2.0] * 100)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queued.append("event")

        def elapsed_time(self, other: Event) -> float:
            return next(elapsed)

    card = SimpleNamespace(L2_cache_size=1 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queued.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queued.append("sleep"))
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **keywords: SimpleNamespace(zero_=lambda: queued.append("flush"))
    )
    found = Clock("cuda").time(lambda: queued.append("call"))
    assert (found.median, found.minimum) == (2.0, 1.0)
    warm_up, measured = queued[:4], queued[4 + 15 + 1 :]
    assert warm_up == ["call"] * 3 + ["wait"]
    assert measured[:10] == ["flush", "sleep", "event", "call", "event"] * 2
    assert measured.count("call") == 80 and measured[-1] == "wait"  # 400 ms at 5 ms a call
