"""From an .h5ad file on disk to packed rank tokens: reading, checking and ranking, overlapped.

    pytest benches/bench_tokens_from_disk.py --benchmark-only -s

The files of ``bench_read``; a dictionary that knows every generated gene, so a cell becomes as many tokens as it has
non-zeros. Beside each rate stands what the same machine would reach if reading and ranking, each measured alone in the
same run with all threads, shared its cores without any loss.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

import scfm
from bench_read import FILES, ORDERS, blocks, path_of
from generated_cells import Recipe, gene_means, standard_recipe
from rates import measure, note

AIMS = {"gzip": 55_000, "plain": 110_000}
RANKED_IN_MEMORY = 8192
# What others publish for tokenized cells from disk, the best of them (their own machine and format).
PUBLISHED_TOKENIZED = 7_500


def tokenizer_for(recipe: Recipe) -> Any:
    from scfm.tokenize.dictionaries import GeneformerDictionaries

    noise = np.random.default_rng(3).normal(0.0, 0.5, recipe.num_genes)
    medians = gene_means(recipe) * np.exp(noise) + 0.05
    by_gene = dict(zip(recipe.genes, medians.tolist(), strict=True))
    return scfm.GeneformerTokenizer(GeneformerDictionaries.from_vocabulary(recipe.genes, by_gene, "V2"))


@cache
def tokenizer() -> Any:
    return tokenizer_for(standard_recipe())


def packs(source: Any, order: str) -> Iterator[scfm.PackedCells]:
    if order == "sequential":
        yield from tokenizer().packs(source)
    else:
        for _, packed in tokenizer().shuffled_packs(source, seed=0):
            yield packed


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("file", FILES)
def bench_tokens(benchmark: Any, file: str, order: str) -> None:
    source = scfm.read(path_of(file))
    _assert_same_tokens(source, order)
    tokens: list[int] = []

    def batches() -> Iterator[int]:
        tokens.append(0)
        for packed in packs(source, order):
            tokens[-1] += packed.num_tokens
            yield packed.num_cells

    rate = measure(benchmark, file, f"scfm {order}, tokens", batches, reader=source.reader)
    no_loss = 1 / (1 / _reading_alone(source, order) + 1 / _ranking_alone(source))
    note(
        benchmark,
        tokens_per_second=rate * tokens[-1] / len(source),
        tokens_per_cell=tokens[-1] / len(source),
        share_of_reading_and_ranking_without_loss=rate / no_loss,
        share_of_aim=rate / AIMS[file],
        times_best_published=rate / PUBLISHED_TOKENIZED,
    )


def _reading_alone(source: Any, order: str) -> float:
    start = time.perf_counter()
    for _ in blocks(source, order):
        pass
    return len(source) / (time.perf_counter() - start)


@cache
def _cells_in_memory() -> Any:
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    recipe = standard_recipe()
    source = scfm.read(path_of("plain")).select(range(min(RANKED_IN_MEMORY, recipe.num_cells)))
    (block,) = source.blocks(len(source))
    shape = (block.num_cells, block.num_genes)
    counts = sp.csr_matrix((block.data, block.indices, block.indptr), shape=shape)
    return ad.AnnData(counts, var=pd.DataFrame(index=recipe.genes))


def _ranking_alone(source: Any) -> float:
    """Of cells that are in memory already, with every check."""
    in_memory = scfm.read(_cells_in_memory())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in tokenizer().packs(in_memory):
            pass
        times.append(time.perf_counter() - start)
    return len(in_memory) / statistics.median(times)


def _assert_same_tokens(source: Any, order: str) -> None:
    """The first cells that come must have the tokens that they have when read into memory by themselves."""
    packed = next(packs(source, order))
    some = packed.select(range(0, packed.num_cells, 37))
    alone = tokenizer()(source.select(some.cell_ids.numpy()))
    assert alone.num_cells == some.num_cells
    np.testing.assert_array_equal(alone.token_ids.numpy(), some.token_ids.numpy())
    np.testing.assert_array_equal(alone.cu_seqlens.numpy(), some.cu_seqlens.numpy())
