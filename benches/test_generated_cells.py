"""The generated files must be what anndata writes, chunk for chunk, or the benches would time another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from generated_cells import Counts, Recipe, gene_means, make_counts, write_h5ad

SMALL = Recipe(num_cells=600, num_genes=3000, nonzeros_per_cell=400.0)


@pytest.fixture(scope="module")
def counts() -> Counts:
    return make_counts(SMALL)


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_layout_is_anndatas(counts: Counts, compression: str | None, tmp_path: Path) -> None:
    names = [f"cell{i:09d}" for i in range(SMALL.num_cells)]
    adata = ad.AnnData(_matrix(counts), pd.DataFrame(index=names), pd.DataFrame(index=SMALL.genes))
    adata.write_h5ad(tmp_path / "theirs.h5ad", compression=compression)
    write_h5ad(tmp_path / "ours.h5ad", counts, SMALL, compression)
    assert _layout(tmp_path / "ours.h5ad") == _layout(tmp_path / "theirs.h5ad")


def test_repeats_are_the_same_cells_again(counts: Counts, tmp_path: Path) -> None:
    recipe = Recipe(SMALL.num_cells, SMALL.num_genes, SMALL.nonzeros_per_cell, repeats=4)
    write_h5ad(tmp_path / "tiled.h5ad", counts, recipe, "gzip")
    tiled = ad.read_h5ad(tmp_path / "tiled.h5ad").X
    once = _matrix(counts)
    assert tiled.shape == (4 * SMALL.num_cells, SMALL.num_genes)
    for repeat in range(4):
        part = tiled[repeat * SMALL.num_cells : (repeat + 1) * SMALL.num_cells]
        # At most 4,095 values are cut off the end.
        assert (part[:580] != once[:580]).nnz == 0
        assert 0 <= once.nnz - part.nnz < 4096


def test_counts_are_negative_binomial_with_the_genes_means(counts: Counts) -> None:
    matrix, means = _matrix(counts), gene_means(SMALL)
    matrix.check_format(full_check=True)
    assert matrix.has_canonical_format
    assert abs(matrix.nnz / SMALL.num_cells - SMALL.nonzeros_per_cell) < 5
    dense = matrix.toarray().astype(np.float64)
    variance = means + means**2 / 2
    # Standardised errors of the 3,000 genes' mean, zero rate and variance: none far out, none biased.
    expected_zeros = (1 + means / 2) ** -2.0
    for error in (
        (dense.mean(0) - means) / np.sqrt(variance / SMALL.num_cells),
        ((dense == 0).mean(0) - expected_zeros)
        / np.sqrt(expected_zeros * (1 - expected_zeros) / SMALL.num_cells),
    ):
        often = error[means * SMALL.num_cells > 100]
        assert np.abs(often).max() < 6
        assert abs(often.mean()) < 0.15
        assert 0.9 < often.std() < 1.1
    large = means > 1
    assert abs(np.median(dense.var(0)[large] / variance[large]) - 1) < 0.1


def _matrix(counts: Counts) -> sp.csr_matrix:
    shape = (SMALL.num_cells, SMALL.num_genes)
    return sp.csr_matrix((counts.data, counts.indices, counts.indptr.astype(np.int32)), shape=shape)


def _layout(path: Path) -> dict[str, Any]:
    """Everything of each object but its place in the file: types, attributes, filters, the stored chunks' bytes."""
    found: dict[str, Any] = {}

    def describe(name: str, node: Any) -> None:
        attributes = {key: (str(value), node.attrs.get_id(key).dtype) for key, value in node.attrs.items()}
        found[name] = [attributes]
        if not isinstance(node, h5py.Dataset):
            return
        plist = node.id.get_create_plist()
        filters = [plist.get_filter(i) for i in range(plist.get_nfilters())]
        found[name] += [node.dtype, node.shape, node.maxshape, node.chunks, filters]
        # LZF's hash table starts uninitialised: the same values may be stored as other bytes.
        if node.chunks and node.dtype != object and node.compression != "lzf":
            stored = [node.id.get_chunk_info(i) for i in range(node.id.get_num_chunks())]
            found[name] += [node.id.read_direct_chunk(chunk.chunk_offset) for chunk in stored]
        else:
            found[name].append(np.asarray(node[()]).tolist())

    with h5py.File(path, "r") as file:
        describe("/", file)
        file.visititems(describe)
    found["format"] = path.read_bytes()[:16]
    return found
