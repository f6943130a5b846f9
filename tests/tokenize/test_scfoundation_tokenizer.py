"""scFoundation's tokenizer: genes by name, every input of the original, and a word on whatever is odd."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scfm
from models.scfoundation_cells import GENES, NUM_GENES, counts
from scfm.errors import (
    BadCellError,
    FormatError,
    GeneMappingError,
    InvalidArgumentError,
    MissingFileError,
    NotCountsError,
    ScfmWarning,
)
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.tokenize.scfoundation_options import ScfoundationOptions, parse_target

T, S = NUM_GENES, NUM_GENES + 1


def tokens(adata: ad.AnnData, **options) -> list[tuple[list[int], np.ndarray]]:
    """Each cell's positions and values."""
    packed = scfm.ScfoundationTokenizer(GENES, **options)(adata)
    bounds = packed.cu_seqlens.tolist()
    return [
        (packed.token_ids[a:b].tolist(), packed.values[a:b].numpy()) for a, b in itertools.pairwise(bounds)
    ]


def small(rows, genes=("GENE2", "GENE0", "GENE5"), **obs) -> ad.AnnData:
    x = sp.csr_matrix(np.asarray(rows, dtype=np.float64))
    return ad.AnnData(
        x,
        var=pd.DataFrame(index=list(genes)),
        obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(x.shape[0])]),
    )


def quiet(adata: ad.AnnData, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScfmWarning)
        return tokens(adata, **options)


LN = np.log1p


@pytest.mark.parametrize(
    ("options", "genes", "depths"),
    [
        ({}, [LN(5000), LN(2500), LN(2500)], [4.0, np.log10(400)]),
        ({"target": "f5"}, [LN(5000), LN(2500), LN(2500)], [np.log10(2000), np.log10(400)]),
        ({"target": "a1.5"}, [LN(5000), LN(2500), LN(2500)], [np.log10(400) + 1.5, np.log10(400)]),
        ({"pre_normalized": "T"}, [200, 100, 100], [4.0, np.log10(400)]),
        (
            {"pre_normalized": "A", "total_counts": "total", "target": "f2"},
            [200, 100, 100],
            [np.log10(1800), np.log10(900)],
        ),
        (
            {"input_type": "bulk", "bulk_target_sum": 100.0},
            [LN(50), LN(25), LN(25)],
            [np.log10(LN(50) + 2 * LN(25))] * 2,
        ),
        ({"input_type": "bulk", "pre_normalized": "T"}, [200, 100, 100], [400, 400]),
    ],
)
def test_every_kind_of_input(options, genes, depths) -> None:
    adata = small([[100, 200, 100]], total=[900.0])
    ((positions, values),) = quiet(adata, **options)
    assert positions == [0, 2, 5, T, S]
    np.testing.assert_allclose(values, np.float32([*genes, *depths]), rtol=1e-6)


def test_bulk_samples_are_scaled_to_their_median() -> None:
    adata = small([[10, 20, 30], [100, 50, 50], [0, 0, 0], [1, 2, 1000]])
    with pytest.warns(ScfmWarning, match="scaled to 200, the median total of these 3 samples"):
        cells = tokens(adata, input_type="bulk")
    np.testing.assert_allclose(cells[0][1][0], LN(20 / 60 * 200), rtol=1e-6)
    fixed = quiet(adata, input_type="bulk", bulk_target_sum=200)
    for ours, want in zip(cells, fixed, strict=True):
        np.testing.assert_array_equal(ours[1], want[1])


