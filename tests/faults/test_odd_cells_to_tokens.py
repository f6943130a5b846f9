"""Fault rows 22 to 25, 36 to 43 and 45 to 47 from the file to the tokens and embeddings: what must not matter does
not, and what cannot be used is refused with the row, the gene or the remedy.

Every property is tried on files read natively and through h5py.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from counts_files import dense, poisson_matrix, write_arrays, write_matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import scfm
from scfm import _native
from scfm.errors import BadCellError, GeneMappingError, NotCountsError, ScfmWarning
from scfm.tokenize.dictionaries import GeneformerDictionaries

GENES = [f"ENSG{i:011d}" for i in range(1, 121)]
NUM_GENES = 40
EXAMPLES = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def vocab() -> GeneformerDictionaries:
    medians = {gene: 0.5 + (i * 37 % 101) / 10 for i, gene in enumerate(GENES)}
    return GeneformerDictionaries.from_vocabulary(GENES, medians, version="V2")


def tokens(data: Any, vocab: GeneformerDictionaries, **options: Any) -> dict[int, list[int]]:
    """Token ids by row of the file; warnings belong to other tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScfmWarning)
        packed = scfm.GeneformerTokenizer(vocab, **options)(data)
    return dict(zip(packed.cell_ids.tolist(), packed.to_lists(), strict=True))


