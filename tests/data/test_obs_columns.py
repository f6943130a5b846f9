"""One column of obs at a time: the same values as the whole table gives, and no care about the other columns."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from scfm.data.read import read
from scfm.errors import FormatError, ScfmError, UnsafeFileError
from scfm.tokenize.geneformer import filter_pass_of, library_size_of

NUM_CELLS = 12
COUNTS = np.random.default_rng(2).integers(0, 9, (NUM_CELLS, 5))
OBS = pd.DataFrame(
    {
        "n_counts": COUNTS.sum(1).astype(np.float32),
        "filter_pass": [1, 0] * 6,
        "kind": pd.Categorical(["a", None, "c"] * 4, categories=["c", "a", "unused"], ordered=True),
        "text": [f"t{i}" for i in range(NUM_CELLS)],
        "whole": pd.array([1, None] * 6, dtype="Int64"),
        "flag": pd.array([True, None, False] * 4, dtype="boolean"),
        "bool": [True, False] * 6,
    },
    index=[f"c{i}" for i in range(NUM_CELLS)],
)


def stored(way: str, folder: Path) -> object:
    adata = anndata.AnnData(COUNTS.astype(np.float32), obs=OBS.copy())
    if way == "memory":
        return adata
    if way.startswith("zarr"):
        with (
            warnings.catch_warnings(),
            anndata.settings.override(zarr_write_format=int(way[-1])),
        ):
            warnings.simplefilter("ignore")
            adata.write_zarr(folder / "a.zarr")
        return folder / "a.zarr"
    adata.write_h5ad(folder / "a.h5ad")
    return anndata.read_h5ad(folder / "a.h5ad", backed="r") if way == "backed" else folder / "a.h5ad"


WAYS = ["memory", "h5ad", "backed", "zarr 2", "zarr 3"]


@pytest.mark.parametrize("way", WAYS)
def test_columns_are_those_of_the_table(way: str, tmp_path: Path) -> None:
    source = read(stored(way, tmp_path))
    assert source.obs_column_names == list(source.obs.columns) == list(OBS)
    for rows in (slice(None), [11, 0, 0, 5], [], np.arange(NUM_CELLS) % 3 == 0):
        chosen = source.select(rows)
        for name in OBS:
            column = chosen.obs_column(name)
            pd.testing.assert_series_equal(column, chosen.obs[name].reset_index(drop=True))
    for name in ("nothing", "", "_index", "index", "c0"):
        assert source.obs_column(name) is None


@pytest.mark.parametrize("way", WAYS)
def test_the_tokenizer_takes_its_columns_from_there(way: str, tmp_path: Path) -> None:
    source = read(stored(way, tmp_path)).select([4, 3])
    sizes, origin = library_size_of(source)
    assert origin == "obs['n_counts']"
    assert sizes is not None
    np.testing.assert_array_equal(sizes, OBS.n_counts.to_numpy()[[4, 3]])
    keep = filter_pass_of(source)
    assert keep is not None
    assert keep.tolist() == [True, False]


def test_damage_elsewhere_does_not_matter(tmp_path: Path) -> None:
    path = stored("h5ad", tmp_path)
    with h5py.File(path, "r+") as file:
        del file["obs/text"]
        file["obs/text"] = h5py.ExternalLink("/etc/passwd", "/x")
        file["obs/kind/codes"][:] = 100
        del file["obs/_index"]
        file["obs/_index"] = np.zeros(NUM_CELLS, dtype=np.complex64)
    source = read(path)
    assert source.obs_column("n_counts").tolist() == OBS.n_counts.tolist()
    assert library_size_of(source)[1] == "obs['n_counts']"
    with pytest.raises(UnsafeFileError, match="obs/text: is a link to another file"):
        source.obs_column("text")
    with pytest.raises(FormatError, match="obs/kind"):
        source.obs_column("kind")
    with pytest.raises(ScfmError):
        _ = source.obs


def test_columns_of_another_length_or_missing(tmp_path: Path) -> None:
    path = stored("h5ad", tmp_path)
    with h5py.File(path, "r+") as file:
        del file["obs/n_counts"], file["obs/bool"], file["obs/filter_pass"]
        file["obs/n_counts"] = np.ones(3)
        file["obs/filter_pass"] = np.ones((NUM_CELLS, 2))
    source = read(path)
    with pytest.raises(FormatError, match=r"obs\['n_counts'\]: has 3 entries, the counts have 12 rows"):
        source.obs_column("n_counts")
    with pytest.raises(FormatError, match="obs/bool: is named in column-order, but missing"):
        source.obs_column("bool")
    with pytest.raises(FormatError, match="obs/filter_pass"):
        source.obs_column("filter_pass")


@pytest.mark.parametrize("name", ["/uns/secret", "../uns/secret", "kind/codes"])
def test_names_stay_in_the_table(name: str, tmp_path: Path) -> None:
    path = stored("h5ad", tmp_path)
    with h5py.File(path, "r+") as file:
        file["uns/secret"] = np.arange(NUM_CELLS)
        file["obs"].attrs["column-order"] = [name]
    source = read(path)
    with pytest.raises(UnsafeFileError, match="outside the table"):
        source.obs_column(name)
    with pytest.raises(UnsafeFileError, match="outside the table"):
        _ = source.obs


def old_categories(path: Path, *, target: str = "obs/__categories/kind", by_name: bool = False) -> Path:
    """obs as anndata 0.7 wrote it: codes with a reference to their categories."""
    anndata.AnnData(COUNTS.astype(np.float32), obs=OBS[["n_counts"]]).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        table = file["obs"]
        table.attrs["encoding-version"] = "0.1.0"
        table.attrs["column-order"] = ["n_counts", "kind"]
        table["kind"] = np.array([0, 1, -1] * 4, dtype=np.int8)
        categories = table.create_dataset("__categories/kind", data=np.array([b"x", b"y"]))
        categories.attrs["ordered"] = np.bool_(True)
        for name in ("n_counts", "kind", "_index"):
            for mark in ("encoding-type", "encoding-version"):
                if mark in table[name].attrs:
                    del table[name].attrs[mark]
        table["kind"].attrs["categories"] = target if by_name else file[target].ref
    return path


@pytest.mark.filterwarnings("ignore")
def test_categories_of_old_files(tmp_path: Path) -> None:
    source = read(old_categories(tmp_path / "a.h5ad"))
    column = source.obs_column("kind")
    pd.testing.assert_series_equal(column, source.obs["kind"].reset_index(drop=True))
    assert column.cat.ordered
    assert len(column.cat.categories) == 2
    assert column.isna().tolist() == [False, False, True] * 4
    for strange in (
        old_categories(tmp_path / "b.h5ad", target="X", by_name=True),
        old_categories(tmp_path / "c.h5ad", target="var"),
    ):
        with pytest.raises(UnsafeFileError, match="obs/kind: has categories that are not a dataset"):
            read(strange).obs_column("kind")
        with pytest.raises(UnsafeFileError, match="obs/kind: has categories that are not a dataset"):
            _ = read(strange).obs


def test_compound_tables(tmp_path: Path) -> None:
    """obs as one compound dataset, as before anndata 0.7."""
    path = stored("h5ad", tmp_path)
    records = np.zeros(
        NUM_CELLS, dtype=[("index", "S5"), ("n_counts", "f4"), ("name", "S3"), ("d", "f8", (2,))]
    )
    records["index"] = [f"c{i}".encode() for i in range(NUM_CELLS)]
    records["n_counts"] = OBS.n_counts
    records["name"] = b"ab"
    with h5py.File(path, "r+") as file:
        del file["obs"]
        file["obs"] = records
    source = read(path).select([3, 2])
    assert source.obs_column_names == ["n_counts", "name", "d"]
    np.testing.assert_array_equal(source.obs_column("n_counts"), OBS.n_counts.to_numpy()[[3, 2]])
    assert source.obs_column("name").tolist() == ["ab", "ab"]
    assert source.obs_column("index") is None
    with pytest.raises(FormatError, match="obs"):
        source.obs_column("d")


def test_loom_attributes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"] = COUNTS.T
        file["row_attrs/Gene"] = np.array([b"g"] * 5)
        file["col_attrs/CellID"] = np.array([f"c{i}".encode() for i in range(NUM_CELLS)])
        file["col_attrs/n_counts"] = COUNTS.sum(1)
        file["col_attrs/umap"] = np.zeros((NUM_CELLS, 2))
        file["col_attrs/short"] = np.zeros(3)
    source = read(tmp_path / "a.loom").select([5, 1])
    assert source.obs_column_names == ["CellID", "n_counts", "short"]
    assert source.obs_column("n_counts").tolist() == COUNTS.sum(1)[[5, 1]].tolist()
    assert source.obs_column("CellID").tolist() == ["c5", "c1"]
    assert source.obs_column("umap") is None
    with pytest.raises(FormatError, match="col_attrs/short: has 3 entries, expected 12"):
        source.obs_column("short")


def test_repeated_names_in_memory() -> None:
    adata = anndata.AnnData(COUNTS.astype(np.float32), obs=OBS[["n_counts", "text"]])
    adata.obs.columns = ["same", "same"]
    assert read(adata).obs_column("same").tolist() == OBS.n_counts.tolist()
