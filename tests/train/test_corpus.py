"""The corpus: vocabulary, held-out cells, lengths, and what is kept for other ranks and for a resumed run."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scfm
from scfm.data.gene_tables import human_symbols
from scfm.data.packed import PackedCells
from scfm.data.source_list import SourceList
from scfm.errors import ConfigError, GeneMappingError, IntegrityError, ResourceError
from scfm.train.config import PretrainConfig
from scfm.train.corpus import corpus as corpus_module
from scfm.train.corpus import folder as corpus_folder
from scfm.train.corpus.cells import cells_where, held_out_cells, sample_cells
from scfm.train.corpus.corpus import Corpus, build_dictionaries, read_corpus
from scfm.train.corpus.feed import MicrobatchFeed
from scfm.train.corpus.gene_medians import GeneMedians
from scfm.train.objectives.prepared import Prepared

# Symbols that one gene bears, so that genes can be named either way.
GENES = {
    symbol: ids[0] for symbol, ids in sorted(human_symbols().items()) if len(ids) == 1 and symbol.isalnum()
}
SYMBOLS = list(GENES)[:150]
FAMILIES = ("geneformer", "scgpt", "scbert", "scfoundation")


def cells_of(num_cells: int, *, seed: int = 0, genes: list[str] | None = None) -> ad.AnnData:
    """Raw counts of cells of very different depth; obs: donor and row."""
    genes = SYMBOLS if genes is None else genes
    generator = np.random.default_rng(seed)
    depth = generator.gamma(1.0, 1.0, size=(num_cells, 1)) + 0.05
    counts = generator.poisson(depth * generator.gamma(0.5, 2.0, size=(1, len(genes)))).astype(np.float32)
    counts[:, 0] += 2
    adata = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=genes))
    adata.obs["donor"] = pd.Categorical([f"D{i % 4}" for i in range(num_cells)])
    adata.obs["lane"] = np.arange(num_cells) % 3
    return adata


def config_of(data: Any, out: Path, family: str = "geneformer", **changes: Any) -> PretrainConfig:
    data = data if isinstance(data, list) else [data]
    settings = {"data": data, "out": out, "family": family, "token_budget": 1000, "shuffle_window": 64}
    return PretrainConfig.from_mapping({**settings, **changes})


def lengths_of(packed: PackedCells) -> torch.Tensor:
    return packed.lengths.to(torch.int64)


def measured(config: PretrainConfig, **more: Any) -> Corpus:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corpus = read_corpus(config, **more)
        corpus.measure(lengths_of)
    return corpus


def feed_of(corpus: Corpus, **more: Any) -> MicrobatchFeed:
    objective: Any = SimpleNamespace(
        lengths_of=lengths_of,
        prepare=lambda packed, *, epoch: Prepared(packed, {"cells": packed.num_cells}, packed.num_tokens),
    )
    return MicrobatchFeed(corpus, objective, corpus.config, **more)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "cells.h5ad"
    cells_of(120).write_h5ad(path)
    return path


# ---- vocabulary and lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_tokens_from_genes_of_training_cells(family: str, tmp_path) -> None:
    """Files that name genes by symbol and by id, in another order, share their tokens; a held-out cell adds no gene."""
    one, two = cells_of(40), cells_of(30, seed=1, genes=SYMBOLS[::-1])
    two.var_names = [GENES[symbol] for symbol in two.var_names]
    for adata, secret in ((one, 7), (two, -8)):
        dense = adata.X.toarray()
        dense[:, secret] = 0
        dense[5, secret] = 90  # of donor D1
        adata.X = sp.csr_matrix(dense)
    data = [{"path": one, "held_out": {"donor": ["D1"]}}, {"path": two, "held_out": {"donor": ["D1"]}}]
    corpus = measured(config_of(data, tmp_path, family))
    token = corpus.tokenizer.vocab.token
    name = (lambda symbol: GENES[symbol]) if family == "geneformer" else str
    known = {symbol for symbol in SYMBOLS if name(symbol) in token}
    expressed = set()
    for adata in (one, two):
        kept = adata.X[np.asarray(adata.obs["donor"] != "D1")]
        symbols = SYMBOLS if adata is one else SYMBOLS[::-1]
        expressed |= {symbols[i] for i in np.flatnonzero(np.asarray(kept.sum(0)).ravel())}
    assert known == expressed and SYMBOLS[7] not in known
    in_order = [gene for gene in token if not gene.startswith("<")]
    assert in_order == sorted(in_order)
    # Lengths are the tokenizer's own.
    expected = np.zeros(70, dtype=int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = corpus.tokenizer(SourceList([scfm.read(one), scfm.read(two)]))
    expected[packed.cell_ids] = packed.lengths
    expected[corpus.held_out] = 0
    np.testing.assert_array_equal(corpus.lengths, expected)
    assert corpus.lengths.dtype == np.uint16
    assert corpus.num_tokens == expected.sum() and corpus.num_training == (expected > 0).sum()
    assert corpus.num_held_out == 18


@pytest.mark.parametrize("family", FAMILIES)
def test_the_feed_gives_the_tokenizers_tokens_of_the_planned_cells(family: str, tmp_path) -> None:
    data = [cells_of(50), cells_of(41, seed=3)]
    corpus = measured(config_of(data, tmp_path, family, held_out_fraction=0.2, seed=4))
    source = SourceList([scfm.read(adata) for adata in data])
    with feed_of(corpus) as feed, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = corpus.tokenizer(source)
        row = {int(cell): i for i, cell in enumerate(whole.cell_ids)}
        seen: list[int] = []
        for step in feed:
            for prepared, (epoch, number) in zip(step.microbatches, step.places, strict=True):
                cells = corpus.plan(epoch).microbatch(number)
                np.testing.assert_array_equal(prepared.cell_ids, cells)
                expected = whole.select([row[cell] for cell in cells.tolist()])
                assert torch.equal(prepared.packed.token_ids, expected.token_ids)
                assert torch.equal(prepared.packed.cu_seqlens, expected.cu_seqlens)
                if expected.values is not None:
                    assert torch.equal(prepared.packed.values, expected.values)
                seen += cells.tolist() if epoch == 0 else []
            if step.next[0] > 0:
                break
    assert sorted(seen) == np.flatnonzero(~corpus.held_out).tolist()


def test_scgpt_draws_other_genes_of_long_cells_each_epoch(tmp_path) -> None:
    corpus = measured(config_of(cells_of(30), tmp_path, "scgpt", max_tokens=12, token_budget=12))
    longest = np.flatnonzero(corpus.lengths == 12)
    assert len(longest) > 10
    first, again, second = (next(corpus.packs_of(longest, epoch=epoch)).to_lists() for epoch in (0, 0, 1))
    assert first == again
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 5
    assert [len(cell) for cell in first] == [len(cell) for cell in second]


def test_given_vocabularies_are_used_as_they_are(tmp_path) -> None:
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join(SYMBOLS[20:60]) + "\n")
    for family in ("scbert", "scfoundation"):
        corpus = measured(config_of(cells_of(20), tmp_path / family, family, genes=genes))
        assert list(corpus.tokenizer.vocab.token)[:40] == SYMBOLS[20:60]
    made = measured(config_of(cells_of(20), tmp_path / "one"))
    (tmp_path / "vocab.json").write_text(made.tokenizer.vocab.to_json())
    given = measured(config_of(cells_of(25, seed=9), tmp_path / "two", dictionaries=tmp_path / "vocab.json"))
    assert given.tokenizer.vocab.median == made.tokenizer.vocab.median


def test_genes_that_no_table_knows_are_an_error_that_says_what_to_give(tmp_path) -> None:
    strange = cells_of(10, genes=[f"g{i}" for i in range(150)])
    with pytest.raises(GeneMappingError, match="Give ``genes``"):
        read_corpus(config_of(strange, tmp_path, "scgpt"))


def test_cells_without_tokens_or_that_the_objective_refuses_are_left_out_and_counted(tmp_path) -> None:
    adata = cells_of(30)
    dense = adata.X.toarray()
    dense[[3, 17]] = 0
    adata.X = sp.csr_matrix(dense)
    adata.obs["filter_pass"] = (np.arange(30) != 11).astype(int)
    corpus = read_corpus(config_of([adata[:0].copy(), adata], tmp_path))

    def refusing(packed: PackedCells) -> torch.Tensor:
        return torch.where(packed.cell_ids == 20, 0, packed.lengths.to(torch.int64))

    with pytest.warns(scfm.errors.ScfmWarning, match="filter_pass"):
        corpus.measure(refusing)
    assert np.flatnonzero(corpus.lengths == 0).tolist() == [3, 11, 17, 20]
    assert (corpus.num_without_tokens, corpus.num_training) == (4, 26)


def test_nothing_left_to_train_on_is_said(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no data given"):
        read_corpus(config_of([], tmp_path))
    with pytest.raises(ConfigError, match="no cell is left to train on of 12"):
        read_corpus(config_of({"path": cells_of(12), "held_out": {"lane": [0, 1, 2]}}, tmp_path))
    corpus = read_corpus(config_of(cells_of(12), tmp_path))
    with pytest.raises(ConfigError, match="no cell is left to train on of 12"):
        corpus.measure(lambda packed: torch.zeros(packed.num_cells, dtype=torch.int64))


def test_row_78_a_cell_longer_than_the_budget_names_its_row(file, tmp_path) -> None:
    corpus = read_corpus(config_of(str(file), tmp_path / "run", token_budget=30))
    with pytest.raises(
        ConfigError, match=r"token_budget: 30, but the longest cell, row \d+ of .*cells\.h5ad, has"
    ):
        corpus.measure(lengths_of)
    # Cut to a length that fits, the same cells are no error.
    assert (
        measured(config_of(str(file), tmp_path / "short", token_budget=30, max_tokens=30)).lengths.max() == 30
    )


@pytest.mark.parametrize("num_cells", [[1], [3], [0, 1, 0, 2], [29, 1, 13]], ids=str)
def test_row_77_ranks_do_equal_steps_whatever_the_parts_are(num_cells: list[int], tmp_path) -> None:
    data = [cells_of(n, seed=i) for i, n in enumerate(num_cells)]
    corpus = measured(config_of(data, tmp_path, microbatches_per_step=4, token_budget=200))
    steps: list[list[Any]] = []
    for rank in range(4):
        with feed_of(corpus, rank=rank, world_size=4) as feed:
            steps.append(list(islice(feed, 3)))
    stream = [
        corpus.plan(epoch).microbatch(i).tolist()
        for epoch in range(13)
        for i in range(corpus.plan(epoch).num_microbatches)
    ]
    for number, ranks in enumerate(zip(*steps, strict=True)):
        cells = [step.microbatches[0].cell_ids.tolist() for step in ranks]
        assert cells == stream[4 * number : 4 * number + 4]
        assert len({step.next for step in ranks}) == 1


def test_a_budget_that_lengths_do_not_divide_is_told(tmp_path) -> None:
    corpus = read_corpus(config_of(cells_of(60), tmp_path, max_tokens=20, token_budget=39))
    with pytest.warns(scfm.errors.ScfmWarning, match=r"token_budget = 39 leaves .* unused"):
        corpus.measure(lambda packed: torch.full((packed.num_cells,), 20))


# ---- which cells ------------------------------------------------------------------------------------------------


def test_tables_say_which_cells_are_used_and_which_are_held_out(file, tmp_path) -> None:
    table = {
        "path": "cells.h5ad",
        "keep": {"donor": ["D0", "D1", "D2"], "lane": [0, 1]},
        "held_out": {"donor": ["D2"], "lane": [1]},
    }
    corpus = measured(config_of([table, str(file)], tmp_path / "run", data_folder=tmp_path))
    obs = scfm.read(file).obs
    kept = np.flatnonzero(obs["donor"].isin(["D0", "D1", "D2"]) & obs["lane"].isin([0, 1]))
    np.testing.assert_array_equal(corpus.parts[0].rows, kept)
    expected = np.asarray((obs["donor"] == "D2") | (obs["lane"] == 1))[kept]
    np.testing.assert_array_equal(corpus.held_out, [*expected, *[False] * 120])
    held = corpus.held_out_pack(10**6)
    np.testing.assert_array_equal(held.cell_ids, np.flatnonzero(corpus.held_out))
    assert sum(pack.num_cells for pack in corpus.held_out_packs()) == corpus.num_held_out
    np.testing.assert_array_equal(corpus.obs_column("donor")[: len(kept)], obs["donor"].iloc[kept])
    assert corpus.row_label(1) == f"row {kept[1]} of {file}"


def test_columns_and_values_that_are_not_there_are_named(tmp_path) -> None:
    source = scfm.read(cells_of(12))
    with pytest.raises(ConfigError, match=r"keep: there is no column 'doner'; there are: donor, lane"):
        cells_where(source, {"doner": ["D0"]}, every=True, where="keep")
    with pytest.raises(ConfigError, match=r"no cell has 'D9' in 'donor'; values there are 'D0', 'D1'"):
        cells_where(source, {"donor": ["D0", "D9"]}, every=True, where="keep")
    with pytest.raises(ConfigError, match=r"no cell has '0' in 'lane'"):
        cells_where(source, {"lane": ["0"]}, every=True, where="keep")
    with pytest.raises(ConfigError, match=r"data\[1\]\.held_out"):
        read_corpus(config_of([cells_of(9), {"path": cells_of(9), "held_out": {"x": [1]}}], tmp_path))


def test_held_out_cells_are_keyed_by_cell() -> None:
    def one(cell: int) -> float:
        philox = np.random.Philox(key=[3, 1], counter=[cell, 0, 0, 0])
        return float(np.random.Generator(philox).random())

    chosen = held_out_cells(300, 0.3, seed=3)
    assert chosen.tolist() == [one(cell) < 0.3 for cell in range(300)]
    assert 60 < chosen.sum() < 120 and not held_out_cells(300, 0.0, seed=3).any()
    np.testing.assert_array_equal(held_out_cells(100, 0.3, seed=3), chosen[:100])
    assert not np.array_equal(held_out_cells(300, 0.3, seed=4), chosen)


def test_samples_are_keyed_by_cell_whatever_else_is_eligible(monkeypatch) -> None:
    everything = sample_cells(np.ones(1000, dtype=bool), 100, seed=1)
    some = np.zeros(1000, dtype=bool)
    some[everything[::2]] = True
    some[::7] = True
    chosen = sample_cells(some, 50, seed=1)
    # Half of those chosen of all are eligible here too, and enough: none of the others comes before them.
    assert len(chosen) == 50 and set(chosen.tolist()) <= set(everything.tolist())
    monkeypatch.setattr("scfm.train.corpus.cells._CELLS_AT_ONCE", 64)
    np.testing.assert_array_equal(sample_cells(some, 50, seed=1), chosen)
    assert np.array_equal(sample_cells(some, 10**6, seed=1), np.flatnonzero(some))
    # Cells that a fraction holds out are no likelier than others.
    held = held_out_cells(4000, 0.5, seed=1)
    assert 0.4 < held[sample_cells(np.ones(4000, dtype=bool), 1000, seed=1)].mean() < 0.6


def test_a_sample_of_held_out_cells_is_keyed_and_even(tmp_path) -> None:
    corpus = measured(config_of(cells_of(400), tmp_path, held_out_fraction=0.5))
    some = corpus.held_out_pack(50).cell_ids.tolist()
    assert len(some) == 50 and some == sorted(some) and corpus.held_out[some].all()
    assert set(some) < set(corpus.held_out_pack(80).cell_ids.tolist())
    assert 130 < np.mean(some) < 270
    training = corpus.training_pack(50).cell_ids.tolist()
    assert len(training) == 50 and not corpus.held_out[training].any()


def test_a_list_in_another_order_is_the_same_cells(tmp_path) -> None:
    """Parts with different genes; a reordered list is trained on part by part, with what is held out held out."""
    whole = cells_of(60)
    parts = [scfm.read(whole[:25, :90].copy()), scfm.read(whole[25:, 40:].copy())]
    joined = SourceList(parts)
    table = {"path": joined.select(np.random.default_rng(0).permutation(60)), "held_out": {"donor": ["D3"]}}
    plain = measured(config_of([{"path": joined, "held_out": {"donor": ["D3"]}}], tmp_path))
    mixed = measured(config_of([table], tmp_path))
    assert mixed.tokenizer.vocab.median == plain.tokenizer.vocab.median
    assert mixed.num_tokens == plain.num_tokens
    cells = [
        sorted(zip(np.arange(60) >= 25, corpus.cells.rows, corpus.held_out, strict=True))
        for corpus in (mixed, plain)
    ]
    assert cells[0] == cells[1]
    alone = [part.select(np.flatnonzero(part.obs["donor"] != "D3")) for part in parts]
    assert build_dictionaries(alone, version="V2").median == plain.tokenizer.vocab.median


# ---- medians ----------------------------------------------------------------------------------------------------


def medians_of(adata: ad.AnnData, **more: Any) -> GeneMedians:
    collected = GeneMedians(adata.n_vars, **more)
    for block in scfm.read(adata).blocks(block_size=7):
        collected.add(block, np.arange(adata.n_vars, dtype=np.int32))
    return collected


def test_medians_are_exact_while_they_fit_whenever_they_are_merged() -> None:
    adata = cells_of(150)
    dense = adata.X.toarray().astype(np.float64)
    cp10k = (dense / dense.sum(1, keepdims=True) * 1e4).astype(np.float32).astype(np.float64)
    expected = [np.median(cp10k[dense[:, g] > 0, g]) if dense[:, g].any() else np.nan for g in range(150)]
    for most in (10**6, len(np.unique(cp10k)) * 150):
        collected = medians_of(adata, most_values=most)
        np.testing.assert_array_equal(collected.medians(), expected)
        assert collected.num_bits_dropped == 0


def test_medians_of_more_values_than_fit_are_near_and_do_not_depend_on_order() -> None:
    adata = cells_of(400)
    collected = medians_of(adata)
    exact = collected.medians()
    near = medians_of(adata, most_values=6000)
    reordered = medians_of(adata[::-1].copy(), most_values=6000)
    np.testing.assert_array_equal(near.medians(), reordered.medians())
    assert near.num_bits_dropped == reordered.num_bits_dropped > 0
    bin_width = 2.0 ** (near.num_bits_dropped - 23)
    seen = ~np.isnan(exact)
    assert (np.abs(near.medians()[seen] / exact[seen] - 1) <= bin_width).all()
    assert len(near._keys) <= 6000
    # No more bits than needed.
    assert len(np.unique(collected._keys >> np.uint64(near.num_bits_dropped - 1))) > 6000


def test_medians_are_of_what_the_tokenizer_ranks() -> None:
    """The same library size, columns summed where it sums them, and training cells only."""
    gene, other = (GENES[symbol] for symbol in SYMBOLS[:2])
    adata = ad.AnnData(sp.csr_matrix(np.float32([[2, 3, 5], [1, 1, 8], [9, 9, 0]])))
    adata.var_names = [gene, f"{gene}.5", other]
    adata.obs["n_counts"] = [100.0, 50.0, 10.0]
    held_out = [np.array([False, False, True])]
    vocab = build_dictionaries([scfm.read(adata)], version="V2", held_out=held_out)
    assert vocab.median[gene] == pytest.approx((500 + 400) / 2)
    assert vocab.median[other] == pytest.approx((500 + 1600) / 2)


# ---- what is kept -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_pass(monkeypatch) -> Iterator[None]:
    """Whatever reads all cells fails."""

    def fail(*arguments: Any, **options: Any) -> None:
        pytest.fail("a pass over the data")

    monkeypatch.setattr(corpus_module, "made_vocabulary", fail)
    monkeypatch.setattr(Corpus, "_measure", fail)
    yield


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_and_other_ranks_need_no_pass(family: str, file, tmp_path, request) -> None:
    config = config_of([str(file), str(file)], tmp_path / "run", family, held_out_fraction=0.1)
    first = measured(config)
    request.getfixturevalue("no_pass")
    for rank in (0, 1):
        again = measured(config, rank=rank)
        np.testing.assert_array_equal(again.lengths, first.lengths)
        assert again.tokenizer.vocab.token == first.tokenizer.vocab.token
        assert again.fingerprint == first.fingerprint
        assert again.differences(first.fingerprint) == []
        assert (again.num_tokens, again.num_without_tokens) == (first.num_tokens, first.num_without_tokens)
    if family == "geneformer":
        assert again.tokenizer.vocab.median == first.tokenizer.vocab.median


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "lengths.npy").write_bytes(b"short"),
        lambda folder: (folder / "lengths.npy.json").write_text("{"),
        lambda folder: (folder / "lengths.npy").unlink(),
        lambda folder: (folder / "vocabulary").write_text("{}"),
        lambda folder: (folder / "vocabulary.json").write_text('["key"]'),
    ],
    ids=["lengths", "their description", "none", "vocabulary", "its description"],
)
def test_what_is_damaged_is_made_anew(damage, file, tmp_path) -> None:
    config = config_of(str(file), tmp_path / "run")
    first = measured(config)
    damage(tmp_path / "run" / "corpus")
    again = measured(config)
    np.testing.assert_array_equal(again.lengths, first.lengths)
    assert again.fingerprint == first.fingerprint


def test_a_change_of_the_data_is_named_and_a_copy_is_none(file, tmp_path) -> None:
    config = config_of([str(file)], tmp_path / "run")
    first = measured(config).fingerprint
    # Compressed, elsewhere, later: the same cells.
    copy = tmp_path / "copy.h5ad"
    ad.read_h5ad(file).write_h5ad(copy, compression="gzip")
    moved = measured(config_of([str(copy)], tmp_path / "run"))
    assert moved.differences(first) == []
    os.utime(file, ns=(1, 1))
    assert measured(config).differences(first) == []
    # The same size and shape, one count changed.
    changed = ad.read_h5ad(file)
    changed.X.data[7] += 3
    changed.write_h5ad(file)
    told = measured(config).differences(first)
    assert told and any("cells.h5ad" in one and "other cells or counts" in one for one in told)
    changed[:-1].copy().write_h5ad(file)
    assert any("119 cells instead of 120" in one for one in measured(config).differences(first))
    assert measured(config_of([str(file)] * 2, tmp_path / "run")).differences(first) == [
        "2 data files instead of 1"
    ]


def test_a_run_that_goes_on_with_other_data_keeps_its_vocabulary(file, tmp_path) -> None:
    first = measured(config_of(str(file), tmp_path / "run"))
    few = tmp_path / "few.h5ad"
    cells_of(30, genes=SYMBOLS[:40]).write_h5ad(few)
    other = measured(config_of(str(few), tmp_path / "run", allow_change=["data"]))
    assert other.tokenizer.vocab.token == first.tokenizer.vocab.token
    assert other.differences(first.fingerprint) == [f"{few} has 30 cells instead of 120"]
    anew = measured(config_of(str(few), tmp_path / "run"))
    assert len(anew.tokenizer.vocab.token) < len(first.tokenizer.vocab.token)


def test_other_held_out_cells_or_settings_are_another_corpus(file, tmp_path) -> None:
    first = measured(config_of(str(file), tmp_path / "run", dictionaries=None, held_out_fraction=0.2))
    other = measured(config_of(str(file), tmp_path / "run", held_out_fraction=0.2, seed=1))
    assert other.differences(first.fingerprint)
    longer = measured(config_of(str(file), tmp_path / "run", held_out_fraction=0.2, max_tokens=20))
    assert longer.lengths.max() == 20 and longer.differences(first.fingerprint)


def test_other_ranks_wait_for_the_first(file, tmp_path) -> None:
    config = config_of(str(file), tmp_path / "run")
    found: list[Corpus] = []
    watched: list[int] = []
    other = threading.Thread(
        target=lambda: found.append(measured(config, rank=1, watch=lambda: watched.append(1)))
    )
    other.start()
    time.sleep(0.3)
    assert not found and watched
    first = measured(config)
    other.join(30)
    np.testing.assert_array_equal(found[0].lengths, first.lengths)


def test_a_first_rank_that_never_comes_is_said(file, tmp_path) -> None:
    config = config_of(str(file), tmp_path / "run", timeout_seconds=0.3)
    with pytest.raises(ResourceError, match=r"rank 0 was to make it, and nothing has moved for 0\.3 s"):
        read_corpus(config, rank=1)


def test_a_long_pass_shows_that_it_is_alive(file, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(corpus_folder, "_SIGN_SECONDS", 0.0)
    folder = corpus_folder.CorpusFolder(tmp_path, rank=0, patience=1.0, watch=lambda: None)
    folder.sign()
    one = (tmp_path / "reading").read_text()
    folder.sign()
    assert (tmp_path / "reading").read_text() != one
    watched: list[int] = []
    measured(config_of(str(file), tmp_path / "run"), watch=lambda: watched.append(1))
    assert len(watched) >= 2


def test_data_in_memory_are_read_by_every_process_and_nothing_is_kept(tmp_path) -> None:
    config = config_of(cells_of(20), tmp_path / "run")
    one, two = measured(config), measured(config, rank=1)
    np.testing.assert_array_equal(one.lengths, two.lengths)
    assert one.fingerprint == two.fingerprint and not (tmp_path / "run").exists()


def test_held_out_cells_are_read_beside_the_feed(file, tmp_path) -> None:
    """Evaluation reads the same sources as the feed's threads, at the same time."""
    dense = ad.read_h5ad(file)
    dense.X = dense.X.toarray()
    dense.write_h5ad(tmp_path / "dense.h5ad")
    data = [str(file), str(tmp_path / "dense.h5ad")]
    corpus = measured(
        config_of(data, tmp_path / "run", held_out_fraction=0.4, shuffle_block=4, token_budget=200)
    )
    expected = corpus.held_out_pack(10**6).to_lists()
    plain = {
        cell: tokens
        for pack in corpus.packs_of(np.arange(240))
        for cell, tokens in zip(pack.cell_ids.tolist(), pack.to_lists(), strict=True)
    }
    with feed_of(corpus) as feed:
        for step in islice(feed, 40):
            for prepared in step.microbatches:
                assert prepared.packed.to_lists() == [plain[cell] for cell in prepared.cell_ids.tolist()]
            assert corpus.held_out_pack(10**6).to_lists() == expected


def test_a_file_changed_while_it_is_trained_on_is_named_at_its_step(file, tmp_path) -> None:
    corpus = measured(
        config_of(str(file), tmp_path / "run", shuffle_block=4, shuffle_window=8, token_budget=200)
    )
    changed = corpus.lengths.copy()
    last_window = corpus.plan(0).order.window(corpus.plan(0).num_windows - 1)
    changed[last_window[0]] += 1
    corpus._lengths = changed
    with feed_of(corpus) as feed:
        assert next(feed).microbatches
        with pytest.raises(
            IntegrityError, match=rf"row {last_window[0]} of .*cells\.h5ad: has another number"
        ):
            list(islice(feed, 100))
