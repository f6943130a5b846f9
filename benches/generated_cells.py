"""Cells made from a seed, and .h5ad files of them laid out exactly as anndata lays them out.

Counts are negative binomial, NB(mean of the gene, r = 2), gene means log-normal: 20,000 genes of which a cell has 1,945
non-zeros and two thirds of those are 1. Drawing all 20,000 of each cell would take minutes, so only non-zeros are
drawn, and still from exactly that distribution:

    which genes: unit-rate points on a line where gene g owns -log P(count of g = 0); a gene that is hit has a count
    how many:    NB(2) is the sum of two geometrics; given that it is not 0, it is 1 + Geo + Bernoulli(1 / (1 + p)) Geo

Files lie in $SCFM_BENCH_FILES (default build/bench_files), named by a hash of their recipe, and are made once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Changed whenever the same recipe would give other bytes.
_GENERATOR = 1
_GRID = 1 << 22
_CELLS_AT_ONCE = 4096


@dataclass(frozen=True)
class Recipe:
    """What determines the counts; ``repeats`` tiles the cells, so that a huge file costs little to make."""

    num_cells: int = 100_000
    num_genes: int = 20_000
    nonzeros_per_cell: float = 1945.7
    log_sigma: float = 2.1
    seed: int = 2026
    repeats: int = 1

    @property
    def genes(self) -> list[str]:
        return [f"ENSG{gene:011d}" for gene in range(self.num_genes)]

    def file_name(self, compression: str | None) -> str:
        text = json.dumps([_GENERATOR, asdict(self), compression], sort_keys=True)
        size = f"{self.num_cells * self.repeats}x{self.num_genes}"
        return f"cells-{size}-{compression or 'plain'}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.h5ad"


@dataclass(frozen=True)
class Counts:
    """CSR arrays as anndata stores them: indptr int64, indices int32, data float32."""

    indptr: Array
    indices: Array
    data: Array


def gene_means(recipe: Recipe) -> Array:
    """Log-normal means, scaled until a cell has the wanted number of non-zeros."""
    means = np.exp(np.random.default_rng(recipe.seed).normal(0.0, recipe.log_sigma, recipe.num_genes))
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        nonzeros = np.sum(1 - (1 + means * middle / 2) ** -2.0)
        low, high = (middle, high) if nonzeros < recipe.nonzeros_per_cell else (low, middle)
    return means * low


def make_counts(recipe: Recipe) -> Counts:
    """All cells of the recipe (without its repeats), block by block, each block keyed by its own number."""
    means = gene_means(recipe)
    line = _GeneLine(means)
    lengths, indices, data = [], [], []
    for block, start in enumerate(range(0, recipe.num_cells, _CELLS_AT_ONCE)):
        rng = np.random.default_rng([recipe.seed, 1 + block])
        cells = min(_CELLS_AT_ONCE, recipe.num_cells - start)
        rows, genes = line.draw(rng, cells)
        lengths.append(np.bincount(rows, minlength=cells))
        indices.append(genes)
        data.append(_nonzero_counts(rng, means, genes))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    return Counts(indptr, np.concatenate(indices), np.concatenate(data))


class _GeneLine:
    """The line on which each gene owns a stretch; its ends are rounded to a grid, so that a gene is a lookup."""

    def __init__(self, means: Array) -> None:
        ends = np.cumsum(2 * np.log1p(means / 2))
        self._length = float(ends[-1])
        bounds = np.rint(ends / self._length * _GRID).astype(np.int64)
        self._gene_of_bin = np.repeat(np.arange(len(means), dtype=np.int32), np.diff(bounds, prepend=0))

    def draw(self, rng: np.random.Generator, num_cells: int) -> tuple[Array, Array]:
        """Cells (ascending) and genes (ascending in each cell) that have a count: every pair once."""
        # The cells' lines are laid end to end; sums of exponential gaps are the points, in order.
        expected = num_cells * self._length
        gaps = rng.standard_exponential(int(expected + 8 * expected**0.5 + 100))
        points = np.cumsum(gaps)
        points *= _GRID / self._length
        places = points[: np.searchsorted(points, num_cells * _GRID)].astype(np.int64)
        rows, genes = (places // _GRID).astype(np.int32), self._gene_of_bin[places % _GRID]
        first = np.ones(len(genes), dtype=bool)
        first[1:] = (genes[1:] != genes[:-1]) | (rows[1:] != rows[:-1])
        return rows[first], genes[first]


def _nonzero_counts(rng: np.random.Generator, means: Array, genes: Array) -> Array:
    success = 2 / (means + 2)
    # floor(Exponential * scale) is geometric.
    scale = (-1 / np.log1p(-success)).astype(np.float32)[genes]
    both = (1 / (1 + success)).astype(np.float32)[genes]
    counts = np.floor(rng.standard_exponential(len(genes), dtype=np.float32) * scale)
    second = np.floor(rng.standard_exponential(len(genes), dtype=np.float32) * scale)
    counts += second * (rng.random(len(genes), dtype=np.float32) < both)
    return counts + np.float32(1)


# ---- files ------------------------------------------------------------------------------------------------------


def files_folder() -> Path:
    default = Path(__file__).resolve().parent.parent / "build" / "bench_files"
    folder = Path(os.environ.get("SCFM_BENCH_FILES", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def standard_recipe() -> Recipe:
    """100,000 cells; $SCFM_BENCH_CELLS for a quick look with fewer."""
    return Recipe(num_cells=int(os.environ.get("SCFM_BENCH_CELLS", Recipe.num_cells)))


def h5ad_files(recipe: Recipe, compressions: list[str | None]) -> dict[str | None, Path]:
    """The recipe's file for each compression (None, "gzip", "lzf"), made if it is not there yet."""
    folder = files_folder()
    found = {compression: folder / recipe.file_name(compression) for compression in compressions}
    missing = {compression: path for compression, path in found.items() if not path.exists()}
    if missing:
        counts = make_counts(recipe)
        for compression, path in missing.items():
            partial = path.with_suffix(f".{os.getpid()}.partial")
            write_h5ad(partial, counts, recipe, compression)
            partial.rename(path)
    return found


