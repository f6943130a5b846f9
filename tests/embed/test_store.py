"""A folder of shards: what goes in comes out, by row, in every export format."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scfm.embed import embed_to_folder, export_store, open_store, verify_store
from scfm.embed.progress import Progress, RunProgress
from scfm.embed.run import place_among_workers
from scfm.errors import (
    BadCellError,
    IntegrityError,
    InvalidArgumentError,
    MissingDependencyError,
    MissingFileError,
)


@pytest.fixture
def files(tiny_adata, tmp_path) -> list:
    """40 cells of which 3 and 17 are empty, none, and 9."""
    counts = tiny_adata.X.toarray()
    counts[[3, 17]] = 0
    first = tiny_adata.copy()
    first.X = sp.csr_matrix(counts)
    paths = [tmp_path / name for name in ("a.h5ad", "none.h5ad", "b.h5ad")]
    for path, adata in zip(paths, (first, tiny_adata[:0], tiny_adata[20:29]), strict=True):
        adata.copy().write_h5ad(path)
    return paths


@pytest.fixture
def whole(tiny_model, files) -> np.ndarray:
    return np.concatenate([tiny_model.embed(path, on_bad_cell="nan") for path in files])


@pytest.mark.parametrize("shard_size", [1, 16, 40, 65_536])
def test_shards_hold_what_one_run_gives(tiny_model, files, whole, tmp_path, shard_size: int) -> None:
    summary = embed_to_folder(files, tiny_model, tmp_path / "out", shard_size=shard_size, on_bad_cell="nan")
    assert summary.complete and summary.num_cells == 49 and summary.num_without_genes == 2
    store = open_store(tmp_path / "out")
    assert store.complete and len(store) == 49 and store.hidden_size == 32
    assert all(shard.num_cells <= shard_size for shard in store.shards)
    np.testing.assert_array_equal(store.read(), whole)
    rows = np.array([48, 0, 39, 40, -1, 0, 17])
    np.testing.assert_array_equal(store.read(rows), whole[rows])
    np.testing.assert_array_equal(store.read(slice(45, None, -7)), whole[45::-7])
    np.testing.assert_array_equal(store.read(np.arange(49) % 5 == 0), whole[::5])
    assert store.read([]).shape == (0, 32)
    assert store.without_genes.tolist() == [3, 17]
    with pytest.raises(InvalidArgumentError, match="49 cells"):
        store.read([49])


def test_no_cells_at_all(tiny_model, files, tmp_path) -> None:
    assert embed_to_folder([files[1]], tiny_model, tmp_path / "out").complete
    assert open_store(tmp_path / "out").read().shape == (0, 32)
    export_store(tmp_path / "out", tmp_path / "x.npy")
    assert np.load(tmp_path / "x.npy").shape == (0, 32)
    assert verify_store(tmp_path / "out").ok


@pytest.mark.parametrize("policy", ["nan", "skip"])
@pytest.mark.parametrize("suffix", [".npy", ".zarr", ".parquet"])
def test_exports_hold_the_same_numbers(tiny_model, files, whole, tmp_path, policy, suffix) -> None:
    embed_to_folder(files, tiny_model, tmp_path / "out", shard_size=11, on_bad_cell=policy)
    summary = export_store(tmp_path / "out", tmp_path / f"x{suffix}")
    kept = np.delete(np.arange(49), [3, 17]) if policy == "skip" else np.arange(49)
    assert summary.shape == (len(kept), 32) and summary.num_left_out == 49 - len(kept)
    if suffix == ".npy":
        found = np.load(tmp_path / "x.npy", allow_pickle=False)
        facts = json.loads((tmp_path / "x.npy.json").read_text())
    elif suffix == ".zarr":
        zarr = pytest.importorskip("zarr")
        array = zarr.open_array(tmp_path / "x.zarr", mode="r")
        assert array.metadata.zarr_format == 3
        found, facts = array[:], dict(array.attrs)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(tmp_path / "x.parquet")
        facts = json.loads(table.schema.metadata[b"scfm"])
        frame = table.to_pandas()
        found = np.stack(frame["embedding"])
        rows = np.concatenate([np.arange(40), np.arange(9)])[kept]
        assert frame["row"].tolist() == rows.tolist()
        assert frame["file"].tolist() == np.repeat(["a.h5ad", "b.h5ad"], [40, 9])[kept].tolist()
    np.testing.assert_array_equal(found, whole[kept])
    assert (
        facts["family"] == "geneformer" and facts["layer"] == -1 and facts["num_left_out"] == 49 - len(kept)
    )


def test_zarr_chunks_that_shards_share(tiny_model, files, whole, tmp_path, monkeypatch) -> None:
    zarr = pytest.importorskip("zarr")
    monkeypatch.setattr("scfm.embed.export.ZARR_CHUNK_BYTES", 10 * 32 * 4)
    embed_to_folder(files, tiny_model, tmp_path / "out", shard_size=7, on_bad_cell="nan")
    export_store(tmp_path / "out", tmp_path / "x.zarr")
    array = zarr.open_array(tmp_path / "x.zarr", mode="r")
    assert array.chunks == (10, 32)
    np.testing.assert_array_equal(array[:], whole)


def test_obsm_of_a_copy(tiny_model, files, whole, tmp_path) -> None:
    embed_to_folder(files, tiny_model, tmp_path / "out", shard_size=11, on_bad_cell="skip")
    with pytest.raises(InvalidArgumentError, match="--input"):
        export_store(tmp_path / "out", tmp_path / "x.h5ad")
    with pytest.raises(InvalidArgumentError, match="is not of the embedded"):
        export_store(tmp_path / "out", tmp_path / "x.h5ad", input_file=tmp_path / "c.h5ad")
    for path, rows in ((files[0], slice(0, 40)), (files[2], slice(40, 49))):
        export_store(tmp_path / "out", tmp_path / "x.h5ad", input_file=path, key="X_e")
        adata = ad.read_h5ad(tmp_path / "x.h5ad")
        np.testing.assert_array_equal(adata.obsm["X_e"], whole[rows])
        assert adata.uns["scfm"]["X_e"]["pooling"] == "cls"
    files[2].write_bytes(files[0].read_bytes())
    with pytest.raises(IntegrityError, match="not the file that was embedded"):
        export_store(tmp_path / "out", tmp_path / "y.h5ad", input_file=files[2])
    assert not (tmp_path / "y.h5ad").exists()


def test_float16_shards(tiny_model, files, whole, tmp_path) -> None:
    embed_to_folder(files, tiny_model, tmp_path / "out", store_dtype="float16", on_bad_cell="nan")
    store = open_store(tmp_path / "out")
    assert store.dtype == np.float16
    np.testing.assert_array_equal(store.read(), whole.astype(np.float16))
    for suffix in ("npy", "parquet"):
        assert export_store(tmp_path / "out", tmp_path / f"x.{suffix}").dtype == "float16"


def test_unfinished_folders_are_not_exported(tiny_model, files, tmp_path) -> None:
    embed_to_folder(files, tiny_model, tmp_path / "out", shard_size=16, on_bad_cell="nan")
    (tmp_path / "out" / "part-00002.json").unlink()
    store = open_store(tmp_path / "out")
    assert [shard.name for shard in store.missing] == ["part-00002"]
    store.read(slice(0, 16))
    with pytest.raises(MissingFileError, match="part-00002"):
        store.read()
    for suffix in ("npy", "zarr", "parquet"):
        with pytest.raises(MissingFileError, match="part-00002"):
            export_store(tmp_path / "out", tmp_path / f"x.{suffix}")
    assert not list(tmp_path.glob("x.*"))
    with pytest.raises(InvalidArgumentError, match=r"\.npy"):
        export_store(tmp_path / "out", tmp_path / "x.csv")
    with pytest.raises(MissingFileError, match=r"plan\.json"):
        open_store(tmp_path)


@pytest.mark.parametrize(("module", "suffix"), [("zarr", ".zarr"), ("pyarrow", ".parquet")])
def test_missing_packages_are_named(tiny_model, files, tmp_path, monkeypatch, module, suffix) -> None:
    embed_to_folder([files[2]], tiny_model, tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDependencyError, match=f"pip install .*{module}"):
        export_store(tmp_path / "out", tmp_path / f"x{suffix}")


def test_cells_without_genes_stop_the_run_by_default(tiny_model, tiny_adata, files, tmp_path) -> None:
    counts = tiny_adata.X.toarray()
    counts[17] = 0
    tiny_adata.X = sp.csr_matrix(counts)
    tiny_adata.write_h5ad(files[0])
    with pytest.raises(BadCellError, match="rows 17"):
        embed_to_folder([files[0]], tiny_model, tmp_path / "out", shard_size=10)
    assert not list((tmp_path / "out").glob("*.lease"))


def test_progress_over_all_workers(tiny_model, files, tmp_path) -> None:
    seen: list[Progress] = []
    embed_to_folder(
        files, tiny_model, tmp_path / "out", shard_size=10, on_bad_cell="nan", progress=seen.append
    )
    assert seen[-1].cells == seen[-1].num_cells == 49 and seen[-1].share == 1 and seen[-1].seconds_left == 0
    plan = open_store(tmp_path / "out").plan
    (tmp_path / "out" / "part-00001.json").unlink()
    lease = tmp_path / "out" / "part-00001.lease"
    lease.write_text(json.dumps({"host": "h", "pid": 1, "cells": 4, "tokens": 200, "speed": 3.0}))
    state = RunProgress(tmp_path / "out", plan).look()
    assert (state.cells, state.shards, state.workers, state.cells_per_second) == (43, 4, 1, 3.0)
    assert state.seconds_left == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, 0.0),
        ({"RANK": "1", "WORLD_SIZE": "4"}, 0.25),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}, 0.5),
        (
            {
                "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_PROCID": "1", "SLURM_NTASKS": "2",
            },
            0.75,
        ),
        ({"RANK": "x", "WORLD_SIZE": "4"}, 0.0),
        ({"RANK": "9", "WORLD_SIZE": "4"}, 0.0),
    ],
)  # fmt: skip
def test_workers_begin_apart(environment, place) -> None:
    assert place_among_workers(environment) == place