def test_float32_arithmetic() -> None:
    x = np.array([[3.0, 7.0, 11.0]], dtype=np.float32)
    ((_, values),) = quiet(small(x), arithmetic="float32")
    want = np.log1p((x[0] / x.sum() * np.float32(1e4)).astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(values[:3], want[[1, 0, 2]])


def test_only_the_models_genes_count_for_the_depth() -> None:
    adata = small([[100, 200, 100]], genes=("GENE2", "FOREIGN", "GENE5"))
    ((positions, values),) = quiet(adata)
    assert positions == [2, 5, T, S]
    np.testing.assert_allclose(values[[0, 3]], [LN(5000), np.log10(200)], rtol=1e-6)


def test_order_and_company_change_nothing() -> None:
    adata = counts(9)
    whole = quiet(adata)
    shuffled = adata[[5, 2], np.random.default_rng(0).permutation(adata.n_vars)].copy()
    for ours, cell in zip(quiet(shuffled), (5, 2), strict=True):
        assert ours[0] == whole[cell][0]
        np.testing.assert_array_equal(ours[1], whole[cell][1])


@pytest.mark.filterwarnings("ignore:Variable names")
def test_columns_of_one_symbol() -> None:
    adata = small([[1, 20, 30]], genes=("GENE2", "GENE2", "GENE5"))
    with pytest.warns(ScfmWarning, match="1 columns bear the symbol of another column and are summed"):
        ((_, values),) = tokens(adata)
    np.testing.assert_allclose(values[0], LN(21 / 51 * 1e4), rtol=1e-6)
    with pytest.warns(ScfmWarning, match="are passed over"):
        ((_, values),) = tokens(adata, duplicate_genes="first")
    np.testing.assert_allclose(values[0], LN(1 / 31 * 1e4), rtol=1e-6)
    ((_, values),) = quiet(adata, pre_normalized="T")  # logarithms are never summed
    assert values[0] == 1.0


def test_genes_by_ensembl_id_and_from_mice() -> None:
    panel = ["CD3E", "MS4A1", "NKG7"]
    tokenizer = scfm.ScfoundationTokenizer(panel)
    human = small([[10, 20, 30]], genes=("ENSG00000198851", "ENSG00000156738", "ENSG00000105374"))
    packed = tokenizer(human)
    assert packed.token_ids.tolist() == [0, 1, 2, 3, 4]
    assert tokenizer.report.coverage.by_route == {"ensembl": 3}
    mouse = small([[10, 20, 30]], genes=("Cd3e", "Ms4a1", "Nkg7"))
    with pytest.raises(GeneMappingError):
        tokenizer(mouse)
    assert tokenizer(mouse, species="mouse").token_ids.tolist() == [0, 1, 2, 3, 4]


# ---- guards -----------------------------------------------------------------------------------------------------


def test_a_lost_depth_token_is_told_or_refused() -> None:
    logs = small([[0.3, 0.2, 0.1], [2.0, 1.0, 1.5]])
    with pytest.warns(
        ScfmWarning, match=r"1 cells \(rows 0\) have a read depth T or S that is not above zero"
    ):
        cells = tokens(logs, pre_normalized="T")
    assert [positions[-1] for positions, _ in cells] == [T, S]
    with pytest.raises(BadCellError, match="row 0"):
        tokens(logs, pre_normalized="T", depth_tokens="error")
    # one count: no S, and no gene in front of the last two tokens either
    single = small([[1, 0, 0], [5, 5, 0], [0, 0, 0]])
    tokenizer = scfm.ScfoundationTokenizer(GENES)
    with pytest.warns(ScfmWarning, match="not above zero"):
        packed = tokenizer(single)
    assert packed.cell_ids.tolist() == [1] and tokenizer.report.num_empty == 2


def test_targets_below_the_source_are_told() -> None:
    deep = small([[20_000, 1, 1], [5, 5, 5]])
    with pytest.warns(ScfmWarning, match=r"1 cells \(rows 0\) are deeper than the target 't4'"):
        tokens(deep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(deep, target="f1")
        tokens(deep, target="a0")
        tokens(deep, target="a0", depth_tokens="error")


def test_logs_are_no_counts_and_counts_no_logs() -> None:
    raw = counts(6)
    logs = raw.copy()
    dense = raw.X.toarray()
    logs.X = sp.csr_matrix(np.log1p(dense / dense.sum(1, keepdims=True) * 1e4))
    with pytest.raises(NotCountsError):
        tokens(logs)
    with pytest.warns(ScfmWarning, match="whole numbers, as raw counts are"):
        tokens(raw, pre_normalized="T")
    with pytest.warns(ScfmWarning, match="another normalisation"):
        tokens(small([[11.5, 0.3, 2.0]]), pre_normalized="T")
    with pytest.warns(ScfmWarning, match="look log-transformed"):
        tokens(small([[1.5, 0.3, 2.0]]), input_type="bulk", bulk_target_sum=3.8)


def test_listed_totals_must_be_there_and_be_numbers() -> None:
    adata = small([[1.5, 0.3, 2.0]], total=["many"])
    listed = {"pre_normalized": "A", "total_counts": "total"}
    with pytest.raises(InvalidArgumentError, match="'many'"):
        tokens(adata, **listed)
    adata.obs["total"] = [-3.0]
    with pytest.raises(InvalidArgumentError, match="row 0"):
        tokens(adata, **listed)
    with pytest.raises(InvalidArgumentError, match="no column 'sum'; there are: total"):
        tokens(adata, **{**listed, "total_counts": "sum"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": "4"},
        {"target": "t0"},
        {"target": "t-1"},
        {"target": "f0"},
        {"target": "t1e999"},
        {"target": 4},
        {"target": "t4\n"},
        {"input_type": "both"},
        {"pre_normalized": "X"},
        {"pre_normalized": "A"},
        {"total_counts": "total"},
        {"input_type": "bulk", "pre_normalized": "A", "total_counts": "total"},
        {"bulk_target_sum": 100.0},
        {"input_type": "bulk", "bulk_target_sum": 0.0},
        {"arithmetic": "float16"},
        {"depth_tokens": "keep"},
        {"duplicate_genes": "max"},
        {"gene_rules": "some"},
    ],
)
def test_options_that_make_no_sense(wrong) -> None:
    with pytest.raises(InvalidArgumentError):
        ScfoundationOptions(**wrong)


def test_targets() -> None:
    assert parse_target("t4") == ("fixed", 4.0)
    assert parse_target("f.5") == ("times", 0.5)
    assert parse_target("a-1e-1") == ("plus", -0.1)


# ---- the list of genes -------------------------------------------------------------------------------------------


def test_genes_from_the_authors_file_and_from_a_list(tmp_path: Path) -> None:
    genes = ScfoundationGenes.of(GENES)
    (tmp_path / "genes.tsv").write_text(genes.to_tsv())
    (tmp_path / "plain.txt").write_text("\n".join(GENES) + "\n")
    for path in ("genes.tsv", "plain.txt"):
        assert ScfoundationGenes.of(tmp_path / path).token == genes.token
    assert genes.genes == GENES and genes.target_position == NUM_GENES


@pytest.mark.golden
def test_the_authors_genes(goldens) -> None:
    genes = ScfoundationGenes.from_file(goldens("scfoundation") / "OS_scRNA_gene_index.19264.tsv")
    assert genes.num_genes == 19_264 and genes.genes[0] == "A1BG"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"gene_name\tindex\nA\t1\n",
        b"gene_name\tindex\nA\t0\nB\t2\n",
        b"gene_name\tindex\nA\t0\nA\t1\n",
        b"A\nB\nA\n",
        b"A\n\nB\n",
        b"A\n<T>\n",
        b"A\tB\tC\n",
        b"\xff\xfe\x00A",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!DOCTYPE html><html></html>",
        b"A" * 1000,
    ],
)
def test_files_that_are_no_genes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "genes.tsv"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"genes\.tsv"):
        ScfoundationGenes.from_file(path)


def test_missing_and_wrong_genes(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="OS_scRNA_gene_index"):
        scfm.ScfoundationTokenizer(tmp_path / "none.tsv")
    with pytest.raises(InvalidArgumentError):
        scfm.ScfoundationTokenizer([1, 2])
    with pytest.raises(GeneMappingError):
        tokens(small([[1, 2, 3]], genes=("X", "Y", "Z")))
