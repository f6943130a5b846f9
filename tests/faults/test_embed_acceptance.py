"""What an acceptance test of folders once found: inputs that change inside, exports that would destroy, plans that
begin in error, and names that others have taken."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import scfm.embed.shard_worker as shard_worker
from scfm.embed import embed_to_folder, export_store, verify_store
from scfm.errors import GeneMappingError, IntegrityError, InvalidArgumentError

GENES = [f"ENSG{i:011d}" for i in range(1, 121)]  # those of the tiny model


def cells(path: Path, num_cells: int, *, seed: int = 0, genes: list[str] = GENES) -> Path:
    counts = np.random.default_rng(seed).poisson(1.0, (num_cells, len(genes))).astype(np.float32)
    adata = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=genes))
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zarr":
        adata.X = adata.X.toarray()
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    return path


def test_a_zarr_store_changed_inside_stops_the_run(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cells(tmp_path / "a.zarr", 40)
    commit, made = shard_worker.commit_shard, []

    def commit_and_change(*arguments, **more):
        won = commit(*arguments, **more)
        made.append(won)
        if len(made) == 1:
            values = zarr.open_array(str(path / "X"), mode="r+")
            values[:] = values[:][::-1]
        return won

    monkeypatch.setattr(shard_worker, "commit_shard", commit_and_change)
    with pytest.raises(IntegrityError):
        embed_to_folder([path], tiny_model, tmp_path / "out", shard_size=10)
    assert made == [True]


def test_exports_destroy_neither_inputs_nor_shards(tiny_model, tmp_path: Path) -> None:
    first, second = cells(tmp_path / "a.h5ad", 12), cells(tmp_path / "b.h5ad", 9, seed=1)
    out = tmp_path / "out"
    embed_to_folder([first, second], tiny_model, out)
    before = {path: path.read_bytes() for path in (first, second, *out.iterdir())}
    other = cells(tmp_path / "other.h5ad", 3)
    kept = other.read_bytes()
    for target in (first, second, out / "part-00000.npy", out / "x.npy", other):
        with pytest.raises(InvalidArgumentError):
            export_store(out, target, input_file=first if target.suffix == ".h5ad" else None)
    assert {path: path.read_bytes() for path in before} == before
    assert other.read_bytes() == kept
    assert sorted(out.iterdir()) == sorted(path for path in before if path.parent == out)


def test_inputs_of_one_name_are_told_apart(tiny_model, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    paths = [cells(tmp_path / name / "cells.h5ad", 6, seed=seed) for seed, name in enumerate("pq")]
    embed_to_folder(paths, tiny_model, tmp_path / "out")
    export_store(tmp_path / "out", tmp_path / "o.parquet")
    table = pq.read_table(tmp_path / "o.parquet").to_pandas()
    assert not table.duplicated(["file", "row"]).any()
    assert list(dict.fromkeys(table["file"])) == [str(path) for path in paths]
    export_store(tmp_path / "out", tmp_path / "o.h5ad", input_file=tmp_path / "q" / ".." / "q" / "cells.h5ad")
    assert ad.read_h5ad(tmp_path / "o.h5ad").n_obs == 6


def test_a_file_without_known_genes_is_named_before_any_work(tiny_model, tmp_path: Path) -> None:
    good = cells(tmp_path / "good.h5ad", 6)
    bad = cells(tmp_path / "bad.h5ad", 6, genes=[f"nothing{i}" for i in range(len(GENES))])
    with pytest.raises(GeneMappingError, match=r"bad\.h5ad"):
        embed_to_folder([good, bad], tiny_model, tmp_path / "out", on_bad_cell="nan")
    assert not (tmp_path / "out").exists()


def test_a_wrong_budget_begins_no_folder(tiny_model, tmp_path: Path) -> None:
    path = cells(tmp_path / "a.h5ad", 6)
    with pytest.raises(InvalidArgumentError):
        embed_to_folder([path], tiny_model, tmp_path / "out", token_budget=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("taken_by", ["dangling link", "folder"])
def test_a_manifest_name_that_is_taken_is_set_aside(taken_by: str, tiny_model, tmp_path: Path) -> None:
    from scfm.errors import ScfmWarning

    path = cells(tmp_path / "a.h5ad", 6)
    out = tmp_path / "out"
    embed_to_folder([path], tiny_model, out)
    expected = np.load(out / "part-00000.npy")
    (out / "part-00000.json").unlink()
    if taken_by == "folder":
        (out / "part-00000.json").mkdir()
    else:
        (out / "part-00000.json").symlink_to(tmp_path / "nowhere")
    with pytest.warns(ScfmWarning, match="set aside"):
        summary = embed_to_folder([path], tiny_model, out)
    assert summary.complete
    assert verify_store(out).ok
    np.testing.assert_array_equal(np.load(out / "part-00000.npy"), expected)


def test_an_array_replaced_before_its_manifest_is_not_vouched_for(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker, with other last bits, takes over between our array and our manifest."""
    import scfm.embed.commit as commit

    path, out = cells(tmp_path / "a.h5ad", 6), tmp_path / "out"
    taken = []

    def take_over(point: str) -> None:
        if point == "before_manifest" and not taken:
            taken.append(point)
            array = out / "part-00000.npy"
            other = np.load(array) + 1
            shutil.move(array, tmp_path / "ours.npy")
            np.save(array, other)

    monkeypatch.setattr(commit, "crash_point", take_over)
    embed_to_folder([path], tiny_model, out)
    assert verify_store(out).ok
    np.testing.assert_array_equal(np.load(out / "part-00000.npy"), np.load(tmp_path / "ours.npy"))
