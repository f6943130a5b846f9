"""A list of sources is its parts end to end, whatever is asked of it and in whatever order."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import scfm
from scfm.data import windows as windows_module
from scfm.data.source_list import SourceList
from scfm.errors import BadCellError, InvalidArgumentError


def cells_of(num_cells: int, num_genes: int, *, seed: int = 0, dense: bool = False) -> ad.AnnData:
    generator = np.random.default_rng([seed, num_cells, num_genes])
    counts = generator.poisson(0.8, size=(num_cells, num_genes)).astype(np.float32)
    adata = ad.AnnData(counts if dense else sp.csr_matrix(counts))
    adata.obs_names = [f"s{seed}c{i}" for i in range(num_cells)]
    adata.var_names = [f"s{seed}g{i}" for i in range(num_genes)]
    return adata


def three() -> list[ad.AnnData]:
    return [cells_of(11, 4), cells_of(6, 7, seed=1, dense=True), cells_of(9, 3, seed=2)]


def list_of(adatas: list[ad.AnnData]) -> SourceList:
    return SourceList([scfm.read(adata) for adata in adatas])


def dense_rows(block) -> list[list[float]]:
    matrix = sp.csr_matrix((block.data, block.indices, block.indptr), (block.num_cells, block.num_genes))
    return matrix.toarray().tolist()


def counts_by_cell(source, block_size: int) -> list[list[float]]:
    """Counts of every cell, gathered through ``blocks``; block positions are checked on the way."""
    found: list[list[float]] = []
    for block in source.blocks(block_size):
        assert block.row_start == len(found) and 0 < block.num_cells <= block_size
        assert block.num_genes == source.parts[block.part].num_genes
        found += dense_rows(block)
    return found


def counts_by_window(source, block_size: int) -> list[list[float]]:
    found: list[list[float]] = []
    for window in source.windows(block_size):
        cells: dict[int, list[float]] = {}
        for piece in window.pieces:
            np.testing.assert_array_equal(piece.block.rows, source.parts[piece.part].rows[piece.cells])
            cells |= dict(zip(piece.slots.tolist(), dense_rows(piece.block), strict=True))
        assert window.cells.tolist() == list(range(len(found), len(found) + len(cells)))
        found += [cells[slot] for slot in range(len(cells))]
        assert window.cursor == len(found)
    return found


def expected_counts(adatas: list[ad.AnnData]) -> list[list[float]]:
    rows: list[list[float]] = []
    for adata in adatas:
        rows += (adata.X.toarray() if sp.issparse(adata.X) else adata.X).tolist()
    return rows


def test_blocks_are_the_parts_blocks_end_to_end() -> None:
    adatas = three()
    source = list_of(adatas)
    assert len(source) == source.num_cells == 26
    blocks = list(source.blocks(4))
    assert [block.part for block in blocks] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [block.row_start for block in blocks] == [0, 4, 8, 11, 15, 17, 21, 25]
    assert counts_by_cell(source, 4) == counts_by_window(source, 4) == expected_counts(adatas)
    assert source.rows.tolist() == [*range(11), *range(6), *range(9)]
    assert source.obs.index.tolist() == [name for adata in adatas for name in adata.obs_names]
    assert "26 cells" in repr(source) and "3 parts" in repr(source)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    block_size=st.integers(1, 9),
    data=st.data(),
)
def test_any_selection_of_a_selection_gives_those_cells_in_that_order(lengths, block_size, data) -> None:
    adatas = [cells_of(length, 2 + i, seed=i) for i, length in enumerate(lengths)]
    source, expected = list_of(adatas), expected_counts(adatas)
    names = source.obs.index.tolist()
    rows = source.rows.tolist()
    for _ in range(2):
        if len(expected):
            chosen = data.draw(
                st.lists(st.integers(-len(expected), len(expected) - 1), min_size=0, max_size=20)
            )
        else:
            chosen = []
        source = source.select(chosen)
        expected = [expected[i] for i in chosen]
        names, rows = [names[i] for i in chosen], [rows[i] for i in chosen]
        assert len(source) == len(expected)
        assert counts_by_cell(source, block_size) == counts_by_window(source, block_size) == expected
        assert source.obs.index.tolist() == names and source.rows.tolist() == rows
        assert source.report.num_cells == len(expected)


def test_slices_and_masks_select_as_positions_do() -> None:
    adatas = three()
    source, expected = list_of(adatas), expected_counts(adatas)
    assert counts_by_cell(source.select(slice(20, 3, -3)), 5) == expected[20:3:-3]
    mask = np.arange(26) % 3 == 0
    assert counts_by_cell(source.select(mask), 5) == expected[::3]
    with pytest.raises(InvalidArgumentError, match="outside the source's 26 cells"):
        source.select([26])
    with pytest.raises(InvalidArgumentError, match="26 cells"):
        source.select(mask[:-1])


def test_nested_lists_are_taken_apart_in_their_order() -> None:
    adatas = three()
    inner = list_of(adatas[:2]).select([12, 0, 16, 3])
    source = SourceList([inner, scfm.read(adatas[2]), inner])
    expected = expected_counts(adatas)
    picked = [expected[i] for i in (12, 0, 16, 3)]
    assert len(source.parts) == 5
    assert counts_by_cell(source, 3) == [*picked, *expected[17:], *picked]
    joined = source.place_of(np.arange(len(source)))
    np.testing.assert_array_equal(np.sort(joined), np.arange(len(source)))
    assert joined[:4].tolist() == [1, 3, 0, 2]


def test_the_same_source_may_stand_twice() -> None:
    adata = cells_of(5, 3)
    once = scfm.read(adata)
    source = SourceList([once, once])
    assert counts_by_cell(source, 2) == expected_counts([adata, adata])
    assert source.report.num_cells == 10
    assert source.report.num_values == 2 * adata.X.nnz


def test_nothing_to_list_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="is empty"):
        SourceList([])
    with pytest.raises(InvalidArgumentError, match=r"item 1 is a str.*scfm\.read"):
        SourceList([scfm.read(cells_of(2, 2)), "b.h5ad"])  # type: ignore[list-item]
    for size in (0, -1, True, 2.0):
        with pytest.raises(InvalidArgumentError, match="block_size"):
            list(list_of(three()).blocks(size))


def test_many_parts_are_read_without_a_stream_each(monkeypatch) -> None:
    adatas = [cells_of(3, 2 + i % 3, seed=i) for i in range(6)]
    source = list_of(adatas).select(np.random.default_rng(0).permutation(18))
    expected = counts_by_cell(source, 7)
    monkeypatch.setattr(windows_module, "_MAX_STREAMS", 2)
    assert counts_by_cell(source, 7) == expected
    assert source.report.num_cells == 18


def test_genes_are_had_only_if_they_are_the_same() -> None:
    same = [cells_of(3, 4), cells_of(2, 4, seed=1)]
    same[1].var_names = same[0].var_names
    assert list_of(same).genes.index.tolist() == same[0].var_names.tolist()
    assert list_of(same).num_genes == 4
    with pytest.raises(InvalidArgumentError, match=r"parts\[i\]\.genes"):
        _ = list_of(three()).genes


def test_obs_of_different_columns() -> None:
    a, b, c = three()
    a.obs["kind"] = pd.Categorical(["x", "y"] * 5 + ["x"], categories=["y", "x"])
    b.obs["kind"] = pd.Categorical(["z", "x", "z", "x", "z", None])
    c.obs["kind"] = pd.Categorical(["y"] * 9)
    a.obs["depth"] = np.arange(11, dtype=np.int32)
    c.obs["depth"] = np.arange(9, dtype=np.int64) * 10
    b.obs["passed"] = True
    source = list_of([a, b, c])
    assert source.obs_column_names == ["kind", "depth", "passed"]
    obs = source.obs
    assert obs.columns.tolist() == source.obs_column_names
    assert obs.kind.cat.categories.tolist() == ["y", "x", "z"] and not obs.kind.cat.ordered
    joined = pd.concat([frame.obs.astype(object) for frame in (a, b, c)])
    order = np.random.default_rng(0).permutation(26)
    for given_source, expected in ((source, joined), (source.select(order), joined.iloc[order])):
        pd.testing.assert_frame_equal(
            given_source.obs.astype(object), expected, check_dtype=False, check_column_type=False
        )
        for name in expected.columns:
            column = given_source.obs_column(name)
            assert column.index.tolist() == list(range(26)) and column.dtype == obs[name].dtype
            assert column.astype(object).where(column.notna(), None).tolist() == (
                expected[name].where(expected[name].notna(), None).tolist()
            )
    assert obs.depth.dtype == np.float64 and int(obs.depth.isna().sum()) == 6
    assert source.obs_column("absent") is None
    plain = list_of(three())
    assert plain.obs.shape == (26, 0) and plain.obs_column_names == []


def test_ordered_categories_stay_ordered_where_all_agree() -> None:
    a, b, _ = three()
    levels = pd.CategoricalDtype(["low", "high"], ordered=True)
    a.obs["level"] = pd.Series(["low"] * 11, index=a.obs_names, dtype=levels)
    b.obs["level"] = pd.Series(["high"] * 6, index=b.obs_names, dtype=levels)
    assert list_of([a, b]).obs_column("level").dtype == levels
    b.obs["level"] = b.obs["level"].cat.reorder_categories(["high", "low"])
    assert not list_of([a, b]).obs_column("level").dtype.ordered


def test_errors_and_warnings_name_the_part() -> None:
    adatas = three()
    adatas[2].X[4, 1] = np.nan
    source = list_of(adatas)
    chosen = np.random.default_rng(3).permutation(26)
    for one in (source, source.select(chosen)):
        with pytest.raises(BadCellError, match="row 4"):
            list(one.blocks(5))
        with pytest.warns(scfm.ScfmWarning, match=r"1 cells hold NaN.*rows 4"):
            blocks = list(one.blocks(5, empty_bad_cells=True))
        assert sum(block.num_cells for block in blocks) == 26
        assert one.report.num_bad_cells == 1


def test_files_are_read_alike(tmp_path) -> None:
    adatas = three()
    paths = [tmp_path / f"{i}.h5ad" for i in range(3)]
    for adata, path in zip(adatas, paths, strict=True):
        adata.write_h5ad(path, compression="gzip")
    source = SourceList([scfm.read(path) for path in paths])
    chosen = np.random.default_rng(0).integers(0, 26, size=40)
    expected = expected_counts(adatas)
    assert counts_by_cell(source.select(chosen), 7) == [expected[i] for i in chosen]
    assert [len(part) for part in source.parts] == [11, 6, 9]
    assert "0.h5ad" in source.name and source.counts_from == "X" and not source.dense


def test_messages_name_the_row_and_the_file(tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        path = tmp_path / f"{number}.h5ad"
        ad.AnnData(sp.csr_matrix(np.ones((4, 3), dtype=np.float32))).write_h5ad(path)
        paths.append(str(path))
    source = scfm.read(paths).select([7, 0, 5])
    assert source.row_labels(np.array([0, 1, 2])) == [
        f"3 of {paths[1]}",
        f"0 of {paths[0]}",
        f"1 of {paths[1]}",
    ]
    assert scfm.read(paths[0]).select([2, 1]).row_labels(np.array([1])) == ["1"]


@pytest.mark.parametrize(("values", "cells"), [(1, 16_384), (1_000, 2_097), (100_000, 256)])
def test_comfortable_blocks_hold_about_as_many_values(values: int, cells: int) -> None:
    matrix = sp.csr_matrix(np.ones((2, values), dtype=np.float32))
    assert scfm.read(ad.AnnData(matrix)).comfortable_block_size == cells
