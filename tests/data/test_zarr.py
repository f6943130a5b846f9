"""AnnData zarr stores: codecs, shards, tables, collections, and what is refused before it is decoded."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from numcodecs import LZ4, Blosc, Delta, GZip, Shuffle, Zlib, Zstd
from scipy import sparse
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from scfm.data import available_memory
from scfm.data.read import read
from scfm.data.source_list import SourceList
from scfm.errors import (
    FormatError,
    IntegrityError,
    MissingFileError,
    ResourceError,
    ScfmWarning,
    UnsafeFileError,
)

NUM_CELLS, NUM_GENES = 61, 23
RNG = np.random.default_rng(5)
COUNTS = RNG.integers(1, 400, (NUM_CELLS, NUM_GENES)) * (RNG.random((NUM_CELLS, NUM_GENES)) < 0.4)
COUNTS[[0, 17, 60]] = 0
OBS = pd.DataFrame(
    {
        "n_counts": COUNTS.sum(1).astype(np.float32),
        "kind": pd.Categorical(["a", "b", None, "d"] * 15 + ["a"]),
        "text": [f"t{i}" for i in range(NUM_CELLS)],
        "flag": pd.array([True, None] * 30 + [False], dtype="boolean"),
        "whole": pd.array([1, None] * 30 + [3], dtype="Int64"),
    },
    index=[f"c{i}" for i in range(NUM_CELLS)],
)


def write(path: Path, version: int, counts: Any = None, **extra: Any) -> Path:
    values = sparse.csr_matrix(COUNTS.astype(np.float32)) if counts is None else counts
    var = pd.DataFrame(
        {"symbol": [f"s{i}" for i in range(NUM_GENES)]}, index=[f"g{i}" for i in range(NUM_GENES)]
    )
    adata = anndata.AnnData(values, obs=OBS.copy(), var=var, **extra)
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=version):
        warnings.simplefilter("ignore")
        adata.write_zarr(path)
    return path


def rewrite(path: Path, version: int, name: str, **how: Any) -> None:
    """The array X/name stored again with the given chunks and codecs."""
    group = zarr.open_group(path, mode="r+", use_consolidated=False, zarr_format=version)["X"]
    values = how.pop("values", None)
    values = group[name][:] if values is None else values
    del group[name]
    group.create_array(name, data=values, **{"chunks": (50,), "compressors": None, **how})


def dense(source: Any) -> np.ndarray:
    out = np.zeros((len(source), source.num_genes))
    for block in source.blocks(9):
        cells = np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
        np.add.at(out, (cells + block.row_start, block.indices), block.data)
    return out


CODECS_2: dict[str, dict[str, Any]] = {
    "none": {},
    "blosc": {"compressors": Blosc("lz4", shuffle=1)},
    "blosc zstd bitshuffle": {"compressors": Blosc("zstd", shuffle=2)},
    "zstd": {"compressors": Zstd(3)},
    "gzip": {"compressors": GZip(3)},
    "zlib": {"compressors": Zlib(3)},
    "lz4": {"compressors": LZ4()},
    "shuffle, zlib": {"filters": Shuffle(4), "compressors": Zlib(1)},
    "delta": {"filters": Delta("i4"), "compressors": Zlib(1), "values_as": np.int32},
    "big-endian": {"values_as": ">f4"},
}
CODECS_3: dict[str, dict[str, Any]] = {
    "none": {},
    "blosc": {"compressors": BloscCodec(cname="lz4", clevel=3, shuffle="shuffle")},
    "zstd": {"compressors": ZstdCodec(level=0)},
    "zstd checksum": {"compressors": ZstdCodec(level=1, checksum=True)},
    "gzip": {"compressors": GzipCodec()},
    "crc32c": {"compressors": [GzipCodec(), Crc32cCodec()]},
    "big-endian": {"serializer": BytesCodec(endian="big")},
    "shards": {"shards": (150,), "compressors": ZstdCodec()},
    "shards blosc": {"shards": (100,), "compressors": BloscCodec(cname="lz4", shuffle="shuffle")},
    "one shard": {"shards": (5000,), "compressors": None},
}
UNUSUAL = {"delta", "big-endian"}


@pytest.mark.parametrize(
    ("version", "codec"), [*((2, codec) for codec in CODECS_2), *((3, codec) for codec in CODECS_3)]
)
def test_codecs(version: int, codec: str, tmp_path: Path) -> None:
    """Every codec gives the same rows in any order; the known ones without zarr-python."""
    codecs = CODECS_2 if version == 2 else CODECS_3
    path = write(tmp_path / "a.zarr", version)
    how = dict(codecs[codec])
    values = zarr.open_group(path, mode="r")["X/data"][:].astype(how.pop("values_as", np.float32))
    rewrite(path, version, "data", values=values, **how)
    rewrite(path, version, "indices", **({} if codec in UNUSUAL else how))
    source = read(path)
    assert source.reader.startswith("zarr-python" if codec in UNUSUAL else "native")
    np.testing.assert_array_equal(dense(source), COUNTS)
    order = np.random.default_rng(1).integers(0, NUM_CELLS, 90)
    np.testing.assert_array_equal(dense(source.select(order)), COUNTS[order])


@pytest.mark.parametrize("codec", ["shards", "blosc", "crc32c"])
def test_without_the_native_reader(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.zarr", 3)
    rewrite(path, 3, "data", **CODECS_3[codec])
    rewrite(path, 3, "indices", **CODECS_3[codec])
    monkeypatch.setenv("SCFM_READER", "h5py")
    source = read(path)
    assert source.reader.startswith("zarr-python")
    order = np.random.default_rng(1).integers(0, NUM_CELLS, 90)
    np.testing.assert_array_equal(dense(source.select(order)), COUNTS[order])


@pytest.mark.parametrize("version", [2, 3])
def test_tables(version: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", version)
    source = read(path)
    expected = anndata.io.read_zarr(path)
    pd.testing.assert_frame_equal(source.obs, expected.obs)
    pd.testing.assert_frame_equal(source.genes, expected.var)
    assert source.obs_column_names == list(OBS)
    rows = [40, 3, 3]
    for name in OBS:
        column = source.select(rows).obs_column(name)
        pd.testing.assert_series_equal(column, expected.obs[name].iloc[rows].reset_index(drop=True))
    assert source.obs_column("c0") is None


@pytest.mark.parametrize("version", [2, 3])
def test_raw_and_layers(version: int, tmp_path: Path) -> None:
    scaled = np.log1p(COUNTS / 7)
    path = write(
        tmp_path / "a.zarr", version, scaled, layers={"counts": sparse.csc_matrix(COUNTS), "other": COUNTS}
    )
    source = read(path)
    assert source.counts_from == "layers['counts']"
    np.testing.assert_array_equal(dense(source), COUNTS)
    other = read(path, layer="other")
    assert other.dense
    np.testing.assert_array_equal(dense(other.select([50, 2])), COUNTS[[50, 2]])
    adata = anndata.io.read_zarr(path)
    adata.raw = anndata.AnnData(sparse.csr_matrix(COUNTS + 1), var=adata.var)
    with anndata.settings.override(zarr_write_format=version):
        adata.write_zarr(tmp_path / "raw.zarr")
    source = read(tmp_path / "raw.zarr")
    assert source.counts_from == "raw.X"
    np.testing.assert_array_equal(dense(source), COUNTS + 1)


def test_folders_are_known_by_what_they_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "named like nothing", 3)
    np.testing.assert_array_equal(dense(read(path)), COUNTS)
    with pytest.raises(MissingFileError):
        read(tmp_path / "not there.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(FormatError, match="not a zarr group"):
        read(tmp_path / "empty.zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="w").create_group("table")
    with pytest.raises(FormatError, match="not an AnnData store; at its top are: table"):
        read(tmp_path / "other.zarr")


def test_a_collection_is_a_list(tmp_path: Path) -> None:
    """As annbatch writes: groups dataset_0 ... in one store, in the order of their numbers."""
    zarr.open_group(tmp_path / "all.zarr", mode="w", attributes={"encoding-type": "annbatch-preshuffled"})
    for number in (0, 2, 10):
        write(tmp_path / "all.zarr" / f"dataset_{number}", 3, sparse.csr_matrix(COUNTS + number))
        rewrite(
            tmp_path / "all.zarr" / f"dataset_{number}", 3, "data", shards=(200,), compressors=BloscCodec()
        )
    source = read(tmp_path / "all.zarr")
    assert isinstance(source, SourceList)
    assert len(source.parts) == 3
    assert [dense(part)[0, 0] for part in source.parts] == [COUNTS[0, 0] + n for n in (0, 2, 10)]


def test_sources_can_be_pickled(tmp_path: Path) -> None:
    source = read(write(tmp_path / "a.zarr", 3)).select([5, 2])
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(dense(again), COUNTS[[5, 2]])
    assert again.obs_column("text").tolist() == ["t5", "t2"]


def test_stale_consolidated_metadata_mislead_nobody(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 2)
    described = json.loads((path / ".zmetadata").read_text())
    described["metadata"]["X/data/.zarray"]["chunks"] = [3]
    described["metadata"]["obs/.zattrs"]["column-order"] = ["other"]
    (path / ".zmetadata").write_text(json.dumps(described))
    source = read(path)
    np.testing.assert_array_equal(dense(source), COUNTS)
    assert source.obs_column_names == list(OBS)


def test_missing_chunks_of_columns(tmp_path: Path) -> None:
    """Writers leave out chunks of zeros: legal in a table, said where it stands for numbers."""
    path = write(tmp_path / "a.zarr", 3)
    (path / "obs/n_counts/c/0").unlink()
    (path / "obs/flag/mask/c/0").unlink()
    source = read(path)
    with pytest.warns(ScfmWarning, match="obs/n_counts: 1 chunks are not in the store"):
        assert source.obs_column("n_counts").tolist() == [0.0] * NUM_CELLS
    assert not source.obs_column("flag").isna().any()
    (path / "obs/_index/c/0").unlink()
    with pytest.raises(FormatError, match="obs/_index/c/0: this chunk is missing"):
        _ = source.obs
    assert source.obs_column("text")[3] == "t3"


def test_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read(write(tmp_path / "a.zarr", 3))
    monkeypatch.setattr(available_memory, "available_memory", lambda: 100)
    with pytest.raises(ResourceError, match="obs/text"):
        source.obs_column("text")
    with pytest.raises(ResourceError, match="indptr"):
        read(tmp_path / "a.zarr")


def test_a_changed_store_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 3)
    source = read(path)
    rewrite(path, 3, "data", chunks=(60,))
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        dense(source)
    with pytest.raises(IntegrityError, match="changed"):
        source.obs_column("text")


# --- refused before anything is decoded ---


def change(path: Path, **entries: Any) -> None:
    """Entries of a metadata file replaced."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 2)

    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "opened",)

    (path / "obs/text/0").write_bytes(pickle.dumps(Canary()))
    change(path / "obs/text/.zarray", compressor=None, filters=[{"id": "pickle"}])
    with pytest.raises(UnsafeFileError, match="obs/text: is encoded by pickle"):
        read(path).obs_column("text")
    change(path / "obs/text/.zarray", filters=[])
    with pytest.raises(UnsafeFileError, match="Python objects"):
        read(path).obs_column("text")
    assert read(path).obs_column("n_counts") is not None
    change(path / "X/data/.zarray", dtype="|O", filters=[{"id": "pickle"}])
    with pytest.raises(UnsafeFileError, match="pickle"):
        read(path)
    assert not (tmp_path / "opened").exists()


