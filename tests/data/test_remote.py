"""h5ad files through fsspec, and lists of whatever scfm.read takes."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scfm
from scfm.data.source_list import SourceList
from scfm.errors import FormatError, InvalidArgumentError, MissingDependencyError, MissingFileError, ScfmError

fsspec = pytest.importorskip("fsspec")

COUNTS = np.random.default_rng(3).integers(0, 5, (20, 7))


def adata() -> anndata.AnnData:
    names = [f"c{i}" for i in range(20)]
    return anndata.AnnData(
        sparse.csr_matrix(COUNTS.astype(np.float32)), obs=pd.DataFrame({"n": range(20)}, index=names)
    )


@pytest.fixture
def url(tmp_path: Path) -> str:
    adata().write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with fsspec.open("memory://scfm/a.h5ad", "wb") as file:
        file.write((tmp_path / "a.h5ad").read_bytes())
    return "memory://scfm/a.h5ad"


def dense(source: scfm.CellSource) -> np.ndarray:
    return np.concatenate(
        [
            sparse.csr_matrix((b.data, b.indices, b.indptr), shape=(b.num_cells, b.num_genes)).toarray()
            for b in source.blocks(6)
        ]
    )


def test_remote_h5ad(url: str) -> None:
    source = scfm.read(url)
    assert source.reader == "h5py (remote)"
    assert source.name == url
    np.testing.assert_array_equal(dense(source), COUNTS)
    assert source.select([4, 4]).obs_column("n").tolist() == [4, 4]
    np.testing.assert_array_equal(dense(source.select([19, 0])), COUNTS[[19, 0]])


def test_remote_errors(url: str) -> None:
    with fsspec.open("memory://scfm/text.h5ad", "wb") as file:
        file.write(b"no HDF5")
    with pytest.raises(FormatError, match=r"text\.h5ad"):
        scfm.read("memory://scfm/text.h5ad")
    with pytest.raises(MissingFileError):
        scfm.read("memory://scfm/none.h5ad")
    with pytest.raises(InvalidArgumentError, match=r"only \.h5ad files and SOMA"):
        scfm.read("s3://bucket/a.zarr")
    with pytest.raises(ScfmError, match="nonsense"):
        scfm.read("nonsense://a.h5ad")


def test_without_fsspec(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependencyError, match=r"scfm\[remote\]"):
        scfm.read(url)


def test_lists(url: str, tmp_path: Path) -> None:
    source = scfm.read([adata(), tmp_path / "a.h5ad", scfm.read(adata()).select([3, 1])])
    assert isinstance(source, SourceList)
    assert len(source) == 42
    np.testing.assert_array_equal(dense(source), np.concatenate([COUNTS, COUNTS, COUNTS[[3, 1]]]))
    assert source.obs_column("n").tolist() == [*range(20), *range(20), 3, 1]
    with pytest.raises(InvalidArgumentError, match="empty list"):
        scfm.read([])
    with pytest.raises(InvalidArgumentError, match="AnnData"):
        scfm.read((adata(), 3))


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_backed_views_stay_in_the_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a backed object, also of its raw counts, are read by the file's own reader."""
    whole = adata()
    if kind == "dense":
        whole.X = COUNTS.astype(np.float32)
    whole.raw = whole.copy()
    whole.write_h5ad(tmp_path / "b.h5ad")
    backed = anndata.read_h5ad(tmp_path / "b.h5ad", backed="r")
    monkeypatch.setattr(type(backed), "X", property(lambda _: pytest.fail("X was loaded")))
    rows = np.array([7, 2, 2, 19])
    mask = np.arange(20) % 3 == 0
    for chosen, expected in ((rows, rows), (mask, np.flatnonzero(mask)), (slice(3, 9), np.arange(3, 9))):
        for layer in ("X", "raw.X"):
            source = scfm.read(backed[chosen], layer=layer)
            assert source.counts_from == layer
            np.testing.assert_array_equal(dense(source), COUNTS[expected])
            assert source.rows.tolist() == list(range(len(expected)))
            assert source.obs_column("n").tolist() == expected.tolist()
            np.testing.assert_array_equal(dense(source.select([1, 0])), COUNTS[expected[[1, 0]]])
