"""TileDB-SOMA experiments against the AnnData that they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scfm
from scfm.errors import FormatError, InvalidArgumentError, MissingFileError, NotCountsError

tiledbsoma = pytest.importorskip("tiledbsoma", reason="the extra census is not installed")

NUM_CELLS, NUM_GENES = 50, 14
RNG = np.random.default_rng(4)
COUNTS = RNG.integers(1, 90, (NUM_CELLS, NUM_GENES)) * (RNG.random((NUM_CELLS, NUM_GENES)) < 0.4)
COUNTS[[0, 20, 49]] = 0
OBS = pd.DataFrame(
    {"n_counts": COUNTS.sum(1).astype(np.float64), "kind": pd.Categorical(["a", "b"] * 25)},
    index=[f"c{i}" for i in range(NUM_CELLS)],
)
VAR = pd.DataFrame(
    {
        "feature_id": [f"ENSG{i:011d}" for i in range(NUM_GENES)],
        "feature_name": [f"s{i}" for i in range(NUM_GENES)],
    },
    index=[f"g{i}" for i in range(NUM_GENES)],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiledbsoma.io

    path = tmp_path_factory.mktemp("soma") / "experiment"
    adata = anndata.AnnData(sparse.csr_matrix(COUNTS.astype(np.float32)), obs=OBS, var=VAR)
    adata.layers["normalized"] = sparse.csr_matrix(np.log1p(COUNTS.astype(np.float32)))
    tiledbsoma.io.from_anndata(str(path), adata, measurement_name="RNA", X_layer_name="raw")
    return path


def dense(source: Any) -> np.ndarray:
    out = np.zeros((len(source), source.num_genes))
    for block in source.blocks(9):
        cells = np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
        np.add.at(out, (cells + block.row_start, block.indices), block.data)
    return out


@pytest.mark.parametrize("given", ["path", "text", "uri", "object"])
def test_cells(given: str, folder: Path) -> None:
    if given == "object":
        with tiledbsoma.open(str(folder)) as experiment:
            np.testing.assert_array_equal(dense(scfm.read(experiment)), COUNTS)
        return
    source = scfm.read({"path": folder, "text": str(folder), "uri": f"soma://{folder}"}[given])
    assert source.reader == "tiledbsoma"
    assert source.counts_from == "X['raw']"
    np.testing.assert_array_equal(dense(source), COUNTS)
    rows = [49, 3, 3, 20, 48, 0]
    np.testing.assert_array_equal(dense(source.select(rows)), COUNTS[rows])
    np.testing.assert_array_equal(dense(source.select([])), COUNTS[[]])


def test_tables(folder: Path) -> None:
    source = scfm.read(folder)
    assert source.genes.index.tolist() == VAR.feature_id.tolist()
    assert source.genes.feature_name.tolist() == VAR.feature_name.tolist()
    assert source.obs.index.tolist() == OBS.index.tolist()
    assert {"n_counts", "kind", "soma_joinid"} <= set(source.obs_column_names)
    assert source.select([7, 2]).obs_column("n_counts").tolist() == OBS.n_counts.iloc[[7, 2]].tolist()
    assert source.obs_column("kind").tolist() == OBS.kind.tolist()
    assert source.obs_column("soma_joinid").tolist() == list(range(NUM_CELLS))
    assert source.obs_column("nothing") is None


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"no 'other'; there are: .*raw"):
        scfm.read(folder, layer="other")
    with pytest.raises(NotCountsError):
        scfm.read(folder, layer="normalized")
    with pytest.raises(MissingFileError):
        scfm.read(f"soma://{tmp_path}/none")
    with pytest.raises(FormatError, match="SOMA Collection, expected an Experiment"):
        scfm.read(f"soma://{folder}/ms")


def test_ids_with_gaps(tmp_path: Path) -> None:
    """soma_joinid need not count from 0 without gaps: cells and genes stand in the order of their ids."""
    import pyarrow as pa

    cells, genes = np.array([3, 8, 9, 40]), np.array([2, 5, 11])
    counts = np.array([[0, 4, 1], [0, 0, 0], [7, 0, 2], [1, 1, 1]])
    text, whole = pa.large_string(), pa.int64()
    with tiledbsoma.Experiment.create(str(tmp_path / "e")) as experiment:
        obs = experiment.add_new_dataframe(
            "obs",
            schema=pa.schema([("soma_joinid", whole), ("name", text)]),
            index_column_names=["soma_joinid"],
            domain=[(0, 50)],
        )
        obs.write(pa.table({"soma_joinid": cells[::-1], "name": pa.array(list("dcba"), type=text)}))
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        var = rna.add_new_dataframe(
            "var",
            schema=pa.schema([("soma_joinid", whole), ("feature_id", text)]),
            index_column_names=["soma_joinid"],
            domain=[(0, 50)],
        )
        var.write(pa.table({"soma_joinid": genes, "feature_id": pa.array(list("xyz"), type=text)}))
        layer = rna.add_new_collection("X").add_new_sparse_ndarray("raw", type=pa.float32(), shape=(51, 51))
        rows, columns = counts.nonzero()
        layer.write(
            pa.table(
                {
                    "soma_dim_0": cells[rows],
                    "soma_dim_1": genes[columns],
                    "soma_data": counts[rows, columns].astype(np.float32),
                }
            )
        )
    source = scfm.read(tmp_path / "e")
    np.testing.assert_array_equal(dense(source), counts)
    np.testing.assert_array_equal(dense(source.select([3, 0, 2])), counts[[3, 0, 2]])
    assert source.obs_column("name").tolist() == list("abcd")
    assert source.genes.index.tolist() == list("xyz")
    with tiledbsoma.Experiment.open(str(tmp_path / "e"), "w") as experiment:
        stray = {"soma_dim_0": [8], "soma_dim_1": [6], "soma_data": np.array([1], np.float32)}
        experiment.ms["RNA"].X["raw"].write(pa.table(stray))
    with pytest.raises(FormatError, match="soma_dim_1: an entry names soma_joinid 6"):
        dense(scfm.read(tmp_path / "e"))
