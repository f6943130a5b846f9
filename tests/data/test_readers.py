"""Rows 25, 26, 29: whatever the layout, the same counts, tables and selections as anndata gives."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import scfm
from scfm.data import h5_matrix, matrix
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.errors import FormatError, InvalidArgumentError, MissingFileError, ResourceError, UnsafeFileError

NUM_CELLS, NUM_GENES = 57, 23
COUNTS = np.random.default_rng(5).poisson(0.7, (NUM_CELLS, NUM_GENES))
COUNTS[8] = 0


def make(values: object) -> anndata.AnnData:
    obs = pd.DataFrame(
        {"kind": pd.Categorical(np.array(["a", "b", None], dtype=object)[np.arange(NUM_CELLS) % 3])},
        index=[f"c{i}" for i in range(NUM_CELLS)],
    )
    var = pd.DataFrame(
        {"symbol": [f"s{i}" for i in range(NUM_GENES)]}, index=[f"g{i}" for i in range(NUM_GENES)]
    )
    return anndata.AnnData(values, obs=obs, var=var)


def dense(source: CellSource, block_size: int = 4096) -> np.ndarray:
    counts = np.zeros((len(source), source.num_genes))
    seen = 0
    for block in source.blocks(block_size):
        assert block.row_start == seen
        assert block.num_cells == len(block.rows) <= block_size
        assert block.indptr.dtype == np.int64
        assert block.indptr[0] == 0
        assert block.indices.dtype in (np.int32, np.int64)
        assert block.num_genes == source.num_genes
        rows = seen + np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
        counts[rows, block.indices] = block.data
        seen += block.num_cells
    assert seen == len(source)
    return counts


LAYOUTS: dict[str, Callable[[], object]] = {
    "csr": lambda: sparse.csr_matrix(COUNTS.astype(np.float32)),
    "csr_array": lambda: sparse.csr_array(COUNTS.astype(np.float64)),
    "csr_int64": lambda: sparse.csr_matrix(COUNTS),
    "csc": lambda: sparse.csc_matrix(COUNTS.astype(np.float32)),
    "csc_array": lambda: sparse.csc_array(COUNTS.astype(np.int32)),
    "dense_c": lambda: COUNTS.astype(np.float32),
    "dense_f": lambda: np.asfortranarray(COUNTS.astype(np.float64)),
    "dense_int": lambda: COUNTS.astype(np.int16),
    "dense_float16": lambda: COUNTS.astype(np.float16),
    "dense_big_endian": lambda: COUNTS.astype(">f4"),
}


def stored(layout: str, way: str, folder: Path) -> object:
    adata = make(LAYOUTS[layout]())
    if way == "memory":
        return adata
    path = folder / f"{layout}.h5ad"
    adata.write_h5ad(path, compression="gzip" if way == "gzip" else None)
    return anndata.read_h5ad(path, backed="r") if way == "backed" else path


@pytest.mark.parametrize("way", ["memory", "file", "gzip", "backed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, way: str, tmp_path: Path) -> None:
    source = read(stored(layout, way, tmp_path))
    np.testing.assert_array_equal(dense(source, 10), COUNTS)
    order = np.random.default_rng(2).integers(0, NUM_CELLS, 40)
    np.testing.assert_array_equal(dense(source.select(order), 7), COUNTS[order])
    assert source.dense == layout.startswith("dense")
    assert source.counts_from == "X"
    assert source.is_counts
    assert source.genes.symbol.tolist() == [f"s{i}" for i in range(NUM_GENES)]
    assert source.obs.index.tolist() == [f"c{i}" for i in range(NUM_CELLS)]
    assert source.select([3, 0]).obs.index.tolist() == ["c3", "c0"]


def test_booleans() -> None:
    for values in (COUNTS > 0, sparse.csr_matrix(COUNTS > 0)):
        np.testing.assert_array_equal(dense(read(make(values))), COUNTS > 0)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_matrix_subclass() -> None:
    adata = make(COUNTS.astype(np.float32))
    adata._X = np.asmatrix(COUNTS)
    assert isinstance(adata.X, np.matrix)
    np.testing.assert_array_equal(dense(read(adata)), COUNTS)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense_c", "dense_f"])
@pytest.mark.parametrize("backed", [False, True])
def test_views(layout: str, backed: bool, tmp_path: Path) -> None:
    adata = stored(layout, "backed" if backed else "memory", tmp_path)
    assert isinstance(adata, anndata.AnnData)
    rows, columns = [5, 3, 40], slice(2, 11)
    view = adata[rows]
    assert view.is_view
    np.testing.assert_array_equal(dense(read(view)), COUNTS[rows])
    assert read(view).obs.index.tolist() == ["c5", "c3", "c40"]
    assert read(view).rows.tolist() == [0, 1, 2]
    both = adata[10:20, columns]
    np.testing.assert_array_equal(dense(read(both)), COUNTS[10:20, columns])
    assert read(both).genes.index[0] == "g2"


def test_raw_has_genes_of_its_own(tmp_path: Path) -> None:
    adata = make(sparse.csr_matrix(COUNTS.astype(np.float32)))
    adata.raw = adata.copy()
    scaled = adata[:, 4:9].copy()
    scaled.X = scaled.X.toarray() - 0.5
    scaled.write_h5ad(tmp_path / "raw.h5ad")
    backed = anndata.read_h5ad(tmp_path / "raw.h5ad", backed="r")
    for counted in (scaled, tmp_path / "raw.h5ad", backed, scaled[:50].copy()):
        source = read(counted)
        assert source.counts_from == "raw.X"
        assert source.genes.index.tolist() == [f"g{i}" for i in range(NUM_GENES)]
        np.testing.assert_array_equal(dense(source), COUNTS[: len(source)])
    view = read(scaled[[3, 1]])
    np.testing.assert_array_equal(dense(view), COUNTS[[3, 1]])


def write_loom(path: Path, values: np.ndarray, **layers: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=values.T, chunks=(8, 8), compression="gzip")
        file.create_group("layers")
        for name, layer in layers.items():
            file["layers"][name] = layer.T
        file["row_attrs/Gene"] = np.array([f"g{i}".encode() for i in range(values.shape[1])])
        file["row_attrs/loadings"] = np.zeros((values.shape[1], 2))
        names = [f"c{i}" for i in range(len(values))]
        file.create_dataset("col_attrs/CellID", data=names, dtype=h5py.string_dtype())
        file["col_attrs/n_counts"] = values.sum(1)


def test_loom(tmp_path: Path) -> None:
    path = tmp_path / "cells.loom"
    write_loom(path, np.log1p(COUNTS / 3), counts=COUNTS)
    before = path.read_bytes()
    source = read(path)
    assert source.counts_from == "layers['counts']"
    assert source.dense
    np.testing.assert_array_equal(dense(source, 10), COUNTS)
    order = [50, 3, 3, 51, 20]
    np.testing.assert_array_equal(dense(source.select(order), 2), COUNTS[order])
    assert source.genes.index[:2].tolist() == ["g0", "g1"]
    assert source.genes.columns.tolist() == ["Gene"]
    np.testing.assert_allclose(source.select([7]).obs.n_counts, np.log1p(COUNTS / 3)[7].sum())
    assert source.obs.index[0] == "c0"
    assert path.read_bytes() == before


def test_loom_attribute_of_wrong_length(tmp_path: Path) -> None:
    path = tmp_path / "cells.loom"
    write_loom(path, COUNTS)
    with h5py.File(path, "r+") as file:
        del file["col_attrs/n_counts"]
        file["col_attrs/n_counts"] = np.zeros(3)
    with pytest.raises(FormatError, match="col_attrs/n_counts: has 3 entries, expected 57"):
        _ = read(path).obs


# --- selections ---


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_selection(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Selections of selections give numpy's rows, from memory and from a chunked file, and keep their origin."""
    folder = tmp_path_factory.getbasetemp()
    layout = data.draw(st.sampled_from(["csr", "dense_c", "csc"]))
    path = folder / f"selection_{layout}.h5ad"
    if not path.exists():
        make(LAYOUTS[layout]()).write_h5ad(path, compression="gzip")
    one = st.integers(-NUM_CELLS, NUM_CELLS - 1)
    first = data.draw(
        st.one_of(
            st.slices(NUM_CELLS),
            st.lists(one, max_size=80),
            st.lists(st.booleans(), min_size=NUM_CELLS, max_size=NUM_CELLS).map(np.array),
        )
    )
    expected = np.arange(NUM_CELLS)[np.array(first, dtype=int) if isinstance(first, list) else first]
    source = read(path).select(first)
    if len(expected):
        second = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=20))
        source, expected = source.select(second), expected[np.array(second, dtype=int)]
    assert source.rows.tolist() == expected.tolist()
    np.testing.assert_array_equal(dense(source, data.draw(st.integers(1, 30))), COUNTS[expected])
    assert source.obs.index.tolist() == [f"c{i}" for i in expected]