def write_h5ad(path: Path, counts: Counts, recipe: Recipe, compression: str | None) -> None:
    """What ``AnnData(X, obs, var).write_h5ad(path, compression=...)`` writes, ``recipe.repeats`` times over.

    anndata itself writes everything but X, which is streamed: a file may be larger than memory.
    """
    import anndata as ad
    import pandas as pd

    num_cells = recipe.num_cells * recipe.repeats
    names = pd.Index(np.char.mod("cell%09d", np.arange(num_cells)).astype(object))
    ad.AnnData(obs=pd.DataFrame(index=names), var=pd.DataFrame(index=recipe.genes)).write_h5ad(
        path, compression=compression
    )
    if recipe.repeats > 1:
        counts = _fill_whole_chunks(counts, recipe.repeats)
    lengths = np.tile(np.diff(counts.indptr), recipe.repeats)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs["encoding-type"] = "csr_matrix"
        group.attrs["encoding-version"] = "0.1.0"
        group.attrs["shape"] = (num_cells, recipe.num_genes)
        options = {"maxshape": (None,), "compression": compression}
        for name, values in (("data", counts.data), ("indices", counts.indices)):
            total = len(values) * recipe.repeats
            dataset = group.create_dataset(name, shape=(total,), dtype=values.dtype, **options)
            _write_tiled(dataset, values, recipe.repeats)
        pointers = indptr.astype(np.int64 if indptr[-1] > np.iinfo(np.int32).max else np.int32)
        group.create_dataset("indptr", data=pointers, **options)


def _write_tiled(dataset: h5py.Dataset, values: Array, repeats: int) -> None:
    """Values once through HDF5's own filters; repeats are copies of the stored chunks."""
    chunk = dataset.chunks[0]
    for start, stop in _spans(len(values), 64 * chunk):
        dataset[start:stop] = values[start:stop]
    if repeats == 1:
        return
    dataset.file.flush()
    for start in range(0, len(values), chunk):
        mask, stored = dataset.id.read_direct_chunk((start,))
        for repeat in range(1, repeats):
            dataset.id.write_direct_chunk((repeat * len(values) + start,), stored, mask)


def _fill_whole_chunks(counts: Counts, repeats: int) -> Counts:
    """The last cells cut short until the values fill whole chunks, or the repeats could not share stored chunks.

    h5py halves the length of an array until a chunk is small enough, so 2^k chunks hold all values exactly if the
    number of values and of repeats have enough factors of two.
    """
    kept = len(counts.data) - len(counts.data) % 4096
    if kept == 0 or kept % _chunk_length(kept * repeats):
        raise ValueError(
            f"{kept:,} values do not fill chunks {repeats} times over: repeats must be a power of 2"
        )
    return Counts(np.minimum(counts.indptr, kept), counts.indices[:kept], counts.data[:kept])


def _chunk_length(num_values: int) -> int:
    """What h5py chooses for so many 4-byte values."""
    with h5py.File.in_memory() as scratch:
        return scratch.create_dataset("data", (num_values,), np.float32, maxshape=(None,)).chunks[0]


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)
