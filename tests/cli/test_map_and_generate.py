"""scfm map and scfm generate end to end on small models: results, --json, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import scfm
from scfm.cli.main import app
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from scfm.tokenize.scgpt_vocab import ScgptVocab

runner = CliRunner()


def run_json(*arguments: object, code: int = 0) -> dict:
    result = runner.invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return tiny_model.save(tmp_path / "model")


@pytest.fixture
def files(tiny_adata, tmp_path) -> tuple[Path, Path]:
    """Fifteen cells, and twenty-five others that serve as the reference."""
    query, reference = tmp_path / "query.h5ad", tmp_path / "reference.h5ad"
    tiny_adata[:15].copy().write_h5ad(query)
    tiny_adata[15:].copy().write_h5ad(reference)
    return query, reference


def test_map_gives_what_python_gives(model, files, tiny_model, tmp_path) -> None:
    query, reference = files
    options = ("--labels", "kind", "--neighbors", 5, "--dtype", "float32")
    facts = run_json("map", *files, "-m", model, "-o", tmp_path / "x.csv", *options, "--truth", "kind")
    table = pd.read_csv(tmp_path / "x.csv", index_col="cell")
    cells = ad.read_h5ad(query)
    scfm.tl.map_to_reference(
        cells, ad.read_h5ad(reference), labels="kind", model=tiny_model, num_neighbors=5, key_added="label"
    )
    assert list(table["label"]) == list(cells.obs["label"])
    assert [str(name) for name in table.index] == list(cells.obs_names)
    np.testing.assert_array_equal(table["nearest_row"], cells.obsm["label_neighbors"][:, 0])
    np.testing.assert_allclose(table["nearest_distance"], cells.obsm["label_distances"][:, 0], rtol=1e-6)
    assert sum(facts["cells_of_label"].values()) == facts["num_cells"] == 15 and facts["num_neighbors"] == 5
    rows = {row["name"]: row["values"] for row in facts["report"]["rows"]}
    assert rows["kNN on PCA-50"]["accuracy"] > 0.8 and "commonest label" in rows


def test_map_takes_folders_of_embeddings(model, files, tmp_path) -> None:
    query, reference = files
    embed = ("-m", model, "--dtype", "float32")
    for file in files:
        run_json("embed", file, *embed, "-o", tmp_path / file.stem)
    options = ("--labels", "kind", "--neighbors", 5)
    run_json("map", *files, *embed, "-o", tmp_path / "a.csv", *options)
    run_json("map", tmp_path / "query", tmp_path / "reference", "-o", tmp_path / "b.tsv", *options)
    run_json("map", query, tmp_path / "reference", *embed, "-o", tmp_path / "c.csv", *options)
    a, b = pd.read_csv(tmp_path / "a.csv"), pd.read_csv(tmp_path / "b.tsv", sep="\t")
    assert list(a["label"]) == list(b["label"]) and list(a["nearest_row"]) == list(b["nearest_row"])
    assert a.equals(pd.read_csv(tmp_path / "c.csv"))
    facts = run_json("map", tmp_path / "query", reference, "-o", tmp_path / "d.csv", *options, code=3)
    assert "--model" in facts["message"]
    both = (tmp_path / "query", tmp_path / "reference", "-o", tmp_path / "d.csv", *options)
    assert "--truth" in run_json("map", *both, "--truth", "kind", code=3)["message"]


def test_people_get_words(model, files, tmp_path) -> None:
    command = ["map", *files, "-m", model, "-o", tmp_path / "x.csv", "-l", "kind", "--neighbors", 5]
    result = runner.invoke(app, [*map(str, command), "--truth", "kind", "-q"])
    assert result.exit_code == 0 and "kNN on PCA-50" in result.output and "15 cells ->" in result.output


def test_map_says_what_is_wrong(model, files, tmp_path) -> None:
    ok = {"--model": model, "--out": tmp_path / "x.csv", "--labels": "kind", "--neighbors": 5}
    cases = [
        ({"--labels": "type"}, "'type'"),
        ({"--out": tmp_path / "x.h5ad"}, ".csv"),
        ({"--out": tmp_path / "gone" / "x.csv"}, "does not exist"),
        ({"--neighbors": 26}, "25 usable cells"),
        ({"--metric": "dot"}, "cosine"),
        ({"--weights": "rank"}, "frequency"),
    ]
    for changes, message in cases:
        arguments = [part for pair in {**ok, **changes}.items() for part in pair]
        assert message in run_json("map", *files, *arguments, code=3)["message"]
    assert not (tmp_path / "x.csv").exists()


@pytest.fixture
def scgpt(tmp_path) -> Path:
    vocab = ScgptVocab.from_dict({f"GENE{i}": i for i in range(40)})
    config = ScgptConfig(43, 16, 2, 16, 1, has_flags=True, mvc_style="inner product")
    return Scgpt.from_config(config, vocab, seed=1).save(tmp_path / "scgpt")


@pytest.fixture
def symbols(tmp_path) -> Path:
    counts = np.random.default_rng(0).poisson(1.0, size=(5, 40)).astype(np.float32)
    names = [f"GENE{i}" for i in range(40)]
    ad.AnnData(counts, var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "symbols.h5ad")
    return tmp_path / "symbols.h5ad"


def test_generate_gives_what_python_gives(scgpt, symbols, tmp_path) -> None:
    out = tmp_path / "out.h5ad"
    options = ("-m", scgpt, "-o", out, "--dtype", "float32", "--iterations", 2)
    facts = run_json("generate", symbols, *options, "--genes", "GENE3, GENE1,GENE7")
    assert facts["ok"] and facts["shape"] == [5, 3] and facts["confidence"] == "bounded"
    model = scfm.load(scgpt, dtype="float32")
    want = scfm.tl.generate(model, symbols, genes=["GENE3", "GENE1", "GENE7"], num_iterations=2)
    np.testing.assert_array_equal(ad.read_h5ad(out).X, want.X)
    (tmp_path / "genes.txt").write_text("GENE3\nGENE1\n\nGENE7\n")
    run_json("generate", symbols, *options, "--genes", tmp_path / "genes.txt")  # over its own output
    np.testing.assert_array_equal(ad.read_h5ad(out).X, want.X)


def test_generate_says_what_is_wrong(scgpt, symbols, model, tmp_path) -> None:
    ok = {"--model": scgpt, "--out": tmp_path / "x.h5ad", "--genes": "GENE1"}
    cases = [
        ({"--genes": "GENE1,NOGENE"}, "'NOGENE'"),
        ({"--genes": ","}, "names no gene"),
        ({"--out": tmp_path / "x.csv"}, ".h5ad"),
        ({"--out": symbols}, "input itself"),
        ({"--model": model}, "geneformer cannot"),
        ({"--iterations": 0}, "num_iterations"),
        ({"--confidence": "bin"}, "bounded"),
    ]
    for changes, message in cases:
        arguments = [part for pair in {**ok, **changes}.items() for part in pair]
        assert message in run_json("generate", symbols, *arguments, code=3)["message"]
    assert not (tmp_path / "x.h5ad").exists()
