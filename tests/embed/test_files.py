"""Embeddings reach the disk whole or not at all, and never touch the input."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest

from scfm.data.atomic_file import whole_file
from scfm.embed.files import write_h5ad_copy, write_npy
from scfm.errors import InvalidArgumentError, MissingFileError

EMBEDDING = np.arange(80, dtype=np.float32).reshape(40, 2)


def test_npy_with_its_provenance(tmp_path) -> None:
    write_npy(tmp_path / "x.npy", EMBEDDING, {"layer": -1})
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", allow_pickle=False), EMBEDDING)
    assert json.loads((tmp_path / "x.npy.json").read_text()) == {"layer": -1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "x.npy.json"]


def test_h5ad_copy_holds_the_embedding_and_everything_else(tiny_adata, tmp_path) -> None:
    tiny_adata.write_h5ad(tmp_path / "in.h5ad")
    before = (tmp_path / "in.h5ad").read_bytes()
    for _ in range(2):
        write_h5ad_copy(tmp_path / "in.h5ad", tmp_path / "out.h5ad", EMBEDDING, "X_e", {"dtype": "float32"})
    again = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(again.obsm["X_e"], EMBEDDING)
    assert again.uns["scfm"]["X_e"]["dtype"] == "float32"
    assert (again.X != tiny_adata.X).nnz == 0
    assert (tmp_path / "in.h5ad").read_bytes() == before
    with pytest.raises(InvalidArgumentError, match="the input itself"):
        write_h5ad_copy(tmp_path / "in.h5ad", tmp_path / "in.h5ad", EMBEDDING, "X_e", {})


def test_a_failure_leaves_the_old_file_and_nothing_partial(tmp_path) -> None:
    target = tmp_path / "x.npy"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="boom"), whole_file(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("boom")
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"] and target.read_bytes() == b"old"


def test_places_that_cannot_be_written_are_named(tmp_path) -> None:
    with pytest.raises(MissingFileError, match="absent"):
        write_npy(tmp_path / "absent" / "x.npy", EMBEDDING, {})
    with pytest.raises(InvalidArgumentError, match="folder"), whole_file(tmp_path):
        pass


def test_a_link_in_the_copy_is_refused_and_its_target_untouched(tiny_adata, tmp_path) -> None:
    import h5py

    from scfm.errors import UnsafeFileError

    tiny_adata.write_h5ad(tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "victim.h5", "w") as victim:
        victim.create_group("g")
    before = (tmp_path / "victim.h5").read_bytes()
    with h5py.File(tmp_path / "in.h5ad", "r+") as file:
        del file["obsm"]
        file["obsm"] = h5py.ExternalLink(str(tmp_path / "victim.h5"), "/g")
    with pytest.raises(UnsafeFileError, match="obsm"):
        write_h5ad_copy(tmp_path / "in.h5ad", tmp_path / "out.h5ad", EMBEDDING, "X_e", {})
    assert (tmp_path / "victim.h5").read_bytes() == before and not (tmp_path / "out.h5ad").exists()
