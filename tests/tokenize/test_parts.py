"""Tokens and embeddings of a list are those of its parts, in any order of the cells; so are shuffled ones."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scfm
from scfm.data.source import CellSource
from scfm.data.source_list import SourceList
from scfm.errors import BadCellError, InvalidArgumentError
from scfm.tokenize.dictionaries import GeneformerDictionaries

GENES = [f"ENSG{i:011d}" for i in range(1, 121)]
SHUFFLE = {"seed": 4, "block_size": 8, "window": 24}


def cells(num_cells: int, genes: list[str], *, seed: int, dense: bool = False) -> ad.AnnData:
    counts = np.random.default_rng(seed).poisson(0.7, size=(num_cells, len(genes))).astype(np.float32)
    adata = ad.AnnData(counts if dense else sp.csr_matrix(counts), var=pd.DataFrame(index=genes))
    adata.obs_names = [f"{seed}-{i}" for i in range(num_cells)]
    return adata


@pytest.fixture
def parts() -> list[ad.AnnData]:
    """Three sets of different genes, one dense, one with its own library sizes, each with an empty cell."""
    a = cells(31, GENES[:80], seed=1)
    b = cells(1, GENES[40:], seed=2, dense=True)
    c = cells(24, [*GENES[100:60:-1], "unknown"], seed=3, dense=True)
    d = cells(17, GENES[::-1], seed=4)
    a.X.data[a.X.indptr[5] : a.X.indptr[6]] = 0
    a.X.eliminate_zeros()
    c.X[0, :-1] = 0
    c.obs["n_counts"] = np.linspace(50, 60, 24).astype(np.float32)
    d.obs["n_counts"] = np.linspace(500, 90, 17)
    return [a, b, c, d]


@pytest.fixture
def source(parts: list[ad.AnnData]) -> SourceList:
    return SourceList([scfm.read(part) for part in parts])


@pytest.fixture
def tokenizer(tiny_vocab: GeneformerDictionaries) -> scfm.GeneformerTokenizer:
    return scfm.GeneformerTokenizer(tiny_vocab, max_tokens=40, keep_counts=True)


def by_cell(packed: scfm.PackedCells) -> dict[int, tuple[list[int], list[float]]]:
    bounds = packed.cu_seqlens.tolist()
    return {
        int(cell): (
            packed.token_ids[bounds[i] : bounds[i + 1]].tolist(),
            packed.values[bounds[i] : bounds[i + 1]].tolist(),
        )
        for i, cell in enumerate(packed.cell_ids.tolist())
    }


def parts_alone(tokenizer: scfm.GeneformerTokenizer, source: CellSource) -> dict[int, tuple]:
    found, first = {}, 0
    for part in source.parts:
        found |= {first + cell: tokens for cell, tokens in by_cell(tokenizer(part)).items()}
        first += len(part)
    return found


def test_a_list_gives_the_tokens_of_its_parts(tokenizer, source) -> None:
    expected = parts_alone(tokenizer, source)
    assert set(range(73)) - set(expected) == {5, 32}
    for block_size in (1, 7, 4096):
        packs = list(tokenizer.packs(source, block_size=block_size))
        got = {cell: tokens for pack in packs for cell, tokens in by_cell(pack).items()}
        assert got == expected
    assert list(got) == sorted(got)
    assert by_cell(tokenizer(source)) == expected


def test_any_order_of_cells_gives_each_its_tokens(tokenizer, source) -> None:
    expected = parts_alone(tokenizer, source)
    chosen = np.random.default_rng(0).integers(0, 73, size=90)
    selection = source.select(chosen)
    for block_size in (1, 16, 4096):
        got = {}
        for pack in tokenizer.packs(selection, block_size=block_size):
            assert (np.diff(pack.cell_ids.numpy()) > 0).all()
            got |= by_cell(pack)
        assert got == {i: expected[cell] for i, cell in enumerate(chosen.tolist()) if cell in expected}


@pytest.mark.parametrize("world_size", [1, 3])
def test_shuffled_packs_hold_the_same_tokens_in_the_shuffled_order(tokenizer, source, world_size) -> None:
    expected = parts_alone(tokenizer, source)
    plan = source.shuffled(**SHUFFLE, epoch=2).positions().tolist()
    by_cursor = {}
    for rank in range(world_size):
        for cursor, pack in tokenizer.shuffled_packs(
            source, **SHUFFLE, epoch=2, rank=rank, world_size=world_size
        ):
            by_cursor[cursor] = pack
    order: list[int] = []
    for cursor in sorted(by_cursor):
        assert by_cell(by_cursor[cursor]).items() <= expected.items()
        order += by_cursor[cursor].cell_ids.tolist()
    assert order == [cell for cell in plan if cell in expected]
    assert max(by_cursor) == 73


def test_shuffled_packs_go_on_from_any_cursor(tokenizer, source) -> None:
    whole = [pack for _, pack in tokenizer.shuffled_packs(source, **SHUFFLE)]
    order = [cell for pack in whole for cell in pack.cell_ids.tolist()]
    plan = source.shuffled(**SHUFFLE).positions().tolist()
    for start in (0, 1, 23, 40, 72, 73):
        packs = [pack for _, pack in tokenizer.shuffled_packs(source, **SHUFFLE, start=start)]
        rest = [cell for pack in packs for cell in pack.cell_ids.tolist()]
        assert rest == [cell for cell in order if cell in set(plan[start:])]


def test_an_ordinary_source_shuffles_too(tokenizer, parts) -> None:
    source = scfm.read(parts[0])
    expected = by_cell(tokenizer(source))
    got = {}
    for _, pack in tokenizer.shuffled_packs(source.select(slice(None, None, -1)), **SHUFFLE):
        got |= {30 - cell: tokens for cell, tokens in by_cell(pack).items()}
    assert got == expected
    assert tokenizer.report.num_cells == 31 and tokenizer.report.parts == []
    with pytest.raises(InvalidArgumentError, match="window"):
        tokenizer.shuffled_packs(source, seed=0, block_size=64, window=32)


def test_the_report_lists_each_part_and_adds_them_up(tokenizer, source) -> None:
    alone = []
    for part in source.parts:
        tokenizer(part)
        alone.append(tokenizer.report)
    tokenizer(source)
    report = tokenizer.report
    assert [part.to_dict() for part in report.parts] == [part.to_dict() for part in alone]
    for name in ("num_cells", "num_empty", "num_truncated", "num_tokens", "num_filtered"):
        assert getattr(report, name) == sum(getattr(part, name) for part in alone), name
    assert report.num_empty == 2 and report.num_cells == 73 and report.num_truncated > 0
    counts = [part.coverage for part in alone]
    assert report.coverage.total_counts == sum(one.total_counts for one in counts)
    assert report.coverage.mapped_counts < report.coverage.total_counts
    assert report.coverage.num_genes == sum(one.num_genes for one in counts)
    assert report.library_size_from == "row sums, obs['n_counts']"
    facts = report.to_dict()
    assert list(facts["parts"]) == ["0", "1", "2", "3"] and facts["coverage"]["missing"] == ["unknown"]
    assert str(report).count("genes and") == 4 and "4 parts" in str(report)
    # Shuffled and selected cells are counted once each, and parts nobody asked need no gene plan.
    for _ in tokenizer.shuffled_packs(source, **SHUFFLE):
        pass
    assert tokenizer.report.num_tokens == report.num_tokens
    tokenizer(source.select([70, 31, 71]))
    assert [part.num_cells for part in tokenizer.report.parts] == [1, 2]


def test_filter_pass_and_library_sizes_belong_to_their_part(tokenizer, parts) -> None:
    parts[0].obs["filter_pass"] = (np.arange(31) % 2).astype(int)
    source = SourceList([scfm.read(part) for part in parts])
    with pytest.warns(scfm.ScfmWarning, match="16 cells were left out by"):
        packed = tokenizer(source.select(np.arange(73)[::-1]))
    kept = {72 - cell for cell in packed.cell_ids.tolist()}
    assert kept == {cell for cell in range(73) if cell % 2 or cell > 30} - {5, 32}
    assert tokenizer.report.num_filtered == 16
    assert [part.num_filtered for part in tokenizer.report.parts] == [16, 0, 0, 0]
    parts[2].obs["n_counts"] = np.where(np.arange(24) == 3, -1.0, 50.0)
    with pytest.raises(BadCellError, match="row 3"):
        tokenizer(SourceList([scfm.read(part) for part in parts]))


def test_stored_zeros_are_counted_over_all_parts(tiny_vocab) -> None:
    adatas = [cells(4, GENES[:9], seed=i) for i in range(2)]
    zeros = [int((adata.X.data[:6] != 0).sum()) for adata in adatas]
    for adata in adatas:
        adata.X.data[:6] = 0
    tokenizer = scfm.GeneformerTokenizer(tiny_vocab)
    with pytest.warns(scfm.ScfmWarning, match="explicitly stored zeros"):
        tokenizer(SourceList([scfm.read(adata) for adata in adatas]))
    assert tokenizer.report.num_stored_zeros == sum(zeros) == 12


def test_no_cells_and_one_part_are_ordinary(tokenizer, source, parts) -> None:
    assert tokenizer(source.select([])).num_cells == 0
    assert list(tokenizer.shuffled_packs(source.select([]), seed=0)) == []
    one = SourceList([scfm.read(parts[0])])
    assert by_cell(tokenizer(one)) == by_cell(tokenizer(parts[0]))
    assert tokenizer.report.parts == []


def test_embeddings_of_a_list_have_the_bits_of_its_parts(tiny_model, source) -> None:
    alone = np.concatenate([tiny_model.embed(part, on_bad_cell="nan") for part in source.parts])
    assert np.isnan(alone[[5, 32]]).all() and np.isfinite(np.delete(alone, [5, 32], axis=0)).all()
    np.testing.assert_array_equal(tiny_model.embed(source, on_bad_cell="nan"), alone)
    skipped = tiny_model.embed(source, on_bad_cell="skip", token_budget=100)
    np.testing.assert_array_equal(skipped, np.delete(alone, [5, 32], axis=0))
    order = np.random.default_rng(1).permutation(73)
    np.testing.assert_array_equal(tiny_model.embed(source.select(order), on_bad_cell="nan"), alone[order])
    with pytest.raises(BadCellError, match="no gene that the model knows"):
        tiny_model.embed(source)
