"""Tokens identical to the authors' own tokenizer on all its fixture files, V1 and V2."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import scfm
from scfm import _native

FILES = [
    "real_f32.h5ad",
    "real_ncf32.h5ad",
    "dense.h5ad",
    "edge.h5ad",
    "collapse.h5ad",
    "identical_dups.h5ad",
    "nb_ties.h5ad",
    "loom.loom",
]


def expected(folder: Path, stem: str, version: str) -> dict[str, np.ndarray]:
    stable = folder / f"{stem}.{version}.stable.npz"
    return dict(np.load(stable if stable.exists() else folder / f"{stem}.{version}.orig.npz"))


def tokens_of(data: object, version: str, dictionaries: Path) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = scfm.GeneformerTokenizer.from_dictionaries(dictionaries, version=version)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scfm.ScfmWarning)
        packed = tokenizer(data)
    return packed.token_ids.numpy(), packed.cu_seqlens.numpy()


@pytest.mark.golden
@pytest.mark.parametrize("version", ["V1", "V2"])
@pytest.mark.parametrize("name", FILES)
def test_tokens_are_the_authors(goldens, name: str, version: str) -> None:
    folder = goldens("geneformer/tokenizer")
    tokens, offsets = tokens_of(folder / name, version, goldens("geneformer/dict_pkl"))
    want = expected(folder, name.split(".")[0], version)
    np.testing.assert_array_equal(offsets, want["offsets"])
    np.testing.assert_array_equal(tokens, want["input_ids"].astype(np.int32))


@pytest.mark.golden
@pytest.mark.parametrize("isa", _native.available_isas())
def test_every_instruction_set_gives_them(goldens, isa: str) -> None:
    folder = goldens("geneformer/tokenizer")
    before = _native.active_isa()
    _native.set_isa(isa)
    try:
        for name in ("edge", "nb_ties", "collapse"):
            tokens, _ = tokens_of(folder / f"{name}.h5ad", "V2", goldens("geneformer/dict_pkl"))
            np.testing.assert_array_equal(tokens, expected(folder, name, "V2")["input_ids"].astype(np.int32))
    finally:
        _native.set_isa(before)


@pytest.mark.golden
def test_counts_in_rank_order(goldens) -> None:
    folder = goldens("geneformer/tokenizer")
    tokenizer = scfm.GeneformerTokenizer.from_dictionaries(
        goldens("geneformer/dict_pkl"), version="V2", keep_counts=True
    )
    with pytest.warns(scfm.ScfmWarning):
        packed = tokenizer(folder / "edge.h5ad")
    np.testing.assert_allclose(
        np.sort(packed.values.numpy()), np.sort(expected(folder, "edge", "V2")["counts"]), rtol=1e-6
    )


@pytest.mark.golden
@pytest.mark.parametrize("name", ["edge", "real_ncf32", "nb_ties"])
def test_memory_file_order_and_selection_agree(goldens, name: str) -> None:
    """Row order, block boundaries and where the data lies never change a cell's tokens."""
    folder, dictionaries = goldens("geneformer/tokenizer"), goldens("geneformer/dict_pkl")
    adata = ad.read_h5ad(folder / f"{name}.h5ad")
    from_file, _offsets = tokens_of(folder / f"{name}.h5ad", "V2", dictionaries)
    in_memory, _ = tokens_of(adata, "V2", dictionaries)
    np.testing.assert_array_equal(from_file, in_memory)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    tokenizer = scfm.GeneformerTokenizer.from_dictionaries(dictionaries, version="V2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scfm.ScfmWarning)
        straight = tokenizer(adata)
        shuffled = tokenizer(adata[order])
        blocks = list(tokenizer.packs(scfm.read(adata), block_size=7))
    by_row = dict(zip(straight.cell_ids.tolist(), straight.to_lists(), strict=True))
    for row, cell in zip(shuffled.cell_ids.tolist(), shuffled.to_lists(), strict=True):
        assert cell == by_row[int(order[row])]
    assert [cell for block in blocks for cell in block.to_lists()] == straight.to_lists()
