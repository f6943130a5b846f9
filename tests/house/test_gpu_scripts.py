"""`make test-gpu` and `make bench-gpu` on a bare machine: the dry runs, with torch, triton and numpy and nothing else.

The children see a folder with those packages and what they require, no site-packages and no installed scfm.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benches" / "gpu"
OPERATORS = (
    "varlen_attention",
    "generative_attention",
    "graph_attention",
    "favor_attention",
    "embed_norm",
    "masked_head_loss",
)


def required(names: list[str]) -> set[str]:
    """The packages of these names and all that they require, as installed here."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in found:
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        names += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine that has torch, triton and numpy."""
    folder = tmp_path_factory.mktemp("bare")
    for name in required(["torch", "triton", "numpy"]):
        package = distribution(name)
        for first in {file.parts[0] for file in package.files or [] if file.parts[0] != ".."}:
            if not (folder / first).exists():
                (folder / first).symlink_to(package.locate_file(first))
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    return {**kept, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def start(script: str, *arguments: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-S", "-B", str(SCRIPTS / script), *arguments]
    return subprocess.Popen(
        command, env=env, cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def said_by(child: subprocess.Popen[str]) -> str:
    said, _ = child.communicate(timeout=300)
    return said


@pytest.fixture(scope="module")
def dry_runs(bare, tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
    """Both scripts' dry runs, side by side: (exit status, what was said, the file that was asked for)."""
    out = tmp_path_factory.mktemp("figures") / "figures.json"
    children = {
        "check.py": start("check.py", "--device", "cpu", "--seed", "0", "--dtype", "bfloat16", env=bare),
        "bench.py": start("bench.py", "--device", "cpu", "--tiny", "--out", str(out), env=bare),
    }
    return {
        name: (child.returncode, text, out) for name, child in children.items() for text in [said_by(child)]
    }


def test_the_bare_machine_is_bare(bare) -> None:
    program = "import torch, triton, numpy\ntry: import pandas\nexcept ImportError: print('bare')"
    done = subprocess.run([sys.executable, "-S", "-c", program], env=bare, capture_output=True, text=True)
    assert done.stdout == "bare\n", done.stderr


def test_every_operator_is_checked(dry_runs) -> None:
    status, said, _ = dry_runs["check.py"]
    assert status == 0, said
    for operator in OPERATORS:
        assert re.search(rf"^ok     {operator} triton bfloat16, .*the same bits twice", said, re.MULTILINE), (
            said
        )
        assert re.search(rf"^ok     {operator} torch bfloat16, ", said, re.MULTILINE), said
    assert re.search(r"^ok     varlen_attention triton .* one query a cell.* alone$", said, re.MULTILINE)
    assert re.search(r"^ok     favor_attention triton .* maximum of the batch", said, re.MULTILINE)
    assert re.search(
        r"^skip   varlen_attention torch_varlen bfloat16: computes on a GPU$", said, re.MULTILINE
    )
    assert re.search(r"^skip   rank_value cuda: computes on a GPU$", said, re.MULTILINE)
    counts = re.search(r"^(\d+) passed, (\d+) failed, (\d+) skipped in \d+ s$", said.splitlines()[-1])
    words = [line.split(maxsplit=1)[0] for line in said.splitlines() if line]
    assert counts and [int(n) for n in counts.groups()] == [
        words.count(word) for word in ("ok", "FAILED", "skip")
    ]


def test_every_section_is_timed(dry_runs) -> None:
    status, said, out = dry_runs["bench.py"]
    assert status == 0, said
    sections = json.loads(out.read_text(encoding="utf-8"))["sections"]
    assert list(sections) == [
        "varlen", "generative", "graph", "favor", "embed_norm", "masked_head_loss", "end_to_end", "small_calls"
    ]  # fmt: skip
    for name, section in sections.items():
        assert section["torch"] and section["commit"] and section["peak_tflop_per_s_bfloat16"] >= 0, name
        ours = [row for row in section["rows"] if row["contender"].startswith("scfm")]
        assert any("absent" not in row for row in ours), (name, said)
        for row in section["rows"]:
            assert row.get("absent") or row.get("milliseconds") is not None or row.get("rate"), row


def test_peers_that_are_not_here_are_listed(dry_runs) -> None:
    rows = json.loads(dry_runs["bench.py"][2].read_text(encoding="utf-8"))["sections"]["varlen"]["rows"]
    absent = {row["contender"]: row["absent"] for row in rows if row.get("absent")}
    assert (
        absent["torch varlen_attn"] == absent["flash-attn 2"] == absent["flash-attn 3"] == "computes on a GPU"
    )
    timed = {row["contender"] for row in rows if not row.get("absent")}
    assert {"scfm triton", "torch SDPA, padded", "torch SDPA, dense"} <= timed


@pytest.mark.parametrize("script", ["check.py", "bench.py"])
def test_without_a_gpu_nothing_is_run(bare, script) -> None:
    child = start(script, env=bare)
    said = said_by(child)
    assert child.returncode == 3
    assert said.startswith("Nothing was run: torch") and len(said.splitlines()) == 1


def test_the_cpu_is_benched_tiny_or_not_at_all(bare) -> None:
    child = start("bench.py", "--device", "cpu", env=bare)
    assert "only --tiny" in said_by(child) and child.returncode == 2
