"""The whole demo, in little, both kinds: every file is there, the numbers agree with the verdict, and nothing leaks."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pytest

from scfm.errors import InvalidArgumentError

pytest.importorskip("scanpy")
pytest.importorskip("matplotlib")
run_module = pytest.importorskip("scfm.demo.run")
from_scratch = pytest.importorskip("scfm.demo.from_scratch")
with_mini = pytest.importorskip("scfm.demo.with_mini")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_module.run_demo(tmp_path_factory.mktemp("demo") / "out", quick=True, pretrain=True)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    """The demo without training."""
    return run_module.run_demo(tmp_path_factory.mktemp("mini") / "out", quick=True)


def test_the_shipped_model_is_judged_at_once(at_once):
    assert sorted(path.name for path in at_once.folder.iterdir()) == sorted(with_mini.PRODUCTS)
    assert at_once.masked is None
    rows = {row.name: row.role for row in at_once.embedding.rows}
    assert rows == {
        "scfm-mini": "ours",
        "PCA-50": "baseline",
        "raw HVG": "baseline",
        "random weights": "control",
        "commonest label": "control",
    }
    content = json.loads((at_once.folder / "report.json").read_text())
    assert content["verdict"] == at_once.verdict and content["model"] == "scfm-mini"
    assert content["embedding"] == json.loads(json.dumps(at_once.embedding.to_dict()))
    text = (at_once.folder / "report.md").read_text()
    assert at_once.verdict in text and at_once.embedding.to_markdown() in text
    assert "scfm demo --pretrain" in at_once.text and at_once.embedding.to_text() in at_once.text
    for name in ("umap.png", "umap_pca.png"):
        assert (at_once.folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_shipped_model_gives_the_saved_embedding(at_once):
    from scfm.models.load import load

    cells = anndata.read_h5ad(at_once.folder / "cells.h5ad")
    again = load("scfm-mini").embed(cells)
    np.testing.assert_allclose(again, cells.obsm[with_mini.BASIS], atol=1e-5)


def test_a_demo_of_the_other_kind_leaves_nothing_behind(at_once, tmp_path):
    (tmp_path / "report.json").write_text('{"format": "scfm-demo"}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("of an earlier demo")
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    again = run_module.run_demo(tmp_path, quick=True)
    assert again.embedding.to_dict() == at_once.embedding.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*with_mini.PRODUCTS, "notes.txt"])


def test_every_product_is_there_and_nothing_else(result):
    assert sorted(path.name for path in result.folder.iterdir()) == sorted(from_scratch.PRODUCTS)
    for name in ("umap.png", "umap_pca.png", "learning_curve.png"):
        assert (result.folder / name).read_bytes().startswith(b"\x89PNG")


def test_report_says_what_the_result_says(result):
    content = json.loads((result.folder / "report.json").read_text())
    assert content["verdict"] == result.verdict
    assert content["embedding"] == json.loads(json.dumps(result.embedding.to_dict()))
    text = (result.folder / "report.md").read_text()
    assert result.verdict in text and result.masked.to_markdown() in text
    names = [row.name for row in result.masked.rows]
    assert names[1:4] == ["unigram", "rank-conditional", "neighbour-bigram"]
    assert [row.name for row in result.embedding.rows][1:3] == ["PCA-50", "raw HVG"]
    for part in (result.verdict, str(result.folder / "report.md"), result.masked.to_text()):
        assert part in result.text


def test_saved_model_gives_the_saved_embedding(result):
    from scfm.models.load import load

    cells = anndata.read_h5ad(result.folder / "cells.h5ad")
    model = load(result.folder / "model", dtype="float32")  # "auto" may pick bfloat16
    again = model.embed(cells, pooling="mean")
    np.testing.assert_allclose(again, cells.obsm["X_geneformer"], atol=1e-5)
    assert cells.obs["split"].value_counts().to_dict() == {"train": 558, "test": 142}


def test_vocabulary_and_medians_come_from_train_cells_alone(result):
    from scfm.data.read import read
    from scfm.models.load import load
    from scfm.train.corpus.corpus import build_dictionaries

    cells = anndata.read_h5ad(result.folder / "cells.h5ad")
    train = build_dictionaries([read(cells[cells.obs["split"] == "train"].copy())], version="V2")
    everything = build_dictionaries([read(cells)], version="V2")
    vocab = load(result.folder / "model").vocab
    assert vocab.median == train.median
    assert vocab.median != everything.median


def test_a_later_run_replaces_a_demo_keeps_other_files_and_gives_the_same_numbers(result, tmp_path):
    (tmp_path / "report.json").write_text('{"format": "scfm-demo"}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("of an earlier demo")
    (tmp_path / "notes.txt").write_text("mine")
    again = run_module.run_demo(tmp_path, quick=True, pretrain=True)
    assert again.embedding.to_dict() == result.embedding.to_dict()
    assert again.masked.to_dict() == result.masked.to_dict()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "model" / "old.txt").exists()
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == result.verdict


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidArgumentError, match="no earlier demo"):
        run_module.run_demo(tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InvalidArgumentError, match="expected a folder"):
        run_module.run_demo(tmp_path / "thesis.txt", quick=True)


@pytest.mark.parametrize("pretrain", [False, True])
def test_a_failed_run_leaves_no_part_behind(tmp_path, monkeypatch, pretrain):
    def fail(*_args, **_kwargs):
        raise RuntimeError("stopped")

    monkeypatch.setattr(from_scratch if pretrain else with_mini, "demo_cells", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        run_module.run_demo(tmp_path / "out", quick=True, pretrain=pretrain)
    assert list((tmp_path / "out").iterdir()) == []


def test_minutes_must_be_positive(tmp_path):
    with pytest.raises(InvalidArgumentError, match="minutes is 0"):
        run_module.run_demo(tmp_path / "out", minutes=0)
