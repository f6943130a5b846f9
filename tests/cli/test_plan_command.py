"""``scfm plan``: the settings of a run checked, its cost in words and as JSON, an exit code where it would not fit."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from scfm.cli.main import app
from scfm.data.gene_tables import human_symbols

runner = CliRunner()
GUESS = ("--cells", 1_000_000, "--tokens-per-cell", 2000)


def run(*arguments: object, code: int = 0):
    result = runner.invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def run_json(*arguments: object, code: int = 0) -> dict:
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def settings(tiny_adata, tmp_path):
    tiny_adata.var_names = sorted({g for genes in human_symbols().values() for g in genes})[:120]
    tiny_adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "run.toml").write_text(
        f'data = ["cells.h5ad"]\ndata_folder = "{tmp_path}"\nout = "{tmp_path}/run"\nnum_layers = 1\n'
        "hidden_size = 16\nnum_heads = 2\nffn_size = 16\nmax_tokens = 64\ntoken_budget = 512\nnum_epochs = 2\n"
    )
    return tmp_path / "run.toml"


def test_from_the_data_of_the_settings(settings, tmp_path) -> None:
    found = run_json(settings, "--num-gpus", 2, "--price", 2.5)
    assert found["ok"] and found["cells"] == 40 and found["epochs"] == 2 and not found["guessed"]
    assert found["gpu"] == "H100" and found["cost"] == pytest.approx(2.5 * found["gpu_hours"])
    assert set(found["memory_per_gpu"]) >= {"ddp", "fsdp", "hsdp", "ddp, every block recomputed"}
    assert found["problems"] == []
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["corpus"]


def test_without_data_in_words(tmp_path) -> None:
    shown = run("preset=V2-104M", f"out={tmp_path}/run", "num_epochs=1", *GUESS, "--gpu", "a100").stderr
    for text in ("1,000,000 (guessed)", "1 x A100", "40% of 312 TFLOP/s", "GPU hours", "Memory of a GPU"):
        assert text in shown
    assert not (tmp_path / "run").exists()


def test_on_this_processor(monkeypatch) -> None:
    monkeypatch.setattr("scfm.train.cost.device_peaks.measured_peak_flops", lambda dtype: 2e11)
    found = run_json("precision=float32", *GUESS, "--gpu", "cpu", "--mfu", 0.5)
    assert found["gpu"] == "cpu" and found["seconds"] * 0.5 * 2e11 == pytest.approx(found["flops"])


def test_what_cannot_be_is_told_apart(settings) -> None:
    found = run_json("preset=V2-316M", "token_budget=524288", *GUESS, "--gpu", "A100-40GB", code=3)
    assert not found["ok"] and "do not fit" in found["problems"][0]
    assert "do not fit" in run("preset=V2-316M", "token_budget=524288", *GUESS, code=3).stderr
    assert "num_epochs" in run_json(settings, "num_epochz=1", code=3)["message"]
    assert "K80" in run_json(settings, "--gpu", "K80", code=3)["message"]
    assert "microbatches_per_step" in run_json(settings, "--num-gpus", 3, code=3)["message"]
    assert "--cells" in run_json(settings, "--cells", 10, code=3)["message"]
    assert run_json("data=no.h5ad", code=3)["code"] == "missing_file"
