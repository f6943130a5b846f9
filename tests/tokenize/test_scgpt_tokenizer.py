"""scGPT's tokenizer: what a user gets for real and for odd cells, files, lists and options."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scfm
from scfm.data.packed import PackedCells, concatenate
from scfm.errors import BadCellError, GeneMappingError, InvalidArgumentError
from scfm.tokenize.scgpt_vocab import ScgptVocab

GENES = [f"G{i}" for i in range(300)]
VOCAB = ScgptVocab.from_dict({gene: i for i, gene in enumerate(GENES)})


def tokenizer(**options: Any) -> scfm.ScgptTokenizer:
    return scfm.ScgptTokenizer(VOCAB, **options)


def counts(num_cells: int = 30, num_genes: int = 300, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.negative_binomial(0.4, 0.2, size=(num_cells, num_genes)).astype(np.float32)


def cells(matrix: Any, genes: list[str] | None = None, **obs: Any) -> ad.AnnData:
    matrix = np.asarray(matrix, dtype=np.float32) if not sp.issparse(matrix) else matrix
    var = pd.DataFrame(index=genes or GENES[: matrix.shape[1]])
    frame = pd.DataFrame(obs, index=[str(i) for i in range(matrix.shape[0])])
    return ad.AnnData(matrix, obs=frame, var=var)


def test_a_cell_begins_with_cls_and_keeps_its_genes_in_order() -> None:
    packed = tokenizer()(cells([[0, 5, 1, 0, 9]]))
    assert packed.to_lists() == [[VOCAB.cls_id, 1, 2, 4]]
    assert packed.values.tolist() == [-2.0, 25.0, 1.0, 50.0]
    assert packed.token_ids.dtype == torch.int32 and packed.values.dtype == torch.float32
    plain = tokenizer(append_cls=False, num_bins=11)(cells([[0, 5, 1, 0, 9]]))
    assert plain.to_lists() == [[1, 2, 4]] and plain.values.tolist() == [5.0, 1.0, 10.0]
    assert tokenizer(cls_value=0.0)(cells([[1, 2]])).values[0] == 0.0


@pytest.mark.parametrize("long_cells", ["seeded", "top"])
def test_a_cells_tokens_do_not_depend_on_order_company_chunk_or_storage(
    tmp_path: Path, long_cells: str
) -> None:
    adata = cells(sp.csr_matrix(counts()))
    tok = tokenizer(max_tokens=40, long_cells=long_cells)
    whole = tok(adata)
    order = np.random.default_rng(1).permutation(30)[:17]
    part = tok(adata[order].copy())
    assert torch.equal(part.values, whole.select(order).values)
    assert torch.equal(part.token_ids, whole.select(order).token_ids)
    blocks = concatenate(list(tok.packs(tok.read(adata), block_size=7)))
    assert torch.equal(blocks.values, whole.values)
    adata.X = adata.X.astype(np.int64)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = tok(tmp_path / "cells.h5ad")
    assert torch.equal(again.values, whole.values) and torch.equal(again.token_ids, whole.token_ids)
    threads = scfm._native.get_num_threads()
    try:
        scfm._native.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(tok(adata).values, whole.values)
    finally:
        scfm._native.set_num_threads(threads)
    assert not torch.equal(
        tokenizer(max_tokens=40, long_cells=long_cells, seed=1)(adata).values, whole.values
    )


def test_epochs_draw_anew_and_shuffling_does_not() -> None:
    tok, adata = tokenizer(max_tokens=60), cells(counts())
    whole = tok(adata)

    def epoch(number: int, seed: int) -> PackedCells:
        packs = tok.shuffled_packs(tok.read(adata), seed=seed, epoch=number, window=8, block_size=2)
        found = concatenate([packed for _, packed in packs])
        return found.select(np.argsort(found.cell_ids.numpy()))

    assert torch.equal(epoch(0, 5).values, whole.values)
    assert torch.equal(epoch(1, 5).values, epoch(1, 6).values)
    assert not torch.equal(epoch(1, 5).values, whole.values)


def test_upstreams_draws_follow_the_global_generators() -> None:
    adata, tok = cells(counts()), tokenizer(max_tokens=40, binning="upstream", long_cells="upstream")

    def run(tok: scfm.ScgptTokenizer, block_size: int = 30) -> PackedCells:
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(4)
        return concatenate(list(tok.packs(tok.read(adata), block_size=block_size)))

    packed = run(tok)
    assert torch.equal(packed.values, run(tok, 4).values)
    # By the original's steps, one cell after the other.
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(4)
    for cell, row in enumerate(adata.X):
        (places,) = np.nonzero(row)
        edges = np.quantile(row[places], np.linspace(0, 1, 50))
        left, right = np.digitize(row[places], edges), np.digitize(row[places], edges, right=True)
        bins = np.ceil(np.random.rand(len(places)) * (right - left) + left)  # noqa: NPY002
        if len(places) + 1 > 40:
            chosen = torch.randperm(len(places))[:39].numpy()
            places, bins = places[chosen], bins[chosen]
        mine = packed.select([cell])
        assert mine.token_ids.tolist() == [VOCAB.cls_id, *places.tolist()]
        assert mine.values.tolist() == [-2.0, *bins.tolist()]
    mixed = run(tokenizer(max_tokens=40, binning="upstream", long_cells="top"))
    seeded = run(tokenizer(max_tokens=40, long_cells="top"))
    assert torch.equal(mixed.token_ids, seeded.token_ids) and not torch.equal(mixed.values, seeded.values)


def test_top_keeps_the_most_expressed_and_of_equals_the_first() -> None:
    packed = tokenizer(max_tokens=4, long_cells="top")(cells([[1, 7, 2, 2, 9, 2]]))
    assert packed.to_lists() == [[VOCAB.cls_id, 1, 2, 4]]


def test_a_samples_bins_are_those_of_the_whole_cell() -> None:
    adata = cells(counts())
    whole, cut = tokenizer(max_tokens=None)(adata), tokenizer(max_tokens=30)(adata)
    for cell in range(30):
        bins = dict(zip(whole.to_lists()[cell], whole.select([cell]).values.tolist(), strict=True))
        one = cut.select([cell])
        assert len(set(one.to_lists()[0])) == 30 == one.num_tokens
        assert all(bins[t] == v for t, v in zip(one.to_lists()[0], one.values.tolist(), strict=True))


def test_zero_genes_on_request() -> None:
    packed = tokenizer(include_zero_genes=True, cls_value=0.0)(cells([[0, 5, 1, 0], [0, 0, 0, 0]]))
    assert packed.to_lists() == [[VOCAB.cls_id, 0, 1, 2, 3]] * 2
    assert packed.values.tolist() == [0.0, 0.0, 50.0, 1.0, 0.0] + [0.0] * 5


def test_cells_without_a_known_gene_are_left_out_and_counted() -> None:
    tok = tokenizer()
    packed = tok(cells([[0, 0, 3], [1, 0, 2], [0, 0, 0], [0, 5, 0]], genes=["G0", "G1", "UNKNOWN"]))
    assert packed.cell_ids.tolist() == [1, 3] and tok.report.num_empty == 2
    assert tok(cells([[1, 2]])[:0]).num_cells == 0


def test_x_is_taken_as_it_is_and_the_report_says_what_it_is() -> None:
    raw, tok = counts(), tokenizer()
    adata = cells(raw)
    adata.layers["counts"] = raw.copy()
    tok(adata)
    assert tok.report.values == f"counts, highest {raw.max():,.0f}" and tok.report.counts_from == "X"
    adata.X = np.log1p(raw * (10_000 / raw.sum(axis=1, keepdims=True)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged = tok(adata)
        from_layer = tok(adata, layer="counts")
    assert tok.report.counts_from == "layers['counts']" and tok.report.values.startswith("counts")
    tok(adata)
    assert "log1p of counts normalised to 10,000" in tok.report.values and "values from X" in str(tok.report)
    # Ranks are the same; only what lies between two values may differ.
    assert (logged.values - from_layer.values).abs().float().mean() < 8


def test_normalised_inputs() -> None:
    raw = counts(5)
    raw[:, 0] = 3
    adata = cells(raw, genes=["UNKNOWN", *GENES[1:]])
    known = raw.copy()
    known[:, 0] = 0
    scaled = known * (10_000 / known.sum(axis=1, keepdims=True))
    for style, expected in (("normed_raw", scaled), ("log1p", np.log1p(scaled))):
        packed = tokenizer(input_style=style, max_tokens=None)(adata)
        for cell in range(5):
            one = packed.select([cell])
            np.testing.assert_allclose(one.values[1:], expected[cell][expected[cell] > 0], rtol=1e-6)
            assert one.values[0] == -2.0
    logged = cells(np.log1p(scaled))
    with pytest.warns(scfm.ScfmWarning, match="taken as they are"):
        packed = tokenizer(input_style="log1p", max_tokens=None)(logged)
    np.testing.assert_allclose(packed.select([0]).values[1:], np.log1p(scaled)[0][scaled[0] > 0], rtol=1e-6)


def test_duplicates_repeat_unless_summed() -> None:
    adata = cells([[2, 3, 0, 4]], genes=["G7", "G8", "G9", "G7"])
    with pytest.warns(scfm.ScfmWarning, match="1 columns bear the symbol of another column"):
        packed = tokenizer()(adata)
    assert packed.to_lists() == [[VOCAB.cls_id, 7, 8, 7]] and packed.values[1:].tolist() == [1.0, 25.0, 50.0]
    packed = tokenizer(duplicate_genes="sum")(adata)
    assert packed.to_lists() == [[VOCAB.cls_id, 8, 7]] and packed.values[1:].tolist() == [1.0, 50.0]


def test_counts_are_summed_before_their_logarithm() -> None:
    matrix = [[2, 3, 0, 4], [0, 5, 1, 5], [7, 0, 0, 0]]
    adata = cells(matrix, genes=["G7", "G8", "G9", "G7"])
    apart = cells([[6, 3, 0], [5, 5, 1], [7, 0, 0]], genes=["G7", "G8", "G9"])
    for style in ("log1p", "normed_raw"):
        summed = tokenizer(duplicate_genes="sum", input_style=style, max_tokens=None)(adata)
        plain = tokenizer(input_style=style, max_tokens=None)(apart)
        for cell in range(3):
            mine, other = summed.select([cell]), plain.select([cell])
            found = dict(zip(mine.token_ids.tolist(), mine.values.tolist(), strict=True))
            assert found == pytest.approx(
                dict(zip(other.token_ids.tolist(), other.values.tolist(), strict=True))
            )


@pytest.mark.parametrize(
    ("bad", "words"), [(-1.5, "negative"), (np.nan, "not a finite"), (np.inf, "not a finite")]
)
def test_impossible_values_name_row_and_gene(bad: float, words: str) -> None:
    matrix = counts(6) + np.float32(0.25)
    matrix[4, 17] = bad
    with pytest.raises(BadCellError, match=rf"X, row 4: gene 17 \('G17'\).*{words}"):
        tokenizer()(cells(matrix))
    tok = tokenizer()
    with pytest.warns(scfm.ScfmWarning, match="1 cells hold NaN, infinite or negative"):
        packed = concatenate(list(tok.packs(tok.read(cells(matrix)), empty_bad_cells=True)))
    assert packed.cell_ids.tolist() == [0, 1, 2, 3, 5]


def test_values_beyond_float32_name_row_and_gene() -> None:
    matrix = counts(6).astype(np.float64)
    matrix[4, 17] = 1e300
    adata = ad.AnnData(matrix, var=pd.DataFrame(index=GENES))
    with pytest.raises(BadCellError, match=r"X, row 4: gene 17 has value 1e\+300; expected at most 3\.4"):
        tokenizer()(adata)


def test_a_list_of_sources_is_each_by_its_own_genes(tmp_path: Path) -> None:
    first, second = cells(counts(4)), cells(np.log1p(counts(3, 200, seed=1)), genes=GENES[100:])
    second.write_h5ad(tmp_path / "second.h5ad")
    tok = tokenizer()
    together = tok([first, tmp_path / "second.h5ad"])
    assert together.cell_ids.tolist() == list(range(7)) and len(tok.report.parts) == 2
    assert tok.report.parts[0].values.startswith("counts") and "non-integer" in tok.report.values
    apart = concatenate([tok(first), tok(second)])
    assert torch.equal(together.values, apart.values) and torch.equal(together.token_ids, apart.token_ids)
    assert tok.report.to_dict()["values"] == tok.report.values


def test_filter_pass_and_truncation_are_counted() -> None:
    tok = tokenizer(max_tokens=10)
    with pytest.warns(scfm.ScfmWarning, match="1 cells were left out by"):
        packed = tok(cells(counts(3), filter_pass=[1, 0, 1]))
    assert packed.cell_ids.tolist() == [0, 2] and packed.lengths.tolist() == [10, 10]
    assert (tok.report.num_truncated, tok.report.num_tokens, tok.report.num_filtered) == (2, 20, 1)


def test_genes_are_checked_before_any_cell(tmp_path: Path) -> None:
    adata = cells([[1, 2]], genes=["X", "Y"])
    adata.write_h5ad(tmp_path / "x.h5ad")
    tok = tokenizer()
    with pytest.raises(GeneMappingError, match=r"x\.h5ad"):
        tok.check_genes(tok.read(tmp_path / "x.h5ad"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"binning": "random"}, "binning: 'random'"),
        ({"long_cells": "cut"}, "long_cells: 'cut'"),
        ({"input_style": "raw"}, "input_style: 'raw'"),
        ({"duplicate_genes": "mean"}, "duplicate_genes: 'mean'"),
        ({"gene_rules": "some"}, "gene_rules: 'some'"),
        ({"num_bins": 1}, "num_bins: 1"),
        ({"num_bins": 100_000}, "num_bins: 100000"),
        ({"max_tokens": 1}, "max_tokens: 1; expected at least 2"),
        ({"max_tokens": 0, "append_cls": False}, "max_tokens: 0; expected at least 1"),
        ({"seed": -1}, "seed: -1"),
        ({"cls_value": np.nan}, "cls_value: nan"),
        ({"cls_value": "pad"}, "cls_value: 'pad'"),
        ({"max_tokens": "12"}, "max_tokens: '12'"),
        ({"num_bins": 51.0}, "num_bins: 51.0"),
        ({"seed": None}, "seed: None"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        tokenizer(**options)


def test_settings_for_provenance() -> None:
    described = tokenizer(seed=7, max_tokens=None).describe()
    assert described["name"] == "scgpt" and described["seed"] == 7 and described["max_tokens"] is None
    assert described["binning"] == "seeded" and described["num_bins"] == 51


@pytest.mark.data
@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "least", "options"),
    [
        ("pbmc3k_labeled.h5ad", 27_000, {}),
        ("pbmc3k_labeled.h5ad", 31_000, {"gene_rules": "all"}),
        ("spatial_osmfish_mouse_cortex.h5ad", 32, {"species": "mouse"}),
    ],
)
@pytest.mark.filterwarnings("ignore::scfm.ScfmWarning")
def test_real_cells(goldens: Any, data_file: Any, name: str, least: int, options: dict[str, Any]) -> None:
    tok = scfm.ScgptTokenizer.from_vocab(goldens("scgpt/vocab") / "vocab_whole_human.json", **options)
    packed = tok(data_file(name))
    assert tok.report.coverage.num_mapped >= least and tok.report.coverage.share_of_counts > 0.9
    assert packed.num_cells > 2000 and int(packed.lengths.max()) <= 1200
    starts = packed.cu_seqlens[:-1].long()
    assert (packed.token_ids[starts] == 60_695).all() and (packed.values[starts] == -2).all()
    rest = torch.ones(packed.num_tokens, dtype=torch.bool)
    rest[starts] = False
    bins = packed.values[rest]
    assert bins.min() == 1 and bins.max() == 50 and torch.equal(bins, bins.round())