@pytest.mark.parametrize(
    "rows", [[57], [-58], np.ones(3, bool), [0.5], [[1, 2]], ["c1"], np.array([2**40])], ids=str
)
def test_bad_selection(rows: object) -> None:
    with pytest.raises(InvalidArgumentError, match="select"):
        read(make(LAYOUTS["csr"]())).select(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [0, -1, 2.5, "all", True, None])
def test_bad_block_size(block_size: object) -> None:
    with pytest.raises(InvalidArgumentError, match="block_size"):
        read(make(LAYOUTS["csr"]())).blocks(block_size)  # type: ignore[arg-type]


def test_small_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The limits that cut large reads into stretches and pieces change nothing."""
    monkeypatch.setattr(matrix, "DENSE_PIECE_BYTES", 300)
    monkeypatch.setattr(h5_matrix, "DENSE_PIECE_BYTES", 300)
    monkeypatch.setattr(h5_matrix, "_MAX_STRETCH", 40)
    for layout in ("csr", "dense_c"):
        source = read(stored(layout, "gzip", tmp_path))
        np.testing.assert_array_equal(dense(source), COUNTS)
        order = np.random.default_rng(4).permutation(NUM_CELLS)[:31]
        np.testing.assert_array_equal(dense(source.select(order)), COUNTS[order])


def test_sources_can_be_pickled(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(read(stored("csr", "gzip", tmp_path)).select([4, 2])))
    np.testing.assert_array_equal(dense(source), COUNTS[[4, 2]])


def test_columns_too_large_for_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = stored("csc", "file", tmp_path)
    for module in ("scfm.data.available_memory",):
        monkeypatch.setattr(f"{module}.available_memory", lambda: 1500)
    with pytest.raises(ResourceError, match="CSC"):
        dense(read(path))
    with pytest.raises(ResourceError, match="CSC"):
        dense(read(make(LAYOUTS["csc"]())))


# --- the front door ---


def test_read_is_public_and_idempotent() -> None:
    source = scfm.read(make(LAYOUTS["csr"]()))
    assert isinstance(source, scfm.CellSource)
    assert scfm.read(source) is source
    with pytest.raises(InvalidArgumentError, match="CellSource"):
        scfm.read(source, layer="X")


@pytest.mark.parametrize("given", [None, 3, [1, 2], np.zeros((2, 2)), pd.DataFrame()])
def test_unreadable_things(given: object) -> None:
    with pytest.raises(InvalidArgumentError, match="AnnData"):
        read(given)


@pytest.mark.parametrize("name", ["counts.csv", "noending", "atlas.h5ad.gz"])
def test_unreadable_endings(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"\.h5ad"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["atlas.zarr", "matrix.mtx", "filtered.h5", "atlas.h5ad", "atlas.loom"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=name):
        read(tmp_path / name)


def test_other_matrix_types_are_named() -> None:
    adata = make(LAYOUTS["csr"]())
    adata.X = sparse.csr_matrix(adata.X)
    adata._X = adata.X.tocoo()
    with pytest.raises(InvalidArgumentError, match="coo"):
        read(adata)


@pytest.mark.data
@pytest.mark.parametrize("name", ["pbmc3k_labeled.h5ad", "perturb_norman_mcfaline_500hvg.h5ad"])
def test_real_files(name: str, data_file: Callable[[str], Path]) -> None:
    path = data_file(name)
    adata = anndata.read_h5ad(path)
    source = read(path)
    pd.testing.assert_frame_equal(source.obs, adata.obs)
    pd.testing.assert_frame_equal(source.genes, adata.var)
    start = 0
    for block in source.blocks(1000):
        part = sparse.csr_matrix(
            (block.data, block.indices, block.indptr), shape=(block.num_cells, adata.n_vars)
        )
        assert (part != adata.X[start : start + block.num_cells]).nnz == 0
        start += block.num_cells
    assert start == adata.n_obs


@pytest.mark.golden
def test_golden_loom(goldens: Callable[[str], Path]) -> None:
    path = goldens("geneformer/tokenizer") / "loom.loom"
    with h5py.File(path) as file:
        expected = file["matrix"][()].T
    source = read(path)
    np.testing.assert_array_equal(dense(source, 3), expected)
    assert {"ensembl_id"} <= set(source.genes.columns)
    assert {"cell_type", "n_counts"} <= set(source.obs.columns)


def test_a_table_cannot_name_columns_outside_itself(tmp_path: Path) -> None:
    adata = anndata.AnnData(
        np.ones((3, 2), dtype=np.float32), obs=pd.DataFrame({"a": [1, 2, 3]}, index=list("xyz"))
    )
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["other"] = [7, 8, 9]
        file["obs"].attrs["column-order"] = ["/other"]
    with pytest.raises(UnsafeFileError, match="/other"):
        _ = scfm.read(tmp_path / "a.h5ad").obs


def test_groups_with_many_names_are_walked_once(tmp_path: Path) -> None:
    adata = anndata.AnnData(np.ones((3, 2), dtype=np.float32), obs=pd.DataFrame(index=list("xyz")))
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        group = file["obs"]
        for _ in range(40):
            group = group.create_group("one")
            group.parent["two"] = group
    assert len(scfm.read(tmp_path / "a.h5ad").obs) == 3
