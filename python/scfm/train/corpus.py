"""A pretraining corpus: sources to a vocabulary with medians, and to tokens split into training and held-out.

Which cells are held out depends on (seed, source, row) only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scfm.data.gene_identifiers import GeneTable
from scfm.data.gene_mapping import GeneMapping, map_genes
from scfm.data.gene_tables import human_symbols
from scfm.data.packed import PackedCells, concatenate
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.errors import ConfigError
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.geneformer import GeneformerTokenizer
from scfm.train.config import PretrainConfig
from scfm.train.gene_medians import GeneMedians

_PURPOSE_HELD_OUT = 1


@dataclass(frozen=True)
class Corpus:
    """Tokenized cells. ``cell_ids`` count through all sources in order."""

    training: PackedCells
    held_out: PackedCells
    tokenizer: GeneformerTokenizer


def read_corpus(config: PretrainConfig) -> Corpus:
    """Tokens of all sources of ``config.data``; raises ConfigError when nothing is left to train on."""
    if not config.data:
        raise ConfigError("no data given", where="data", hint="Name at least one .h5ad file.")
    sources = [read(item, layer=config.layer) for item in config.data]
    if config.dictionaries is not None:
        vocab = GeneformerDictionaries.from_files(config.dictionaries)
    else:
        vocab = build_dictionaries(
            sources, version="V2" if config.special_tokens else "V1", species=config.species
        )
    tokenizer = GeneformerTokenizer(vocab, max_tokens=config.max_tokens, species=config.species)
    packs, first = [], 0
    for source in sources:
        for pack in tokenizer.packs(source):
            packs.append(PackedCells(pack.token_ids, pack.values, pack.cu_seqlens, pack.cell_ids + first))
        first += len(source)
    everything = concatenate(packs)
    held_out = held_out_cells(everything.cell_ids.numpy(), config.held_out_fraction, config.seed)
    if not everything.num_cells or held_out.all():
        raise ConfigError(f"no cell is left to train on of {first}", where="data")
    return Corpus(
        training=everything.select(torch.from_numpy(~held_out)),
        held_out=everything.select(torch.from_numpy(held_out)),
        tokenizer=tokenizer,
    )


def build_dictionaries(
    sources: Sequence[CellSource], *, version: str, species: str = "human"
) -> GeneformerDictionaries:
    """Fresh dictionaries: every gene that some cell expresses, with its median over the corpus."""
    symbol_of = {gene: symbol for symbol, genes in human_symbols().items() for gene in genes}
    vocabulary = sorted({*symbol_of, *_human_ids(sources)})
    number = {gene: i for i, gene in enumerate(vocabulary)}
    identity = {gene: gene for gene in vocabulary}
    collected = GeneMedians(len(vocabulary))
    for source in sources:
        mapping = map_genes(source.genes, known=identity, vocabulary=vocabulary, species=species, rules="all")
        column_gene = _column_gene(mapping, number)
        for block in source.blocks():
            collected.add(block, column_gene)
    medians = collected.medians()
    genes = [gene for gene, median in zip(vocabulary, medians, strict=True) if median > 0]
    return GeneformerDictionaries.from_vocabulary(
        genes,
        {gene: float(medians[number[gene]]) for gene in genes},
        version=version,
        symbols={symbol_of[gene]: gene for gene in genes if gene in symbol_of},
    )


def _human_ids(sources: Sequence[CellSource]) -> set[str]:
    """Every human Ensembl id that the sources write down: genes without a symbol are in no symbol table."""
    return {
        gene
        for source in sources
        for column in GeneTable(source.genes).ensembl
        for gene in column.ensembl
        if gene is not None and gene.startswith("ENSG")
    }


def held_out_cells(cell_ids: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool (cells,): kept out of training. Keyed by (seed, cell), so it never changes with the company."""
    if fraction == 0:
        return np.zeros(len(cell_ids), dtype=bool)
    return np.fromiter(
        (keyed_uniform(seed, _PURPOSE_HELD_OUT, int(cell)) < fraction for cell in cell_ids),
        dtype=bool,
        count=len(cell_ids),
    )


def keyed_uniform(seed: int, purpose: int, item: int) -> float:
    """A uniform number in [0, 1) that depends on its three keys only."""
    generator = np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[item, 0, 0, 0]))
    return float(generator.random())


def _column_gene(mapping: GeneMapping, number: dict[str, int]) -> np.ndarray:
    return np.fromiter(
        (-1 if gene is None else number[gene] for gene in mapping.ids), dtype=np.int32, count=len(mapping.ids)
    )
