"""GeneformerTokenizer on what users bring: options, odd cells, odd genes, and what the report says of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scfm
from scfm.errors import BadCellError, ConfigError, GeneMappingError, InvalidArgumentError, NotCountsError
from scfm.tokenize.dictionaries import GeneformerDictionaries

GENES = [f"ENSG{i:011d}" for i in range(1, 9)]
MEDIANS = dict(zip(GENES, [1.0, 2.0, 4.0, 8.0, 1.0, 1.0, 3.0, 5.0], strict=True))


def vocab(version: str = "V2") -> GeneformerDictionaries:
    return GeneformerDictionaries.from_vocabulary(GENES, MEDIANS, version=version)


def cells(rows: list[list[float]], genes: list[str] | None = None, **obs: list) -> ad.AnnData:
    counts = sp.csr_matrix(np.asarray(rows, dtype=np.float32))
    adata = ad.AnnData(counts, var=pd.DataFrame(index=pd.Index(genes or GENES[: counts.shape[1]])))
    for name, values in obs.items():
        adata.obs[name] = values
    return adata


def names(tokenizer: scfm.GeneformerTokenizer, packed: scfm.PackedCells) -> list[list[int]]:
    """Gene numbers 1..8 in rank order, special tokens left out."""
    first = tokenizer.vocab.token[GENES[0]]
    return [[t - first + 1 for t in cell if t >= first] for cell in packed.to_lists()]


def test_ranks_by_median_normalised_expression_with_stable_ties() -> None:
    tokenizer = scfm.GeneformerTokenizer(vocab())
    packed = tokenizer(cells([[3, 4, 4, 0, 1], [1, 2, 4, 8, 1]]))
    # values 3, 2, 1, -, 1: the tie of genes 3 and 5 goes by column; in the second cell all five are 1
    assert names(tokenizer, packed) == [[1, 2, 3, 5], [1, 2, 3, 4, 5]]
    assert packed.to_lists()[0][0] == 2 and packed.to_lists()[0][-1] == 3
    v1 = scfm.GeneformerTokenizer(vocab("V1"))
    assert names(v1, v1(cells([[3, 4, 4, 0, 1]]))) == [[1, 2, 3, 5]]
    assert v1(cells([[3, 4, 4, 0, 1]])).num_tokens == 4


def test_truncation_keeps_the_first_ranks_and_the_special_tokens() -> None:
    adata = cells([[8, 7, 6, 5, 4]], genes=[GENES[i] for i in (0, 4, 5, 1, 6)])
    whole = scfm.GeneformerTokenizer(vocab())(adata).to_lists()[0]
    for limit in (3, 6, 7, 8):
        tokenizer = scfm.GeneformerTokenizer(vocab(), max_tokens=limit)
        assert tokenizer(adata).to_lists()[0] == [2, *whole[1:-1][: limit - 2], 3]
        assert tokenizer.report.num_truncated == int(limit < 7)
    with pytest.raises(InvalidArgumentError, match="max_tokens"):
        scfm.GeneformerTokenizer(vocab(), max_tokens=2)


def test_cells_without_tokens_are_left_out_and_named_by_what_remains() -> None:
    tokenizer = scfm.GeneformerTokenizer(vocab())
    adata = cells([[0, 0, 0], [1, 0, 2], [0, 0, 0], [0, 5, 0]], genes=[*GENES[:2], "NOT_A_GENE"])
    packed = tokenizer(adata)
    assert packed.cell_ids.tolist() == [1, 3] and tokenizer.report.num_empty == 2
    assert tokenizer(adata[:0]).num_cells == 0
    assert names(tokenizer, packed) == [[1], [2]]


def test_filter_pass_leaves_cells_out_as_the_authors_do() -> None:
    tokenizer = scfm.GeneformerTokenizer(vocab())
    with pytest.warns(scfm.ScfmWarning, match="1 cells were left out by"):
        packed = tokenizer(cells([[1, 2]] * 3, filter_pass=[1, 0, 1]))
    assert packed.cell_ids.tolist() == [0, 2] and tokenizer.report.num_filtered == 1


def test_a_filter_pass_of_text_is_refused_rather_than_dropping_every_cell() -> None:
    with pytest.raises(InvalidArgumentError, match="filter_pass"):
        scfm.GeneformerTokenizer(vocab())(cells([[1, 2]], filter_pass=["1"]))


def test_errors_name_the_row_of_the_file_also_in_a_selection() -> None:
    adata = cells([[1, 2]] * 20, n_counts=[3.0] * 15 + [0.0] + [3.0] * 4)
    with pytest.raises(BadCellError, match="row 15"):
        scfm.GeneformerTokenizer(vocab())(scfm.read(adata).select(range(10, 20)))


def stored_zeros() -> ad.AnnData:
    """One cell: gene 1 an explicitly stored zero, gene 2 three counts."""
    adata = cells([[0, 3, 0]])
    adata.X = sp.csr_matrix((np.float32([0, 3]), np.int32([0, 1]), np.int32([0, 2])), shape=(1, 3))
    return adata


def test_stored_zeros_are_tokens_unless_dropped() -> None:
    keep = scfm.GeneformerTokenizer(vocab())
    with pytest.warns(scfm.ScfmWarning, match="1 explicitly stored zeros"):
        assert names(keep, keep(stored_zeros())) == [[2, 1]]
    drop = scfm.GeneformerTokenizer(vocab(), stored_zeros="drop")
    assert names(drop, drop(stored_zeros())) == [[2]]


def test_repeated_ids_repeat_unless_summed() -> None:
    adata = cells([[2, 3, 3]], genes=[GENES[0], GENES[4], GENES[0]])
    repeat = scfm.GeneformerTokenizer(vocab())
    with pytest.warns(scfm.ScfmWarning, match="2 columns bear the identifier of another"):
        assert names(repeat, repeat(adata)) == [[5, 1, 1]]
    added = scfm.GeneformerTokenizer(vocab(), duplicate_genes="sum")
    assert names(added, added(adata)) == [[1, 5]]


def test_library_size_comes_from_n_counts_or_from_the_row_sums() -> None:
    tokenizer = scfm.GeneformerTokenizer(vocab(), keep_counts=True)
    given = tokenizer(cells([[2, 2]], n_counts=[8.0]))
    assert tokenizer.report.library_size_from == "obs['n_counts']"
    assert given.values.tolist() == [0.0, 2500.0, 2500.0, 0.0]
    summed = tokenizer(cells([[2, 2]]))
    assert tokenizer.report.library_size_from == "row sums"
    assert summed.values.tolist() == [0.0, 5000.0, 5000.0, 0.0]


@pytest.mark.parametrize("sizes", [[0.0, 4.0], [np.nan, 4.0], [-1.0, 4.0], ["a", "b"]], ids=str)
def test_an_impossible_library_size_names_its_row(sizes: list) -> None:
    with pytest.raises(BadCellError, match="n_counts"):
        scfm.GeneformerTokenizer(vocab())(cells([[2, 2], [2, 2]], n_counts=sizes))


def test_normalised_values_are_refused_unless_assumed_counts() -> None:
    adata = cells([[0.5, 1.5, 0.25]] * 4)
    tokenizer = scfm.GeneformerTokenizer(vocab())
    with pytest.raises(NotCountsError):
        tokenizer(adata)
    with pytest.warns(scfm.ScfmWarning, match="12 of 12 values are not integers"):
        assert names(tokenizer, tokenizer(adata, assume_counts=True))[0] == [2, 1, 3]
    adata.layers["counts"] = sp.csr_matrix(np.float32([[1, 1, 9]] * 4))
    assert names(tokenizer, tokenizer(adata))[0] == [3, 1, 2]
    assert tokenizer.report.counts_from == "layers['counts']"


def test_genes_without_a_median_are_left_out_and_counted() -> None:
    lacking = replace(vocab(), median={g: m for g, m in MEDIANS.items() if g != GENES[1]})
    tokenizer = scfm.GeneformerTokenizer(lacking)
    with pytest.warns(scfm.ScfmWarning, match="1 columns map to genes without a median"):
        assert names(tokenizer, tokenizer(cells([[9, 1, 9]]))) == [[1, 3]]
    with pytest.raises(ConfigError, match="gene_median_dictionary"):
        scfm.GeneformerTokenizer(replace(vocab(), median={}))


def test_no_known_gene_is_an_error_with_examples() -> None:
    with pytest.raises(GeneMappingError, match="foo"):
        scfm.GeneformerTokenizer(vocab())(cells([[1, 2]], genes=["foo", "bar"]))


def test_versions_and_lower_case_outside_the_authors_column() -> None:
    tokenizer = scfm.GeneformerTokenizer(vocab())
    packed = tokenizer(cells([[1, 5, 9]], genes=[f"{GENES[0]}.12", GENES[4].lower(), GENES[5]]))
    assert names(tokenizer, packed) == [[6, 5, 1]]
    assert tokenizer.report.coverage.share_of_counts == 1.0


@pytest.mark.parametrize(
    "options", [{"stored_zeros": "no"}, {"duplicate_genes": 1}, {"gene_rules": "?"}], ids=str
)
def test_unknown_options_are_named(options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        scfm.GeneformerTokenizer(vocab(), **options)


def test_the_report_counts_in_plain_words() -> None:
    tokenizer = scfm.GeneformerTokenizer(vocab())
    tokenizer(cells([[3, 1], [4, 0]], genes=[GENES[0], "UNKNOWN1"]))
    text = str(tokenizer.report)
    assert "2 cells" in text and "1 of 2 genes and 87.5 % of counts" in text and "UNKNOWN1" in text


def test_a_plain_machine_gives_the_same_tokens(tiny_model, tiny_adata, tmp_path) -> None:
    """Without triton and with the generic instruction set only."""
    tiny_adata.write_h5ad(tmp_path / "cells.h5ad")
    folder = tiny_model.save(tmp_path / "model")
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import scfm, numpy as np\n"
        f"model = scfm.load({str(folder)!r}, dtype='float32')\n"
        f"packed = model.tokenize({str(tmp_path / 'cells.h5ad')!r})\n"
        f"np.savez({str(tmp_path / 'out.npz')!r}, tokens=packed.token_ids, X=model.embed(packed))\n"
    )
    environment = {"SCFM_ISA": "generic", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    stored = np.load(tmp_path / "out.npz")
    packed = tiny_model.tokenize(tiny_adata)
    np.testing.assert_array_equal(stored["tokens"], packed.token_ids)
    np.testing.assert_allclose(stored["X"], tiny_model.embed(packed), atol=1e-5)
