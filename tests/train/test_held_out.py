"""Evaluation during training: every family beside its baselines, probes beside PCA, and nothing left changed."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scfm
from scfm.data.gene_tables import human_symbols
from scfm.errors import ConfigError
from scfm.evaluate import Report
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.tokenize.scgpt_vocab import ScgptVocab
from scfm.train.config import PretrainConfig
from scfm.train.evaluation.held_out import HeldOutEvaluation
from scfm.train.evaluation.held_out_tasks import held_out_task
from scfm.train.objectives.protocol import make_objective, new_model
from tiny_cells import GENES, counts_of

pytestmark = pytest.mark.filterwarnings("ignore::scfm.ScfmWarning")
SYMBOLS = sorted(human_symbols())[:120]
SHAPE = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seed": 5, "token_budget": 600}
FEED_FORWARD = {"ffn_size": 16, "dropout": 0.0}
PERFORMER = {"head_dim": 8, "num_features": 12}
DECODER = {"decoder_size": 8, "decoder_layers": 1, "decoder_heads": 1, "decoder_features": 8, "num_bins": 10}
MASKED = {"kind": "masked", "views": "disjoint", "cce": 1.0}
CONTRAST = {**MASKED, "expression": 0.0, "mvc": 0.0, "mask_ratio": 0.0, "symmetric": True, "temperature": 0.1}
SETTINGS = {
    "geneformer": {**SHAPE, **FEED_FORWARD, "max_tokens": 96},
    "scgpt": {**SHAPE, **FEED_FORWARD, "family": "scgpt", "max_tokens": 96},
    "scgpt-masked": {**SHAPE, **FEED_FORWARD, "family": "scgpt", "max_tokens": 96, "objective": MASKED},
    "scgpt-contrast": {**SHAPE, **FEED_FORWARD, "family": "scgpt", "max_tokens": 96, "objective": CONTRAST},
    "scbert": {**SHAPE, "family": "scbert", "model": PERFORMER},
    "scfoundation": {**SHAPE, **FEED_FORWARD, "family": "scfoundation", "model": DECODER},
}
BASELINES = {
    "geneformer": {"unigram", "rank-conditional", "neighbour-bigram"},
    "scgpt": {"gene-mean", "gene-mean-at-depth", "gene-mean-cells-level"},
    "scgpt-masked": {"gene-mean", "gene-mean-at-depth", "gene-mean-cells-level"},
    "scgpt-contrast": {"chance", "pca-of-training-cells"},
    "scbert": {"bin-frequency", "bin-frequency-of-the-gene"},
    "scfoundation": {"gene-mean", "gene-mean-at-depth"},
}


def cells_of(num_cells: int = 120, *, genes: list[str] = SYMBOLS, seed: int = 0) -> ad.AnnData:
    adata = ad.AnnData(counts_of(num_cells, seed=seed), var=pd.DataFrame(index=genes))
    adata.obs["kind"] = pd.Categorical([f"kind{i % 3}" for i in range(num_cells)])
    return adata


def tokenizer_of(family: str):
    if family == "geneformer":
        vocab = GeneformerDictionaries.from_vocabulary(GENES, dict.fromkeys(GENES, 1.0), version="V2")
        return scfm.GeneformerTokenizer(vocab, max_tokens=96)
    if family == "scgpt":
        vocab = ScgptVocab.from_dict({symbol: i for i, symbol in enumerate(SYMBOLS)})
        return scfm.ScgptTokenizer(vocab, max_tokens=96)
    if family == "scbert":
        return scfm.ScbertTokenizer(SYMBOLS)
    return scfm.ScfoundationTokenizer(ScfoundationGenes.of(SYMBOLS))


def run_of(name: str, **changes):
    """A configuration with a corpus of 120 cells, every fourth held out."""
    config = PretrainConfig(**{**SETTINGS[name], **changes})
    tokenizer = tokenizer_of(config.family)
    packed = tokenizer(cells_of(genes=GENES if config.family == "geneformer" else SYMBOLS))
    held = np.arange(packed.num_cells) % 4 == 0
    corpus = SimpleNamespace(
        tokenizer=tokenizer,
        num_held_out=int(held.sum()),
        held_out_pack=lambda most: packed.select(np.flatnonzero(held)[:most]),
        training_pack=lambda most: packed.select(np.flatnonzero(~held)[:most]),
    )
    return config, corpus


@pytest.mark.parametrize("name", SETTINGS)
def test_every_family_beside_its_baselines(name: str) -> None:
    config, corpus = run_of(name)
    model = new_model(config, corpus)
    evaluation = HeldOutEvaluation(config, corpus)
    found = evaluation(model)
    assert json.loads(json.dumps(found.metrics)) == found.metrics
    loss = found.metrics["held_out/loss"]
    baselines = {name.split("/")[2] for name in found.metrics if name.startswith("held_out/baseline/")}
    assert baselines == BASELINES[name] and math.isfinite(loss)
    (report,) = found.reports
    assert isinstance(report, Report) and {row.role for row in report.rows} >= {"ours", "baseline"}
    assert found.metrics == evaluation(model).metrics
    assert ("held_out/accuracy" in found.metrics) == (name in ("geneformer", "scbert", "scgpt-contrast"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    again = evaluation(model).metrics
    assert again["held_out/loss"] != loss
    assert all(again[key] == found.metrics[key] for key in again if "baseline" in key)


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_do_not_matter(name: str) -> None:
    config, corpus = run_of(name)
    model = new_model(config, corpus)
    losses = [
        HeldOutEvaluation(run_of(name, token_budget=budget)[0], corpus)(model).metrics["held_out/loss"]
        for budget in (150, 100_000)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["geneformer", "scgpt", "scgpt-masked"])
def test_the_loss_is_that_of_the_objective(name: str) -> None:
    """On the items that training would ask for in an epoch of its own."""
    changes = {"objective": {"kind": "masked"}} if name == "scgpt-masked" else {}
    config, corpus = run_of(name, **changes)
    model = new_model(config, corpus)
    objective = make_objective(config, model)
    prepared = objective.prepare(corpus.held_out_pack(1000), epoch=2**32 - 1)
    term = "masked_genes" if name == "geneformer" else "expression"
    with torch.no_grad():
        want = objective.losses(prepared)[term].item() / prepared.counts[term]
    found = HeldOutEvaluation(config, corpus)(model).metrics
    assert found["held_out/loss"] == pytest.approx(want, rel=1e-5)
    if name != "geneformer":
        mvc = objective.losses(prepared)["mvc"].item() / prepared.counts["mvc"]
        assert found["held_out/head/from-the-cells-embedding/loss"] == pytest.approx(mvc, rel=1e-5)


@pytest.mark.parametrize("name", ["scbert", "scfoundation"])
def test_what_is_shown_is_not_asked_for(name: str) -> None:
    config, corpus = run_of(name)
    model = new_model(config, corpus)
    objective = make_objective(config, model)
    objective_items = objective.prepare(corpus.held_out_pack(1000), epoch=2**32 - 1).counts
    task = held_out_task(
        model,
        objective.settings,
        corpus.held_out_pack(1000),
        corpus.training_pack(1000),
        seed=config.seed,
        token_budget=1000,
    )
    (scores,) = task.score(model).values()
    (count,) = objective_items.values()
    assert len(scores.losses) == len(task.cells)
    assert len(task.cells) == count if name == "scbert" else len(task.cells) < 0.9 * count


@pytest.mark.parametrize("name", ["scbert", "scgpt", "scfoundation"])
def test_what_is_learned_shows_on_cells_never_trained_on(name: str) -> None:
    config, corpus = run_of(name)
    model = new_model(config, corpus)
    objective = make_objective(config, model)
    evaluation = HeldOutEvaluation(config, corpus)
    before = evaluation(model).metrics
    training = corpus.training_pack(1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(12):
        prepared = objective.prepare(training, epoch=step)
        losses = objective.losses(prepared)
        optimizer.zero_grad()
        sum(loss / prepared.counts[term] for term, loss in losses.items()).backward()
        optimizer.step()
    after = evaluation(model).metrics
    assert after["held_out/loss"] < before["held_out/loss"]


def test_a_contrast_is_that_of_the_objective() -> None:
    """30 held-out cells are one group, and one microbatch."""
    config, corpus = run_of("scgpt-contrast")
    model = new_model(config, corpus)
    objective = make_objective(config, model)
    prepared = objective.prepare(corpus.held_out_pack(1000), epoch=2**32 - 1)
    with torch.no_grad():
        want = objective.losses(prepared)["cce"].item() / 30
    found = HeldOutEvaluation(config, corpus)(model).metrics
    assert found["held_out/loss"] == pytest.approx(want, rel=1e-5)
    assert found["held_out/baseline/chance/loss"] == pytest.approx(math.log(30))
    assert found["held_out/baseline/chance/accuracy"] == pytest.approx(1 / 30)


def test_expression_from_the_embedding_alone_is_scored_alone() -> None:
    """Where training hides nothing and asks the embedding of one view for the other's genes."""
    config, corpus = run_of("scgpt-contrast", objective={**CONTRAST, "mvc": 1.0, "cross_mvc": True})
    model = new_model(config, corpus)
    found = HeldOutEvaluation(config, corpus)(model).metrics
    assert not any("head/" in name for name in found) and "held_out/baseline/gene-mean/loss" in found
    other, _ = run_of("scgpt-masked", objective={"kind": "masked"})
    want = HeldOutEvaluation(other, corpus)(model).metrics
    assert found["held_out/loss"] == want["held_out/head/from-the-cells-embedding/loss"]


