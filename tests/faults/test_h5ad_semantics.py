"""Fault rows 22-24, 27, 36-38, 40-43: files of sound structure whose content is odd or wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.errors import BadCellError, FormatError, NotCountsError, ScfmWarning

RNG = np.random.default_rng(11)


def dense(source: CellSource, block_size: int = 4096) -> np.ndarray:
    counts = np.zeros((len(source), source.num_genes))
    for block in source.blocks(block_size):
        rows = block.row_start + np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
        counts[rows, block.indices] = block.data
    return counts


def csr(counts: np.ndarray) -> sparse.csr_matrix:
    return sparse.csr_matrix(counts.astype(np.float32))


def poisson(num_cells: int = 30, num_genes: int = 25) -> np.ndarray:
    return np.random.default_rng(3).poisson(1.0, (num_cells, num_genes)).astype(np.float64)


# --- stored entries: unsorted, duplicate, zero ---


@st.composite
def loose_matrices(draw: st.DrawFn) -> sparse.csr_matrix:
    """CSR with rows in any order, repeated columns and stored zeros."""
    num_cells, num_genes = draw(st.integers(0, 6)), draw(st.integers(1, 7))
    rows = draw(
        st.lists(
            st.lists(st.tuples(st.integers(0, num_genes - 1), st.integers(0, 9)), max_size=2 * num_genes),
            min_size=num_cells,
            max_size=num_cells,
        )
    )
    indptr = np.cumsum([0, *(len(row) for row in rows)])
    columns = np.array([column for row in rows for column, _ in row], dtype=np.int32)
    values = np.array([value for row in rows for _, value in row], dtype=np.float32)
    return sparse.csr_matrix((values, columns, indptr), shape=(num_cells, num_genes))


@pytest.mark.filterwarnings("ignore::scfm.errors.ScfmWarning")
@given(matrix=loose_matrices(), block_size=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_unsorted_duplicate_and_zero_entries(matrix: sparse.csr_matrix, block_size: int) -> None:
    """The counts are scipy's sum; rows come ascending without repeats; stored zeros stay where they are."""
    before = matrix.copy()
    expected = matrix.toarray()
    stored = [set(matrix.indices[a:b]) for a, b in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)]
    source = read(anndata.AnnData(matrix))
    np.testing.assert_array_equal(dense(source, block_size), expected)
    for block in source.blocks(block_size):
        for cell in range(block.num_cells):
            columns = block.indices[block.indptr[cell] : block.indptr[cell + 1]].tolist()
            assert columns == sorted(stored[block.rows[cell]])
    assert np.array_equal(matrix.indices, before.indices)
    assert np.array_equal(matrix.data, before.data)


def test_duplicates_are_summed_beyond_the_type_and_warned_about_once() -> None:
    matrix = sparse.csr_matrix(
        (np.array([200, 100, 7], np.uint8), np.array([1, 1, 0], np.int32), np.array([0, 2, 3])), shape=(2, 2)
    )
    source = read(anndata.AnnData(matrix))
    with pytest.warns(ScfmWarning, match="1 of 2 cells list a gene column more than once") as caught:
        assert dense(source).tolist() == [[0, 300], [7, 0]]
    assert len(caught) == 1
    dense(source)  # a second warning would be an error


def test_report_counts_zeros() -> None:
    matrix = csr(poisson())
    matrix.data[:4] = 0
    source = read(anndata.AnnData(matrix))
    dense(source)
    assert source.report.num_zeros == 4
    assert source.report.num_cells == 30
    assert source.report.num_values == matrix.nnz


# --- impossible and doubtful values ---


@pytest.mark.parametrize(("value", "word"), [(np.nan, "finite"), (np.inf, "finite"), (-1, "negative")])
@pytest.mark.parametrize("layout", [csr, lambda x: csr(x).tocsc(), lambda x: x], ids=["csr", "csc", "dense"])
def test_impossible_value_names_cell_and_gene(
    value: float, word: str, layout: Callable[[np.ndarray], object]
) -> None:
    counts = poisson(400)
    counts[311, 4] = value
    adata = anndata.AnnData(layout(counts), var=pd.DataFrame(index=[f"G{i}" for i in range(25)]))
    with pytest.raises(BadCellError, match=f"row 311: gene 4 .*G4.*{word}"):
        dense(read(adata))
    with pytest.raises(BadCellError, match="row 311"):
        dense(read(adata).select(slice(300, 320)))


def test_noninteger_beyond_the_sample_is_found_in_its_block() -> None:
    counts = poisson(1000)
    counts[200, 3] = 0.5
    source = read(anndata.AnnData(csr(counts)))
    assert source.is_counts
    with pytest.raises(NotCountsError, match=r"row 200: gene 3 .*0\.5"):
        dense(source, 128)
    source = read(anndata.AnnData(csr(counts)), assume_counts=True)
    with pytest.warns(ScfmWarning, match="1 of .* values are not integers"):
        np.testing.assert_array_equal(dense(source), counts)


def test_counts_beyond_float32_integers_are_warned_about() -> None:
    counts = poisson()
    counts[3, 3] = 2**24 + 2
    source = read(anndata.AnnData(csr(counts)))
    with pytest.warns(ScfmWarning, match="2\\^24"):
        np.testing.assert_array_equal(dense(source), counts)
    counts[3, 3] = 2**24
    dense(read(anndata.AnnData(csr(counts))))


# --- names and sizes ---


@pytest.mark.filterwarnings("ignore:.*names are not unique")
def test_duplicated_names_are_allowed() -> None:
    counts = poisson()
    adata = anndata.AnnData(
        csr(counts), obs=pd.DataFrame(index=["same"] * 30), var=pd.DataFrame(index=["gene"] * 25)
    )
    source = read(adata)
    np.testing.assert_array_equal(dense(source.select([4, 2])), counts[[4, 2]])
    assert source.select([4, 2]).rows.tolist() == [4, 2]


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_no_cells_or_no_genes(shape: tuple[int, int], kind: str, tmp_path: Path) -> None:
    values = np.ones(shape, np.float32)
    matrix = values if kind == "dense" else csr(values).asformat(kind)
    adata = anndata.AnnData(matrix)
    adata.write_h5ad(tmp_path / "small.h5ad")
    for source in (read(adata), read(tmp_path / "small.h5ad")):
        assert (len(source), source.num_genes) == shape
        assert dense(source).shape == shape
        assert len(list(source.blocks())) == (shape[0] > 0)
        assert len(source.select([])) == 0
        assert list(source.select([]).blocks()) == []


def test_empty_cells_keep_their_place() -> None:
    counts = poisson()
    counts[[0, 7, 29]] = 0
    np.testing.assert_array_equal(dense(read(anndata.AnnData(csr(counts))), 4), counts)


# --- in memory, malformed ---


@pytest.mark.parametrize("kind", ["csr", "csc"])
@pytest.mark.parametrize("index", [-1, 30, 10**6])
def test_malformed_anndata_in_memory(kind: str, index: int) -> None:
    """What anndata loads without a word, and scipy crashes on."""
    adata = anndata.AnnData(csr(poisson(30, 30)).asformat(kind))
    adata.X.indices[40] = index
    with pytest.raises(FormatError, match=str(index)):
        dense(read(adata))


def test_malformed_pointers_in_memory() -> None:
    adata = anndata.AnnData(csr(poisson()))
    adata.X.indptr[5] = adata.X.indptr[4] - 1
    with pytest.raises(FormatError, match="row 4"):
        read(adata)
