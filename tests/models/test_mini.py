"""scfm-mini: what lies in the package loads, finds genes however they are called, and is as good as its card says."""

from __future__ import annotations

import json
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scfm
from scfm.data.gene_tables import human_symbols
from scfm.errors import InvalidArgumentError, MissingFileError
from scfm.evaluate import knn_label_score, stratified_split
from scfm.models import shipped
from scfm.models.load_report import LoadReport
from scfm.models.safetensors_header import read_header
from scfm.models.scgpt.model import Scgpt
from scfm.train.config import PretrainConfig

FOLDER = shipped.shipped_folder()
MOST_BYTES = 12_000_000
SYMBOLS = ["CD3D", "CD8A", "MS4A1", "LYZ", "NKG7", "GNLY", "INS", "GCG", "EPCAM", "PPBP", "FCER1A", "IL7R"]


@pytest.fixture(scope="module")
def mini() -> Scgpt:
    model = scfm.load("scfm-mini", dtype="float32")
    assert isinstance(model, Scgpt)
    return model


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((FOLDER / "results.json").read_text())


@pytest.fixture(scope="module")
def blood() -> ad.AnnData:
    pytest.importorskip("scanpy")
    from scfm.demo.cells import demo_cells

    return demo_cells()


def counts(genes, num_cells=6) -> ad.AnnData:
    matrix = np.random.default_rng(0).poisson(2.0, size=(num_cells, len(genes))).astype(np.float32)
    matrix[:, 0] += 1
    return ad.AnnData(sp.csr_matrix(matrix), var=pd.DataFrame(index=genes))


def test_the_folder_is_small_and_holds_what_a_model_needs() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    expected = {
        "model.safetensors",
        "config.json",
        "vocab.json",
        "genes.tsv",
        "pretrain.toml",
        "results.json",
        "MODEL_CARD.md",
    }
    assert set(files) == expected  # no pickle, nothing forgotten
    assert sum(files.values()) < MOST_BYTES
    header = json.loads((FOLDER / "config.json").read_text())
    assert header["scfm"]["family"] == "scgpt"


def test_genes_are_listed_with_ids_and_medians(mini) -> None:
    head, *rows = [line.split("\t") for line in (FOLDER / "genes.tsv").read_text().splitlines()]
    assert head == ["symbol", "ensembl_id", "median_cp10k"]
    genes = {symbol: (ids.split(",") if ids else [], median) for symbol, ids, median in rows}
    assert set(genes) == {name for name in mini.vocab.token if not name.startswith("<")}
    assert genes["CD3D"][0] == list(human_symbols()["CD3D"]) and float(genes["CD3D"][1]) > 0
    medians = [float(median) for _, median in genes.values() if median]
    assert len(medians) > 15_000 and min(medians) > 0


def test_weights_are_half_on_disk_and_float32_in_memory(mini) -> None:
    assert all(parameter.dtype == torch.float32 for parameter in mini.parameters())
    stored = read_header(FOLDER / "model.safetensors")
    assert {entry.dtype for entry in stored.values()} == {"F16"}
    assert not mini.training and mini.source == "scfm-mini" and mini.default_pooling == "w-pool"
    report = mini.load_report
    assert isinstance(report, LoadReport) and not report.missing


def test_it_loads_anywhere_without_network_or_other_files(tmp_path) -> None:
    script = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "import scfm\n"
        "model = scfm.load('scfm-mini')\n"
        "print(model.family, model.num_parameters())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.startswith("scgpt ")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch, mini, tiny_model) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model.save(tmp_path / "scfm-mini")
    assert scfm.load("scfm-mini").family == "geneformer"


def test_an_installation_without_it_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shipped, "files", lambda _: tmp_path)
    with pytest.raises(MissingFileError, match="lacks the model"):
        scfm.load("scfm-mini")


def test_arguments_of_other_families_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="variant"):
        scfm.load("scfm-mini", variant="cell")


def test_symbols_and_ensembl_ids_give_the_same_embedding(mini) -> None:
    ids = [human_symbols()[symbol][0] for symbol in SYMBOLS]
    by_symbol, by_id = mini.embed(counts(SYMBOLS)), mini.embed(counts(ids))
    assert np.array_equal(by_symbol, by_id)
    versioned = [f"{gene}.{i + 1}" for i, gene in enumerate(ids)]
    assert np.array_equal(by_symbol, mini.embed(counts(versioned)))
    np.testing.assert_allclose(np.linalg.norm(by_symbol, axis=1), 1.0, atol=1e-5)


def test_the_embedding_is_the_cells_own(mini, blood) -> None:
    some = blood[:40].copy()
    whole = mini.embed(some)
    assert np.array_equal(whole, mini.embed(some))
    assert np.array_equal(whole[[3, 17, 8]], mini.embed(some[[3, 17, 8]].copy()))
    assert np.array_equal(whole, scfm.load("scfm-mini", dtype="float32").embed(some, token_budget=2000))


def test_neighbours_share_labels_more_than_with_random_weights(mini, blood) -> None:
    labels = blood.obs["cell_type"].astype(str).to_numpy()
    train, test = stratified_split(labels, seed=0)
    random = shipped.with_own_tokenizer(Scgpt.from_config(mini.config, mini.vocab, seed=0))

    def accuracy(model) -> float:
        return knn_label_score(model.embed(blood), labels, train, test, k=15).accuracy

    ours = accuracy(mini)
    assert ours > accuracy(random) + 0.01
    assert ours > 0.75


def test_settings_of_the_run_are_complete(mini) -> None:
    config = PretrainConfig.from_file(FOLDER / "pretrain.toml")
    assert config.family == "scgpt" and config.max_steps is not None
    fields = config.model_fields()
    assert {name: mini.config.to_dict()[name] for name in fields} == fields
    assert config.max_tokens is not None and config.max_tokens <= 1024


def test_the_cards_numbers_are_those_of_the_results(mini, results) -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert f"{mini.num_parameters():,} parameters" in card
    reports = [*results["held_out"], *results["never_seen"]]
    assert len(reports) == 5
    for report in reports:
        names = [metric["name"] for metric in report["metrics"]]
        for row in report["rows"]:
            shown = " | ".join(f"{row['values'][name]:.3f}" for name in names)
            assert f"| {row['name']} | {shown} |" in card
        for verdict in report["verdicts"].values():
            assert verdict in card
        roles = [row["role"] for row in report["rows"]]
        assert roles.count("ours") == 1 and "baseline" in roles
    for licence in ("CC BY 4.0", "MIT"):
        assert licence in card


def test_a_result_can_be_found_again(mini, results, blood) -> None:
    """The demo's cells, embedded now, have the accuracy that the card states, within what rounding may move."""
    report = results["never_seen"][2]
    ours = next(row for row in report["rows"] if row["role"] == "ours")["values"]["kNN accuracy"]
    labels = blood.obs["cell_type"].astype(str).to_numpy()
    train, test = stratified_split(labels, seed=0)
    found = knn_label_score(mini.embed(blood), labels, train, test, k=15)
    assert abs(found.accuracy - ours) < 0.08  # another split than the card's five folds
