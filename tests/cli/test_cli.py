"""The verbs end to end on a small model: results, --json, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
from typer.testing import CliRunner

import scfm
from scfm.cli.doctor import _gpu, _joined
from scfm.cli.main import app

runner = CliRunner()


def run(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result.stdout


def run_json(*arguments: object, code: int = 0) -> dict:
    return json.loads(run(*arguments, "--json", code=code))


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return tiny_model.save(tmp_path / "model")


@pytest.fixture
def data(tiny_adata, tmp_path) -> Path:
    tiny_adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_embed_to_npy_and_to_a_copy(model, data, tiny_model, tmp_path) -> None:
    facts = run_json("embed", data, "--model", model, "--out", tmp_path / "x.npy", "--dtype", "float32")
    assert facts["ok"] and facts["shape"] == [40, 32] and facts["dtype"] == "float32"
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), tiny_model.embed(data))
    run(
        "embed",
        data,
        "-m",
        model,
        "-o",
        tmp_path / "out.h5ad",
        "--dtype",
        "float32",
        "--pooling",
        "mean",
        "-q",
    )
    np.testing.assert_array_equal(
        ad.read_h5ad(tmp_path / "out.h5ad").obsm["X_geneformer"], tiny_model.embed(data, pooling="mean")
    )


def test_bad_input_is_exit_code_3_and_says_why(model, data, tmp_path) -> None:
    facts = run_json("embed", tmp_path / "no.h5ad", "-m", model, "-o", tmp_path / "x.npy", code=3)
    assert not facts["ok"] and "no.h5ad" in facts["message"]
    assert run_json("embed", data, "-m", tmp_path / "nowhere", "-o", tmp_path / "x.npy", code=3)["code"]
    run("embed", data, "-m", model, "-o", tmp_path / "x.txt", code=3)
    run("embed", data, "-m", model, "-o", tmp_path / "gone" / "x.npy", code=3)
    assert not list(tmp_path.glob("*.npy"))
    run("embed", code=2)


def test_tokenize_holds_the_tokens(model, data, tiny_model, tmp_path) -> None:
    from safetensors.torch import load_file

    facts = run_json("tokenize", data, "--dictionaries", model, "--out", tmp_path / "t.safetensors")
    stored = load_file(tmp_path / "t.safetensors")
    packed = tiny_model.tokenizer(scfm.read(data))
    assert facts["num_cells"] == 40
    np.testing.assert_array_equal(
        stored["cu_seqlens"], scfm.GeneformerTokenizer(tiny_model.vocab)(data).cu_seqlens
    )
    assert stored["cell_ids"].tolist() == packed.cell_ids.tolist()


def test_inspect_shows_data_and_models(model, data) -> None:
    facts = run_json("inspect", data, "--dictionaries", model)
    assert (
        facts["cells"] == 40 and facts["raw counts"] == "X" and "120 of 120 genes" in facts["gene coverage"]
    )
    facts = run_json("inspect", model)
    assert facts["family"] == "geneformer" and facts["config"]["num_layers"] == 2


def test_convert_gives_the_same_model(model, tiny_model, data, tmp_path) -> None:
    run("convert", model, tmp_path / "converted")
    again = scfm.load(tmp_path / "converted", dtype="float32")
    np.testing.assert_array_equal(again.embed(data), tiny_model.embed(data))
    run("convert", model, tmp_path / "converted", code=3)


def test_doctor_names_the_paths() -> None:
    facts = run_json("doctor")
    assert facts["native path"] in facts["instruction sets"] and facts["packages"]["torch"]
    assert {"varlen_attention", "graph_attention", "embed_norm"} < set(facts["operators"])
    for verdicts in facts["operators"].values():
        assert [verdict["chosen"] for verdict in verdicts] == [True] + [False] * (len(verdicts) - 1)
        assert all(verdict["why"] and verdict["what"] for verdict in verdicts)


def test_doctor_explains_every_device_and_dtype() -> None:
    facts = run_json("doctor")
    assert "cpu" in facts["paths"] and facts["device"] in facts["paths"]
    for of_device in facts["paths"].values():
        assert of_device["order"]
        for name, by_dtype in of_device["operators"].items():
            assert list(by_dtype) == ["float32", "bfloat16", "float16"]
            orders = [[verdict["path"] for verdict in verdicts] for verdicts in by_dtype.values()]
            assert orders[0] == orders[1] == orders[2], name
            assert all(sum(v["chosen"] for v in verdicts) == 1 for verdicts in by_dtype.values())


def test_doctor_prints_the_path_of_every_operator() -> None:
    shown = runner.invoke(app, ["doctor"]).output
    assert "Operators on cpu" in shown and "Their order: our C++ kernels before torch's" in shown
    assert re.search(r"varlen_attention -> (native|torch)\n", shown)
    assert re.search(r"-> \w+, [^\n]+: the fastest that can", shown)
    assert re.search(r"triton, scfm's Triton kernels: (computes on a GPU|needs|triton)", shown)


def test_doctor_groups_dtypes_that_share_a_reason() -> None:
    assert _joined({"float32": "a", "bfloat16": "b", "float16": "b"}) == "a (float32); b (bfloat16, float16)"
    assert _joined({"float32": "a", "bfloat16": "a"}) == "a"


def test_doctor_names_the_gpu(monkeypatch) -> None:
    assert _gpu().startswith("none: ")
    card = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    assert _gpu() == "Some GPU, compute capability 9.0, 141 GiB, 2 of them"


def test_pretrain_from_settings(tiny_adata, tmp_path) -> None:
    from scfm.data.gene_tables import human_symbols

    tiny_adata.var_names = sorted({g for genes in human_symbols().values() for g in genes})[:120]
    tiny_adata.write_h5ad(tmp_path / "cells.h5ad")
    settings = tmp_path / "run.toml"
    settings.write_text(
        f'data = ["{tmp_path}/cells.h5ad"]\nout = "{tmp_path}/run"\nnum_layers = 1\nhidden_size = 16\n'
        "num_heads = 2\nffn_size = 16\nmax_tokens = 64\nheld_out_fraction = 0.2\n"
    )
    facts = run_json("pretrain", settings, "num_epochs=1")
    assert facts["ok"] and facts["steps"] > 0 and facts["stopped"] is None
    assert scfm.load(facts["model"]).config.hidden_size == 16
    lines = [json.loads(line) for line in Path(facts["metrics"]).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, facts["steps"] + 1))
    assert run_json("pretrain", settings, "num_epochs=1")["steps"] == facts["steps"]  # found finished
    facts = run_json("pretrain", settings, "num_epochs=2", code=3)
    assert "num_epochs" in facts["message"]
    facts = run_json("pretrain", settings, "num_epochz=1", code=3)
    assert "num_epochs" in facts["message"]


def test_version() -> None:
    assert run("--version").strip() == scfm.__version__


def test_embed_into_a_folder_verify_and_export(model, data, tiny_model, tmp_path) -> None:
    command = ("embed", data, "-m", model, "-o", tmp_path / "out", "--dtype", "float32", "--shard-size", 16)
    facts = run_json(*command)
    assert facts["ok"] and facts["complete"] and facts["num_computed"] == 3 and facts["num_cells"] == 40
    assert run_json(*command, "--verify")["num_computed"] == 0
    run(*command, "-q")
    facts = run_json(*command[:-1], 17, code=3)
    assert facts["code"] == "integrity" and "shard_size: 16 -> 17" in facts["message"]
    assert run_json("verify", tmp_path / "out")["ok"]
    run("verify", tmp_path / "out")
    facts = run_json("export", tmp_path / "out", tmp_path / "x.npy")
    assert facts["shape"] == [40, 32]
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), tiny_model.embed(data))
    run("export", tmp_path / "out", tmp_path / "x.h5ad", "--key", "X_e")
    assert ad.read_h5ad(tmp_path / "x.h5ad").obsm["X_e"].shape == (40, 32)
    (tmp_path / "out" / "part-00001.json").unlink()
    facts = run_json("verify", tmp_path / "out", code=1)
    assert [(p["shard"], p["kind"]) for p in facts["problems"]] == [("part-00001", "missing")]
    assert run_json("export", tmp_path / "out", tmp_path / "y.npy", code=3)["code"] == "missing_file"
    run("verify", tmp_path, code=3)
    run("embed", data, data, "-m", model, "-o", tmp_path / "y.npy", code=3)
    run("embed", data, "-m", model, "-o", data, code=3)