@st.composite
def scattered(draw: st.DrawFn) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """A matrix with ascending columns, and the same with each row's entries in another order."""
    matrix = poisson_matrix(draw(st.integers(0, 25)), NUM_GENES, seed=draw(st.integers(0, 2**32 - 1)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shuffled = matrix.copy()
    for start, stop in pairwise(matrix.indptr):
        order = start + rng.permutation(stop - start)
        shuffled.indices[start:stop], shuffled.data[start:stop] = matrix.indices[order], matrix.data[order]
    return matrix, shuffled


@given(pair=scattered(), storage=st.sampled_from(["gzip", "contiguous"]))
@EXAMPLES
def test_row_22_order_within_a_row_does_not_matter(
    pair: tuple[sp.csr_matrix, sp.csr_matrix],
    storage: str,
    reader: str,
    vocab: GeneformerDictionaries,
    tmp_path: Path,
) -> None:
    found = [
        tokens(write_matrix(tmp_path / "r.h5ad", m, storage=storage, genes=GENES[:NUM_GENES]), vocab)
        for m in pair
    ]
    assert found[0] == found[1]


def split_entries(matrix: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
    """Some entries of 2 or more as two of the same column."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    halves = np.where((matrix.data >= 2) & (rng.random(matrix.nnz) < 0.3), 1, 0).astype(np.float32)
    chosen = halves > 0
    rows = np.concatenate([rows, rows[chosen]])
    columns = np.concatenate([matrix.indices, matrix.indices[chosen]])
    values = np.concatenate([matrix.data - halves, halves[chosen]])
    order = np.argsort(rows, kind="stable")
    pointers = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=matrix.shape[0]))])
    return sp.csr_matrix((values[order], columns[order], pointers), shape=matrix.shape)


def test_row_23_repeated_columns_are_summed_and_told_of(
    reader: str, vocab: GeneformerDictionaries, tmp_path: Path
) -> None:
    matrix = poisson_matrix(50, NUM_GENES)
    double = split_entries(matrix, np.random.default_rng(0))
    assert double.nnz > matrix.nnz
    repeated = sum(len(set(double.indices[a:b])) < b - a for a, b in pairwise(double.indptr))
    path = write_matrix(tmp_path / "double.h5ad", double, genes=GENES[:NUM_GENES])
    with pytest.warns(ScfmWarning, match=f"{repeated} of 50 cells list a gene column more than once"):
        np.testing.assert_array_equal(dense(scfm.read(path), 7), matrix.toarray())
    single = write_matrix(tmp_path / "single.h5ad", matrix, genes=GENES[:NUM_GENES])
    assert tokens(path, vocab) == tokens(single, vocab)
    # Strict: the warning is an error for who asks Python for that.
    with warnings.catch_warnings(), pytest.raises(ScfmWarning, match="more than once"):
        warnings.simplefilter("error", ScfmWarning)
        dense(scfm.read(path))


@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.05, 0.5, 1.0]))
@EXAMPLES
def test_row_24_stored_zeros_count_as_not_expressed(
    seed: int, share: float, reader: str, vocab: GeneformerDictionaries, tmp_path: Path
) -> None:
    """Counts are equal; with stored_zeros="drop" so are the tokens (by default zeros rank last, as the authors'
    own code has it)."""
    matrix = poisson_matrix(20, NUM_GENES, seed=seed)
    matrix.data[np.random.default_rng(seed).random(matrix.nnz) < share] = 0
    zeros = int((matrix.data == 0).sum())
    stored = write_matrix(tmp_path / "stored.h5ad", matrix, genes=GENES[:NUM_GENES])
    clean = matrix.copy()
    clean.eliminate_zeros()
    without = write_matrix(tmp_path / "without.h5ad", clean, genes=GENES[:NUM_GENES])
    source = scfm.read(stored)
    np.testing.assert_array_equal(dense(source, 7), dense(scfm.read(without), 7))
    assert source.report.num_zeros == zeros
    dropped = tokens(stored, vocab, stored_zeros="drop")
    assert dropped == tokens(without, vocab)
    for row, kept in tokens(stored, vocab).items():
        assert kept[: len(dropped.get(row, [2, 3])) - 1] == dropped.get(row, [2, 3])[:-1]


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["f4", "f8", "i4", "u2"]))
@EXAMPLES
def test_row_25_columns_equal_rows(seed: int, kind: str, tmp_path: Path) -> None:
    """CSC from a file: the same counts, in any selection."""
    matrix = poisson_matrix(23, NUM_GENES, seed=seed)
    turned = matrix.tocsc()
    path = write_arrays(
        tmp_path / "csc.h5ad",
        turned.indptr,
        turned.indices,
        turned.data.astype(kind),
        num_cells=23,
        num_genes=NUM_GENES,
        encoding="csc_matrix",
    )
    source = scfm.read(path)
    np.testing.assert_array_equal(dense(source, 5), matrix.toarray())
    rows = np.random.default_rng(seed).integers(0, 23, 30)
    np.testing.assert_array_equal(dense(source.select(rows), 7), matrix.toarray()[rows])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1])
def test_row_36_impossible_counts_by_policy(value: float, reader: str, tmp_path: Path) -> None:
    matrix = poisson_matrix(900, NUM_GENES)
    bad = {150: 2, 700: 0}  # between the rows that scfm.read samples, and in another block
    for row, offset in bad.items():
        while matrix.indptr[row + 1] - matrix.indptr[row] <= offset:
            row += 1
        matrix.data[matrix.indptr[row] + offset] = value
    rows = sorted(bad) if 150 % 10 and 700 % 10 else [151, 701]
    path = write_matrix(tmp_path / "bad.h5ad", matrix, chunk=500)
    gene = int(matrix.indices[np.flatnonzero(~(matrix.data >= 0) | np.isinf(matrix.data))[0]])
    with pytest.raises(BadCellError, match=rf"bad\.h5ad: X, row {rows[0]}: gene {gene} \('GENE{gene}'\)"):
        dense(scfm.read(path), 100)
    with pytest.raises(BadCellError, match=f"row {rows[1]}:"):
        dense(scfm.read(path).select(slice(800, 300, -1)), 100)
    expected = matrix.toarray()
    expected[rows] = 0
    source = scfm.read(path)
    with pytest.warns(ScfmWarning, match=rf"2 cells hold NaN.*rows {rows[0]}, {rows[1]}"):
        counts = np.zeros((900, NUM_GENES))
        for block in source.blocks(100, empty_bad_cells=True):
            cells = block.row_start + np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
            counts[cells, block.indices] = block.data
    np.testing.assert_array_equal(counts, expected)


TRANSFORMS = {
    "log1p": np.log1p,
    "cp10k": lambda x: x / np.maximum(x.sum(1, keepdims=True), 1) * 1e4,
    "log1p_cp10k": lambda x: np.log1p(x / np.maximum(x.sum(1, keepdims=True), 1) * 1e4),
    "z": lambda x: (x - x.mean(0)) / (x.std(0) + 1e-9),
    "sqrt": np.sqrt,
    "fraction": lambda x: x / x.max(),
    "log2_cpm": lambda x: np.log2(x / np.maximum(x.sum(1, keepdims=True), 1) * 1e6 + 1),
    "halves": lambda x: x / 2,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_row_37_what_is_not_counts(name: str, reader: str, tmp_path: Path) -> None:
    """Refused from X of a file; found in a layer beside it; taken when told to."""
    counts = poisson_matrix(300, NUM_GENES)
    values = TRANSFORMS[name](counts.toarray().astype(np.float64))
    path = write_matrix(tmp_path / "values.h5ad", sp.csr_matrix(values), chunk=100)
    with pytest.raises(NotCountsError, match=r"values\.h5ad.*assume_counts=True"):
        scfm.read(path)
    if name != "z":
        with pytest.warns(ScfmWarning, match="are not integers"):
            np.testing.assert_array_equal(dense(scfm.read(path, assume_counts=True)), values)
    with h5py.File(path, "r+") as file:
        file["layers/counts/indptr"] = counts.indptr
        file["layers/counts/indices"] = counts.indices
        file["layers/counts/data"] = counts.data
        layer = file["layers/counts"]
        layer.attrs["encoding-type"], layer.attrs["shape"] = "csr_matrix", list(counts.shape)
    source = scfm.read(path)
    assert source.counts_from == "layers['counts']"
    np.testing.assert_array_equal(dense(source), counts.toarray())


@pytest.mark.parametrize("kind", ["f4", "f8", "i4", "i8", "u8"])
def test_row_38_counts_beyond_2_24(kind: str, reader: str, tmp_path: Path) -> None:
    """They are warned about, read without loss, and their sums are exact in float64."""
    matrix = poisson_matrix(30, NUM_GENES).astype(kind)
    matrix.data[5] = 2**24 + (2 if kind == "f4" else 1)
    path = write_matrix(tmp_path / "large.h5ad", matrix)
    source = scfm.read(path)
    with pytest.warns(ScfmWarning, match=r"above 2\^24"):
        np.testing.assert_array_equal(dense(source, 7), matrix.toarray().astype(np.float64))
    block = next(scfm.read(path).blocks())
    sums = _native.row_sums(block.indptr, block.data)
    assert sums.dtype == np.float64
    np.testing.assert_array_equal(sums, matrix.toarray().astype(np.float64).sum(1))


MISNAMED = {
    "symbols": [f"SYMBOL{i}" for i in range(NUM_GENES)],
    "numbers": [str(i) for i in range(NUM_GENES)],
    "probes": [f"{200000 + i}_at" for i in range(NUM_GENES)],
    "mouse": [f"ENSMUSG{i:011d}" for i in range(NUM_GENES)],
}


@pytest.mark.parametrize("name", MISNAMED)
def test_row_39_no_gene_is_known(
    name: str, reader: str, vocab: GeneformerDictionaries, tmp_path: Path
) -> None:
    path = write_matrix(tmp_path / "names.h5ad", poisson_matrix(), genes=MISNAMED[name])
    with pytest.raises(GeneMappingError) as caught:
        tokens(path, vocab)
    assert sum(gene in str(caught.value) for gene in MISNAMED[name]) >= 3


def test_row_39_versions_are_stripped(reader: str, vocab: GeneformerDictionaries, tmp_path: Path) -> None:
    plain = write_matrix(tmp_path / "plain.h5ad", poisson_matrix(), genes=GENES[:NUM_GENES])
    dotted = [f"{gene}.{i % 20}" for i, gene in enumerate(GENES[:NUM_GENES])]
    path = write_matrix(tmp_path / "dotted.h5ad", poisson_matrix(), genes=dotted)
    assert tokens(path, vocab) == tokens(plain, vocab)


@given(seed=st.integers(0, 2**32 - 1))
@EXAMPLES
def test_row_40_columns_of_one_gene_can_be_summed(
    seed: int, reader: str, vocab: GeneformerDictionaries, tmp_path: Path
) -> None:
    """Several columns with one name, or versions of it: the tokens of the summed column, if so asked."""
    rng = np.random.default_rng(seed)
    matrix = poisson_matrix(15, NUM_GENES, seed=seed)
    owner = np.sort(rng.integers(0, 25, NUM_GENES))
    names = [GENES[i] + (f".{k % 3}" if k % 2 else "") for k, i in enumerate(owner)]
    path = write_matrix(tmp_path / "repeated.h5ad", matrix, genes=names)
    kept = np.unique(owner)
    summed = matrix.toarray().astype(np.float64) @ (owner[:, None] == kept)
    value = {(row, vocab.token[GENES[gene]]): count / vocab.median[GENES[gene]]
             for row in range(15) for gene, count in zip(kept, summed[row], strict=True) if count}  # fmt: skip
    found = tokens(path, vocab, duplicate_genes="sum")
    assert {(row, token) for row, cell in found.items() for token in cell[1:-1]} == set(value)
    for row, cell in found.items():
        # Equal values may change places: sums are rounded.
        ranked = [value[row, token] for token in cell[1:-1]]
        assert len(set(cell)) == len(cell)
        assert all(one >= other * (1 - 1e-5) for one, other in pairwise(ranked))


def test_row_41_repeated_names_of_cells(reader: str, vocab: GeneformerDictionaries, tmp_path: Path) -> None:
    """Cells are told apart by position."""
    matrix = poisson_matrix(60, NUM_GENES)
    path = write_matrix(tmp_path / "same.h5ad", matrix, genes=GENES[:NUM_GENES])
    expected = tokens(path, vocab)
    with h5py.File(path, "r+") as file:
        file["obs/_index"][...] = "AAACCTG-1"
    assert tokens(path, vocab) == expected
    source = scfm.read(path).select([31, 2, 31])
    assert source.obs.index.tolist() == ["AAACCTG-1"] * 3
    np.testing.assert_array_equal(dense(source), matrix.toarray()[[31, 2, 31]])


def test_row_42_cells_of_no_gene_one_gene_and_too_many(
    reader: str, vocab: GeneformerDictionaries, tmp_path: Path
) -> None:
    counts = np.zeros((4, NUM_GENES), np.float32)
    counts[1, 7] = 5
    counts[2] = np.arange(1, NUM_GENES + 1)
    path = write_matrix(tmp_path / "odd.h5ad", sp.csr_matrix(counts), genes=GENES[:NUM_GENES])
    found = tokens(path, vocab, max_tokens=12)
    assert sorted(found) == [1, 2]
    assert found[1] == [2, vocab.token[GENES[7]], 3]
    whole = tokens(path, vocab)[2]
    assert len(whole) == NUM_GENES + 2
    assert found[2] == [*whole[:11], 3]


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 0), (0, 0)], ids=str)
def test_row_43_nothing_to_read(shape: tuple[int, int], reader: str, tmp_path: Path) -> None:
    matrix = sp.csr_matrix(np.ones(shape, np.float32))
    for storage in ("gzip", "contiguous"):
        source = scfm.read(write_matrix(tmp_path / "small.h5ad", matrix, storage=storage))
        assert dense(source).shape == shape
        assert len(source.obs) == shape[0] and len(source.genes) == shape[1]
        assert list(source.select([]).blocks()) == []


def test_row_43_the_last_block_is_partial(reader: str, tmp_path: Path) -> None:
    source = scfm.read(write_matrix(tmp_path / "small.h5ad", poisson_matrix(23, 5)))
    for block_size in (1, 5, 22, 23, 24):
        sizes = [block.num_cells for block in source.blocks(block_size)]
        assert sum(sizes) == 23 and sizes[:-1] == [block_size] * (len(sizes) - 1)


@given(
    rows=st.lists(st.permutations(range(12)), min_size=1, max_size=5), version=st.sampled_from(["V1", "V2"])
)
@EXAMPLES
def test_row_45_ties_go_by_column(rows: list[list[int]], version: str, reader: str, tmp_path: Path) -> None:
    """Equal values all: columns ascend, however the file orders them, at any number of threads."""
    even = GeneformerDictionaries.from_vocabulary(GENES, dict.fromkeys(GENES, 2.0), version=version)
    pointers = np.arange(len(rows) + 1) * 12
    columns = np.array(rows, dtype=np.int32).ravel()
    path = write_arrays(
        tmp_path / "ties.h5ad",
        pointers,
        columns,
        np.full(len(columns), 3, np.float32),
        num_cells=len(rows),
        num_genes=NUM_GENES,
        genes=GENES[:NUM_GENES],
    )
    before = _native.get_num_threads()
    try:
        for threads in (1, 3):
            _native.set_num_threads(threads)
            for cell in tokens(path, even).values():
                assert [t for t in cell if t > 3 or version == "V1"] == [
                    even.token[gene] for gene in GENES[:12]
                ]
    finally:
        _native.set_num_threads(before)


def test_row_46_a_gene_without_a_median_is_left_out_and_told_of(reader: str, tmp_path: Path) -> None:
    from dataclasses import replace

    whole = GeneformerDictionaries.from_vocabulary(GENES, dict.fromkeys(GENES, 1.0), version="V2")
    medians = {gene: median for gene, median in whole.median.items() if gene != GENES[3]}
    path = write_matrix(tmp_path / "m.h5ad", poisson_matrix(), genes=GENES[:NUM_GENES])
    lacking = replace(whole, median=medians)
    with pytest.warns(ScfmWarning, match="1 columns map to genes without a median"):
        packed = scfm.GeneformerTokenizer(lacking)(path)
    assert not (packed.token_ids == whole.token[GENES[3]]).any()
    for wrong in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(scfm.ScfmError, match=GENES[3]):
            GeneformerDictionaries.from_vocabulary(
                GENES, {**dict.fromkeys(GENES, 1.0), GENES[3]: wrong}, version="V2"
            )


# --- row 47: what must not change an embedding ---


def test_row_47_invariance_of_ids_and_embeddings(reader: str, tiny_model: Any, tmp_path: Path) -> None:
    """Order of the rows, size of blocks and batches, chunks and filters of the file, threads: ids are equal to the
    bit, and so are embeddings, but for the threads (1e-5)."""
    matrix = poisson_matrix(40, 120)
    matrix[::10, 0] = 1  # no cell without a gene
    matrix = sp.csr_matrix(matrix)
    path = write_matrix(tmp_path / "cells.h5ad", matrix, genes=GENES)
    ids = tokens(path, tiny_model.tokenizer.vocab, max_tokens=96)
    expected = tiny_model.embed(path)
    assert np.isfinite(expected).all()
    order = np.random.default_rng(0).permutation(40)
    moved = write_matrix(tmp_path / "moved.h5ad", matrix[order], genes=GENES, storage="lzf", chunk=97)
    again = tokens(moved, tiny_model.tokenizer.vocab, max_tokens=96)
    assert [again[i] for i in range(40)] == [ids[int(row)] for row in order]
    np.testing.assert_array_equal(tiny_model.embed(moved), expected[order])
    np.testing.assert_array_equal(tiny_model.embed(scfm.read(path).select(order)), expected[order])
    np.testing.assert_array_equal(tiny_model.embed(anndata.read_h5ad(path)), expected)
    for budget in (1, 130, 1000):
        np.testing.assert_array_equal(tiny_model.embed(path, token_budget=budget), expected)
    for block_size in (1, 7, 40):
        packs = list(tiny_model.tokenizer.packs(scfm.read(path), block_size=block_size))
        assert [cell for pack in packs for cell in pack.to_lists()] == [ids[i] for i in range(40)]
    before = _native.get_num_threads()
    try:
        for threads in (1, 3):
            _native.set_num_threads(threads)
            assert tokens(path, tiny_model.tokenizer.vocab, max_tokens=96) == ids
            np.testing.assert_allclose(tiny_model.embed(path), expected, atol=1e-5)
    finally:
        _native.set_num_threads(before)
