"""What a resumed run refuses, repairs and never hides (fault rows 33, 60, 61, 63, 65)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from scfm.cli.main import app
from scfm.data.packed import PackedCells
from scfm.embed import embed_to_folder, export_store, verify_store
from scfm.errors import BadCellError, IntegrityError, ResourceError, ScfmError, ScfmWarning, VersionError


@pytest.fixture
def cells(tiny_adata, tmp_path) -> Path:
    tiny_adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def out(tiny_model, cells, tmp_path) -> Path:
    embed_to_folder([cells], tiny_model, tmp_path / "out", shard_size=10)
    return tmp_path / "out"


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shard_size": 11}, "shard_size: 10 -> 11"),
        ({"store_dtype": "float16"}, "store_dtype: float32 -> float16"),
        ({"layer": 0}, "layer: -1 -> 0"),
        ({"pooling": "mean"}, "pooling: cls -> mean"),
        ({"on_bad_cell": "nan"}, "on_bad_cell: error -> nan"),
        ({"assume_counts": True, "counts_layer": "X"}, "assume_counts: False -> True"),
        ({"keep_not_finite": True}, "keep_not_finite: False -> True"),
        ({"weights": True}, "model.weights_sha256"),
        ({"medians": True}, "model.tokenizer_sha256"),
        ({"dtype": "bfloat16"}, "compute_dtype: float32 -> bfloat16"),
        ({"input": True}, "files[0].crc32"),
        ({"more": True}, "files[1].name: absent -> more.h5ad"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_plan_is_refused_and_nothing_touched(
    tiny_model, tiny_adata, cells, out, change: dict[str, Any], named: str
) -> None:
    before, options, data = content(out), {"shard_size": 10}, [cells]
    for key, value in change.items():
        if key == "weights":
            with torch.no_grad():
                tiny_model.gene_table[9, 3] += 1e-3
        elif key == "medians":
            tiny_model.vocab = type(tiny_model.vocab).from_vocabulary(
                list(tiny_model.vocab.median), dict.fromkeys(tiny_model.vocab.median, 2.0), version="V2"
            )
        elif key == "dtype":
            tiny_model.set_compute_dtype(value)
        elif key == "input":
            tiny_adata.X.data[5] += 1
            tiny_adata.write_h5ad(cells)
        elif key == "more":
            data.append(Path(shutil.copy(cells, cells.with_name("more.h5ad"))))
        else:
            options[key] = value
    with pytest.raises(IntegrityError, match="another plan") as caught:
        embed_to_folder(data, tiny_model, out, **options)
    assert named in str(caught.value)
    assert content(out) == before


def test_a_copied_or_touched_file_goes_on(tiny_model, cells, out, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(cells, tmp_path / "elsewhere" / cells.name)
    (out / "part-00002.json").unlink()
    assert embed_to_folder([moved], tiny_model, out, shard_size=10).num_computed == 1


def test_plans_from_the_future_and_damaged_ones(tiny_model, cells, out) -> None:
    plan = json.loads((out / "plan.json").read_text())
    for change, error in (
        ({"format_version": 99}, VersionError),
        ({"plan": {**plan["plan"], "layer": 0}}, IntegrityError),
        ({"plan": {**plan["plan"], "shards": [1]}}, ScfmError),
        ({"format": "other"}, ScfmError),
        ({"plan": None}, ScfmError),
    ):
        (out / "plan.json").write_text(json.dumps({**plan, **change}))
        before = content(out)
        for call in (
            verify_store,
            lambda folder: embed_to_folder([cells], tiny_model, folder, shard_size=10),
        ):
            with pytest.raises(error):
                call(out)
        assert content(out) == before


DAMAGE = {
    "flipped bit": lambda p: p.write_bytes(p.read_bytes()[:-5] + bytes([p.read_bytes()[-5] ^ 1]) + p.read_bytes()[-4:]),
    "cut short": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "emptied": lambda p: p.write_bytes(b""),
    "removed": lambda p: p.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["npy", "json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_bit_rot_is_found_named_and_repaired(tiny_model, cells, out, tmp_path, damage, ending) -> None:
    good = content(out)
    rotten = out / f"part-00002.{ending}"
    DAMAGE[damage](rotten)
    report = verify_store(out)
    assert [problem.shard for problem in report.problems] == ["part-00002"] and report.num_good == 3
    with pytest.raises(ScfmError, match="part-00002"):
        export_store(out, tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()
    result = CliRunner().invoke(app, ["verify", str(out), "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["problems"][0]["shard"] == "part-00002"
    if (ending, damage) == ("json", "removed"):
        embed_to_folder([cells], tiny_model, out, shard_size=10, verify=True)
    else:
        with pytest.warns(ScfmWarning, match="part-00002 is set aside"):
            embed_to_folder([cells], tiny_model, out, shard_size=10, verify=True)
        assert damage == "removed" or (out / "set_aside" / f"{rotten.name}.1").exists()
    assert verify_store(out).ok
    for name, stamp in content(out).items():
        assert stamp[0] == good[name][0] or name == "part-00002.json"
        assert name.startswith("part-00002") or stamp == good[name]
    assert CliRunner().invoke(app, ["verify", str(out)]).exit_code == 0


def test_a_rotten_array_without_a_manifest_is_replaced(tiny_model, cells, out) -> None:
    good = content(out)
    (out / "part-00001.json").unlink()
    DAMAGE["flipped bit"](out / "part-00001.npy")
    embed_to_folder([cells], tiny_model, out, shard_size=10)
    assert content(out)["part-00001.npy"][0] == good["part-00001.npy"][0]
    assert (out / "set_aside" / "part-00001.npy.1").exists() and verify_store(out).ok


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_file_replaced_under_the_reader(tiny_model, tiny_adata, cells, tmp_path, monkeypatch, when) -> None:
    """Between plan and read, or while a shard of it is computed: nothing of the new file is committed."""
    tiny_adata.X.data[5] += 1
    tiny_adata.write_h5ad(tmp_path / "other.h5ad")

    def replace() -> None:
        os.replace(tmp_path / "other.h5ad", cells)

    from scfm.embed import run

    if when == "before":
        settle = run.settle_plan
        monkeypatch.setattr(run, "settle_plan", lambda *args: (replace(), settle(*args))[1])
    else:
        monkeypatch.setattr(type(tiny_model), "embed_batch", _after(replace, type(tiny_model).embed_batch))
    with pytest.raises(IntegrityError, match=r"cells\.h5ad"):
        embed_to_folder([cells], tiny_model, tmp_path / "out", shard_size=40)
    assert not list((tmp_path / "out").glob("part-*"))


def _after(action: Any, function: Any) -> Any:
    def both(*args: Any, **options: Any) -> Any:
        value = function(*args, **options)
        action()
        return value

    return both


def bad_outputs(model: Any, cell: int, value: float) -> Any:
    embed_batch = model.embed_batch

    def spoiled(packed: PackedCells, **options: Any) -> torch.Tensor:
        out = embed_batch(packed, **options)
        out[packed.cell_ids == cell, 3] = value
        return out

    return spoiled


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_for_another_reason_stops_the_run_and_names_the_row(
    tiny_model, cells, tmp_path, monkeypatch, value
) -> None:
    monkeypatch.setattr(tiny_model, "embed_batch", bad_outputs(tiny_model, 7, value))
    with pytest.raises(BadCellError, match="NaN or infinity in their embedding: rows 7"):
        tiny_model.embed(cells, on_bad_cell="nan")
    with pytest.raises(BadCellError, match="rows 7"):
        embed_to_folder([cells], tiny_model, tmp_path / "out", on_bad_cell="nan", shard_size=10)
    assert not list((tmp_path / "out").glob("part-*.json"))
    monkeypatch.setattr(tiny_model, "embed_batch", only_second(tiny_model))
    with pytest.raises(BadCellError, match="rows 17"):
        embed_to_folder([cells], tiny_model, tmp_path / "out2", shard_size=10)


def only_second(model: Any) -> Any:
    """Spoils cell 7 of the second shard only: row 17."""
    spoiled, plain, calls = model.embed_batch, type(model).embed_batch, []

    def embed_batch(packed: PackedCells, **options: Any) -> torch.Tensor:
        calls.append(1)
        return plain(model, packed, **options) if len(calls) == 1 else spoiled(packed, **options)

    return embed_batch


def test_nan_that_is_allowed_is_counted(tiny_model, cells, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tiny_model, "embed_batch", bad_outputs(tiny_model, 7, np.nan))
    summary = embed_to_folder([cells], tiny_model, tmp_path / "out", shard_size=10, keep_not_finite=True)
    assert summary.num_not_finite == 4
    assert json.loads((tmp_path / "out" / "part-00001.json").read_text())["not_finite"] == [17]
    assert verify_store(tmp_path / "out").num_not_finite == 4


def test_numbers_too_large_for_float16_are_an_error(tiny_model, cells, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tiny_model, "embed_batch", bad_outputs(tiny_model, 7, 1e6))
    with pytest.raises(BadCellError, match="row 7"):
        embed_to_folder([cells], tiny_model, tmp_path / "out", store_dtype="float16")


FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("limit", [100, 333, 1000])
def test_out_of_memory_halves_the_budget_and_changes_nothing(
    tiny_model, cells, tmp_path, monkeypatch, failure: Exception, limit: int
) -> None:
    good = tiny_model.embed(cells)
    embed_batch, sizes = tiny_model.embed_batch, []

    def tight(packed: PackedCells, **options: Any) -> torch.Tensor:
        sizes.append(packed.num_tokens)
        if packed.num_tokens > limit:
            raise failure
        return embed_batch(packed, **options)

    monkeypatch.setattr(tiny_model, "embed_batch", tight)
    with pytest.warns(ScfmWarning, match="out of memory with"):
        np.testing.assert_array_equal(tiny_model.embed(cells, token_budget=1500), good)
    failed = [size for size in sizes if size > limit]
    assert failed == sorted(set(failed), reverse=True)  # never as much again as has failed
    with pytest.warns(ScfmWarning):
        summary = embed_to_folder([cells], tiny_model, tmp_path / "out", shard_size=40, token_budget=1500)
    assert summary.num_halvings > 0
    stored = np.load(tmp_path / "out" / "part-00000.npy")
    np.testing.assert_array_equal(stored, good)


def test_the_budget_grows_back_but_never_to_what_failed() -> None:
    from scfm.models.token_budget import TokenBudget

    budget = TokenBudget(1000)
    with pytest.warns(ScfmWarning):
        budget.halve(900)
    for _ in range(2000):
        budget.succeeded()
    assert 850 < budget.tokens < 900


def test_one_cell_that_does_not_fit_is_named(tiny_model, tiny_adata, cells, tmp_path, monkeypatch) -> None:
    embed_batch = tiny_model.embed_batch

    def never(packed: PackedCells, **options: Any) -> torch.Tensor:
        if 3 in packed.cell_ids:
            raise MemoryError
        return embed_batch(packed, **options)

    monkeypatch.setattr(tiny_model, "embed_batch", never)
    with pytest.warns(ScfmWarning), pytest.raises(ResourceError, match=r"cells\.h5ad.*row 3\b"):
        tiny_model.embed(cells)


def test_other_errors_of_a_computation_pass_through(tiny_model, cells, monkeypatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(tiny_model, "embed_batch", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        tiny_model.embed(cells)
