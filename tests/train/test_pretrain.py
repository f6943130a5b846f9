"""One-process pretraining: it learns, it is reproduced by its settings, and its medians are the corpus's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import scfm
from scfm.errors import ConfigError, ScfmError
from scfm.train.corpus_cells import held_out_cells
from scfm.train.gene_medians import GeneMedians
from scfm.train.objectives import evaluate_masked, mask_genes, masked_gene_loss
from scfm.train.pretrain import pretrain
from scfm.train.schedule import learning_rate_factor

SMALL = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "ffn_size": 32}
SMALL |= {"max_tokens": 128, "dropout": 0.0}


@pytest.fixture
def corpus(tiny_adata):
    """Real gene ids are needed: fresh dictionaries take their genes from the package's table."""
    from scfm.data.gene_tables import human_symbols

    genes = sorted({gene for several in human_symbols().values() for gene in several})
    tiny_adata.var_names = genes[: tiny_adata.n_vars]
    return tiny_adata


def run(corpus, out, **changes):
    settings = {**SMALL, "data": [corpus], "out": out, "num_epochs": 2, "batch_cells": 8, **changes}
    return pretrain(settings)


def test_it_learns_and_writes_what_it_says(corpus, tmp_path) -> None:
    result = run(corpus, tmp_path / "run", num_epochs=30, learning_rate=1e-2, held_out_fraction=0.2)
    lines = [json.loads(line) for line in result.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    first, last = np.mean([x["loss"] for x in lines[:5]]), np.mean([x["loss"] for x in lines[-5:]])
    assert last < first - 0.3
    assert set(lines[0]) >= {"loss", "learning_rate", "grad_norm", "tokens", "cells", "tokens_per_s"}
    again = scfm.load(result.folder, dtype="float32")
    packed = result.corpus.held_out
    assert packed.num_cells
    np.testing.assert_array_equal(again.embed(packed), result.model.embed(packed))
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["learning_rate"] == 1e-2


def test_settings_reproduce_the_run(corpus, tmp_path) -> None:
    one, two = (run(corpus, tmp_path / name, dropout=0.1) for name in "ab")
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = run(corpus, tmp_path / "c", dropout=0.1, seed=1)
    assert not torch.equal(one.model.gene_table, other.model.gene_table)


def test_masks_belong_to_cells_not_to_batches(tiny_model, tiny_adata) -> None:
    packed = tiny_model.tokenize(tiny_adata)
    whole = mask_genes(packed, tiny_model, seed=3, epoch=2)
    order = np.random.default_rng(0).permutation(packed.num_cells)
    shuffled = mask_genes(packed.select(order), tiny_model, seed=3, epoch=2)
    cells = whole.packed.to_lists()
    assert shuffled.packed.to_lists() == [cells[i] for i in order]
    assert len(shuffled.positions) == len(whole.positions)
    other_epoch = mask_genes(packed, tiny_model, seed=3, epoch=3)
    assert not torch.equal(other_epoch.packed.token_ids, whole.packed.token_ids)


def test_the_head_on_masked_rows_equals_the_whole_head(tiny_model, tiny_adata) -> None:
    packed = tiny_model.tokenize(tiny_adata)
    cells = mask_genes(packed, tiny_model, seed=0, epoch=0)
    logits = tiny_model.forward(cells.packed).logits[cells.positions]
    whole = torch.nn.functional.cross_entropy(logits, cells.targets, reduction="sum")
    torch.testing.assert_close(masked_gene_loss(tiny_model, cells), whole, rtol=1e-5, atol=1e-4)


def test_evaluation_does_not_depend_on_batches(tiny_model, tiny_adata) -> None:
    packed = tiny_model.tokenize(tiny_adata)
    one = evaluate_masked(tiny_model, packed, seed=1, token_budget=60)
    two = evaluate_masked(tiny_model, packed, seed=1)
    np.testing.assert_allclose(one.losses, two.losses, atol=1e-5)
    assert one.num_masked == len(one.losses) == len(one.targets)
    assert one.loss == pytest.approx(one.losses.mean())
    with torch.inference_mode():
        cells = mask_genes(packed, tiny_model, seed=1, epoch=2**32 - 1)
        total = float(masked_gene_loss(tiny_model, cells))
    assert one.loss * one.num_masked == pytest.approx(total, rel=1e-5)


def test_medians_equal_the_definition(tiny_adata) -> None:
    source = scfm.read(tiny_adata)
    collected = GeneMedians(tiny_adata.n_vars)
    for block in source.blocks(block_size=7):
        collected.add(block, np.arange(tiny_adata.n_vars, dtype=np.int32))
    dense = tiny_adata.X.toarray().astype(np.float64)
    cp10k = dense / dense.sum(1, keepdims=True) * 1e4
    for gene, median in enumerate(collected.medians()):
        expressed = cp10k[dense[:, gene] > 0, gene]
        assert median == pytest.approx(np.median(expressed), rel=1e-6) if expressed.size else np.isnan(median)


def test_medians_are_of_what_the_tokenizer_ranks(corpus) -> None:
    """The same library size, columns summed where it sums them, and training cells only."""
    import anndata as ad

    from scfm.train.corpus import build_dictionaries

    gene, other = corpus.var_names[:2]
    adata = ad.AnnData(sp.csr_matrix(np.float32([[2, 3, 5], [1, 1, 8], [9, 9, 0]])))
    adata.var_names = [gene, f"{gene}.5", other]
    adata.obs["n_counts"] = [100.0, 50.0, 10.0]
    held_out = [np.array([False, False, True])]
    vocab = build_dictionaries([scfm.read(adata)], version="V2", held_out=held_out)
    assert vocab.median[gene] == pytest.approx((500 + 400) / 2)
    assert vocab.median[other] == pytest.approx((500 + 1600) / 2)


def test_a_loss_that_is_not_finite_stops_the_run_unapplied(corpus, tmp_path, monkeypatch) -> None:
    from scfm.train import pretrain as module

    nan = float("nan")
    monkeypatch.setattr(module, "masked_gene_loss", lambda model, cells: model.gene_table.sum() * nan)
    with pytest.raises(ScfmError, match="step 0"):
        run(corpus, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_held_out_cells_are_keyed_by_cell() -> None:
    chosen = held_out_cells(400, 0.25, seed=0)
    assert 60 < chosen.sum() < 140
    np.testing.assert_array_equal(held_out_cells(200, 0.25, seed=0), chosen[:200])
    assert not np.array_equal(held_out_cells(400, 0.25, seed=1), chosen)


def test_schedule_rises_and_falls_to_zero() -> None:
    for schedule in ("linear", "cosine"):
        factors = [
            learning_rate_factor(p, warmup_ratio=0.1, schedule=schedule) for p in np.linspace(0, 1, 101)
        ]
        assert max(factors) == pytest.approx(1.0) and factors[0] == 0.0 and abs(factors[-1]) < 1e-12
        assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rat": 1}, "learning_rate"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"hidden_size": 30, "num_heads": 4}, "num_heads"),
        ({"mask_ratio": 1.5}, "mask_ratio"),
        ({"schedule": "step"}, "schedule"),
        ({"preset": "V9"}, "preset"),
        ({"max_minutes": -1}, "max_minutes"),
        ({"max_steps": "ten"}, "max_steps"),
        ({"max_steps": 0.5}, "max_steps"),
        ({"seed": -1}, "seed"),
        ({"clip_norm": -1}, "clip_norm"),
        ({"clip_norm": "x"}, "clip_norm"),
        ({"species": "rat"}, "species"),
        ({"special_tokens": "no"}, "special_tokens"),
        ({"device": "abacus"}, "device"),
        ({"layer": 3}, "layer"),
        ({"out": 3}, "out"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_before_any_data_is_read(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        scfm.PretrainConfig.from_mapping({"data": ["missing.h5ad"], **settings})


def test_what_is_given_beside_a_preset_counts() -> None:
    config = scfm.PretrainConfig(preset="V2-104M", num_layers=6, max_tokens=2048)
    assert (config.num_layers, config.max_tokens, config.hidden_size) == (6, 2048, 768)


def test_the_callers_random_numbers_are_left_alone(corpus, tmp_path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(corpus, tmp_path / "run", dropout=0.1, num_epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_toml_with_overrides(tmp_path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('data = ["a.h5ad"]\npreset = "V1-10M"\nlearning_rate = 1e-3\n')
    config = scfm.PretrainConfig.from_file(file, ["learning_rate=3e-3", "out=elsewhere", "num_epochs=7"])
    assert (config.learning_rate, config.out, config.num_epochs) == (3e-3, "elsewhere", 7)
    assert (config.num_layers, config.hidden_size, config.ffn_size) == (6, 256, 512)


def test_a_list_trains_as_its_files_do(corpus, tmp_path) -> None:
    """Parts with different genes; what is held out and the medians depend on the cells alone."""
    from scfm.data.source_list import SourceList
    from scfm.train.config import PretrainConfig
    from scfm.train.corpus import build_dictionaries, read_corpus

    parts = [scfm.read(corpus[:25, :90].copy()), scfm.read(corpus[25:, 40:].copy())]
    settings = {**SMALL, "out": tmp_path, "held_out_fraction": 0.3}
    one, two = (
        read_corpus(PretrainConfig.from_mapping({**settings, "data": data}))
        for data in (parts, SourceList(parts))
    )
    assert one.tokenizer.vocab.median == two.tokenizer.vocab.median
    for a, b in ((one.training, two.training), (one.held_out, two.held_out)):
        assert a.to_lists() == b.to_lists() and a.cell_ids.tolist() == b.cell_ids.tolist() and a.num_cells
    # In another order the cells keep their tokens, as long as nothing is held out by position.
    order = np.random.default_rng(0).permutation(40)
    settings |= {"held_out_fraction": 0.0}
    plain, mixed = (
        read_corpus(PretrainConfig.from_mapping({**settings, "data": data})).training
        for data in (parts, SourceList(parts).select(order))
    )
    tokens = dict(zip(plain.cell_ids.tolist(), plain.to_lists(), strict=True))
    assert mixed.to_lists() == [tokens[cell] for cell in order[mixed.cell_ids.numpy()].tolist()]
    # Held out by position in the list: the medians must leave out the very cells that training does.
    settings |= {"held_out_fraction": 0.5, "data": SourceList(parts).select(order)}
    mixed_corpus = read_corpus(PretrainConfig.from_mapping(settings))
    kept = order[mixed_corpus.training.cell_ids.numpy()]
    alone = [
        scfm.read(corpus[:25, :90].copy()).select(np.sort(kept[kept < 25])),
        scfm.read(corpus[25:, 40:].copy()).select(np.sort(kept[kept >= 25]) - 25),
    ]
    assert mixed_corpus.tokenizer.vocab.median == build_dictionaries(alone, version="V2").median