def test_unknown_codecs_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 3)
    change(path / "X/data/zarr.json", codecs=[{"name": "bytes"}, {"name": "my_plugin"}])
    with pytest.raises(FormatError, match="X/data: is encoded by 'my_plugin'"):
        read(path)


@pytest.mark.parametrize("victim", ["X/data/c/0", "X/data/c", "X/data", "obs/n_counts", "X/zarr.json"])
def test_links_out_of_the_store_are_refused(victim: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 3)
    (path / victim).rename(tmp_path / "outside")
    (path / victim).symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeFileError, match="link that leaves the store"):
        read(path).obs_column("n_counts")


def test_links_inside_the_store_are_followed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 3)
    (path / "X/data/c/0").rename(path / "elsewhere")
    (path / "X/data/c/0").symlink_to("../../../elsewhere")
    np.testing.assert_array_equal(dense(read(path)), COUNTS)


@pytest.mark.parametrize("name", ["../X/data", "..", "/etc/passwd", "a/b", ""])
def test_column_names_stay_in_their_table(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 2)
    change(path / "obs/.zattrs", **{"column-order": [name]})
    source = read(path)
    with pytest.raises(UnsafeFileError, match="outside the table"):
        source.obs_column(name)
    with pytest.raises(UnsafeFileError, match="outside the table"):
        _ = source.obs


def test_sharding_in_other_forms_is_refused_for_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", 3)
    rewrite(
        path,
        3,
        "data",
        chunks=(100,),
        serializer=ShardingCodec(chunk_shape=(50,), index_codecs=[BytesCodec()]),
    )
    with pytest.raises(FormatError, match="shards whose index cannot be checked"):
        read(path)