def test_cells_are_told_from_those_of_their_batch() -> None:
    batched = {**CONTRAST, "within_batch": True, "batch": "donor"}
    config, corpus = run_of("scgpt-contrast", objective=batched)
    labels = np.arange(120) // 8 % 3
    model = new_model(config, corpus)
    found = HeldOutEvaluation(config, corpus, batch_labels=labels)(model).metrics
    assert found["held_out/baseline/chance/loss"] == pytest.approx(math.log(10))


def test_the_model_is_left_as_it_was() -> None:
    config, corpus = run_of("scgpt")
    model = new_model(config, corpus).train()
    model.decoder.eval()
    before = {module: module.training for module in model.modules()}
    state = torch.random.get_rng_state()
    HeldOutEvaluation(config, corpus)(model)
    assert {module: module.training for module in model.modules()} == before
    assert torch.equal(torch.random.get_rng_state(), state)
    out = model(model.tokenize(cells_of(4)), num_known=torch.tensor([2] * 4))
    assert out.expression.requires_grad


def test_probes_stand_beside_pca_and_the_untrained_model(tmp_path) -> None:
    cells = cells_of(150, seed=3)
    cells.obs.loc[cells.obs_names[:10], "kind"] = np.nan
    cells.write_h5ad(tmp_path / "kinds.h5ad")
    table = {"path": "kinds.h5ad", "label": "kind"}
    probes = [table, {**table, "keep": {"kind": ["kind0", "kind2"]}}]
    config, corpus = run_of("scgpt", probe=probes, data_folder=tmp_path)
    corpus.num_held_out = 0
    model = new_model(config, corpus)
    with torch.no_grad():
        model.encoder.embedding.weight.add_(1.0)
    found = HeldOutEvaluation(config, corpus)(model)
    names = {
        f"probe/kinds-{n}/{who}{score}"
        for n in (1, 2)
        for who in ("", "pca-50/", "before-training/")
        for score in ("knn", "linear")
    }
    assert set(found.metrics) == names
    assert found.metrics["probe/kinds-1/pca-50/knn"] > 0.9
    first, second = found.reports
    assert first.num_train + first.num_test == 140 > second.num_train + second.num_test
    assert "PCA-50" in found.to_text() and "before training" in found.to_text()


@pytest.mark.parametrize(
    ("probe", "what"),
    [
        ({"label": "sort"}, "there is no column 'sort'"),
        ({"label": "kind", "keep": {"kind": ["kind1"]}}, "expected two and more"),
        ({"label": "kind", "keep": {"sort": ["kind1"]}}, "there is no column 'sort'"),
    ],
)
def test_probes_that_do_not_fit_are_named_at_once(tmp_path, probe, what) -> None:
    cells_of(20).write_h5ad(tmp_path / "kinds.h5ad")
    config, corpus = run_of("scgpt", probe=[{"path": tmp_path / "kinds.h5ad", **probe}])
    with pytest.raises(ConfigError, match=what):
        HeldOutEvaluation(config, corpus)


def test_nothing_to_evaluate_on_is_said() -> None:
    config, corpus = run_of("scgpt")
    whole = corpus.held_out_pack
    corpus.held_out_pack = lambda most: whole(0)
    with pytest.raises(ConfigError, match="no held-out cell has a token"):
        HeldOutEvaluation(config, corpus)(new_model(config, corpus))
    corpus.num_held_out = 0
    with pytest.raises(ConfigError, match="held_out_fraction"):
        HeldOutEvaluation(config, corpus)
