"""How weights begin where a run says so: tables of another scale, layers that hardly add anything, centred cells."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_held_out import SETTINGS, cells_of, tokenizer_of

from scfm.errors import ConfigError
from scfm.train.config import PretrainConfig
from scfm.train.corpus.cells import with_lowest_words
from scfm.train.objectives.protocol import new_model

RUNS = [name for name in SETTINGS if name != "scgpt-masked"]


def corpus_of(family: str) -> SimpleNamespace:
    tokenizer = tokenizer_of(family)
    packed = tokenizer(cells_of(60)) if family != "geneformer" else None
    held_out = np.arange(60) % 3 == 0
    asked = []

    def packs_of(cells):
        asked.append(cells)
        return iter([packed.select(cells)])

    return SimpleNamespace(tokenizer=tokenizer, held_out=held_out, packs_of=packs_of, asked=asked)


def model_of(name: str, **changes):
    config = PretrainConfig(**{**SETTINGS[name], **changes})
    return new_model(config, corpus_of(config.family))


def table_of(model) -> torch.Tensor:
    tables = {"geneformer": "gene_table", "scgpt": "encoder.embedding.weight"}
    tables |= {"scbert": "pos_emb", "scfoundation": "pos_emb.weight"}
    return dict(model.named_parameters())[tables[model.family]]


@pytest.mark.parametrize("name", RUNS)
def test_a_gene_table_of_another_scale(name: str) -> None:
    usual, small = model_of(name), model_of(name, gene_std=0.01)
    assert table_of(small).std().item() == pytest.approx(0.01, rel=0.2)
    assert torch.equal(table_of(model_of(name, gene_std=0.01)), table_of(small))
    assert not torch.equal(table_of(model_of(name, gene_std=0.01, seed=9)), table_of(small))
    others = dict(usual.named_parameters())
    changed = [name for name, one in small.named_parameters() if not torch.equal(one, others[name])]
    assert len(changed) == 1


@pytest.mark.parametrize("name", ["geneformer", "scgpt", "scfoundation"])
def test_layers_that_hardly_add_anything(name: str) -> None:
    usual, quiet = model_of(name), model_of(name, branch_scale=0.1)
    others = dict(usual.named_parameters())
    for part, one in quiet.named_parameters():
        scaled = part.startswith("layers.") and part.split(".")[2] in ("attention_out", "ffn_out")
        torch.testing.assert_close(one, others[part] * (0.1 if scaled else 1.0))


@pytest.mark.parametrize("style", ["cls", "avg-pool", "w-pool"])
def test_cells_begin_around_zero(style: str) -> None:
    config = PretrainConfig(**{**SETTINGS["scgpt"], "model": {"cell_style": style}})
    corpus = corpus_of("scgpt")
    usual = new_model(config, corpus)
    config.centred_start = True
    centred = new_model(config, corpus)
    (asked,) = corpus.asked
    assert not corpus.held_out[asked].any() and len(asked) == 40
    packed = next(corpus.packs_of(np.arange(60)))
    with torch.no_grad():
        before, after = (model.forward(packed).cell_embeddings for model in (usual, centred))
    if style != "w-pool":
        assert after.mean(0).norm() < 0.2 * before.mean(0).norm()
    alike = torch.nn.functional.normalize(after, dim=1)
    were = torch.nn.functional.normalize(before, dim=1)
    assert (alike @ alike.T).mean() < 0.3 < 0.7 < (were @ were.T).mean()


def test_the_embedding_is_where_the_model_has_its_own() -> None:
    pooled = model_of("scgpt", model={"cell_style": "w-pool"})
    assert pooled.default_pooling == "w-pool" and model_of("scgpt").default_pooling == "cls"
    cells = cells_of(5)
    np.testing.assert_array_equal(pooled.embed(cells), pooled.embed(cells, pooling="w-pool"))


def test_what_a_family_does_not_have_is_named() -> None:
    with pytest.raises(ConfigError, match="branch_scale"):
        model_of("scbert", branch_scale=0.1)
    for name in ("scbert", "scfoundation"):
        with pytest.raises(ConfigError, match="centred_start"):
            model_of(name, centred_start=True)
    with pytest.raises(ConfigError, match="centred_start"):
        model_of("scgpt", centred_start=True, model={"pre_norm": True})
    with pytest.raises(ConfigError, match="gene_std"):
        PretrainConfig(gene_std=0.0)


@pytest.mark.parametrize("most", [1, 7, 64, 1000])
def test_the_lowest_words_do_not_depend_on_how_cells_are_cut(most: int) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 500, dtype=np.uint32)
    cells = np.arange(500)
    expected = np.sort(np.argsort(words, kind="stable")[:most])
    for size in (1, 13, 500):
        cuts = [slice(start, start + size) for start in range(0, 500, size)]
        found = with_lowest_words(((cells[cut], words[cut]) for cut in cuts), most)
        np.testing.assert_array_equal(found, expected)
    assert len(with_lowest_words([], most)) == 0
