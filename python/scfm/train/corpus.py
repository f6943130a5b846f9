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
from scfm.data.source_list import SourceList
from scfm.errors import ConfigError
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.geneformer import GeneformerTokenizer, filter_pass_of, library_size_of
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
    source = SourceList([read(item, layer=config.layer) for item in config.data])
    held_out = held_out_cells(np.arange(len(source)), config.held_out_fraction, config.seed)
    if config.dictionaries is not None:
        vocab = GeneformerDictionaries.from_files(config.dictionaries)
    else:
        joined = held_out[source.place_of(np.arange(len(source)))]
        vocab = build_dictionaries(
            source.parts,
            version="V2" if config.special_tokens else "V1",
            species=config.species,
            held_out=np.split(joined, np.cumsum([len(part) for part in source.parts])[:-1]),
        )
    tokenizer = GeneformerTokenizer(vocab, max_tokens=config.max_tokens, species=config.species)
    everything = concatenate(list(tokenizer.packs(source)))
    kept_out = torch.from_numpy(held_out)[everything.cell_ids]
    if not everything.num_cells or bool(kept_out.all()):
        raise ConfigError(f"no cell is left to train on of {len(source)}", where="data")
    return Corpus(everything.select(~kept_out), everything.select(kept_out), tokenizer)


def build_dictionaries(
    sources: Sequence[CellSource],
    *,
    version: str,
    species: str = "human",
    held_out: Sequence[np.ndarray] | None = None,
) -> GeneformerDictionaries:
    """Fresh dictionaries: every gene that some training cell expresses, with its median over the corpus.

    held_out: for each source bool (cells,), cells that neither vocabulary nor medians may see.
    """
    symbol_of = {gene: symbol for symbol, genes in human_symbols().items() for gene in genes}
    vocabulary = sorted({*symbol_of, *_human_ids(sources)})
    number = {gene: i for i, gene in enumerate(vocabulary)}
    identity = {gene: gene for gene in vocabulary}
    collected = GeneMedians(len(vocabulary))
    for i, source in enumerate(sources):
        mapping = map_genes(source.genes, known=identity, vocabulary=vocabulary, species=species)
        column_gene = _column_gene(mapping, number)
        rows = _training_rows(source, None if held_out is None else held_out[i])
        library_size, _ = library_size_of(source)
        for block in source.blocks():
            span = slice(block.row_start, block.row_start + block.num_cells)
            collected.add(
                block,
                column_gene,
                library_size=None if library_size is None else library_size[span],
                rows=rows[span],
                sum_columns=mapping.collapse,
            )
    medians = collected.medians()
    genes = [gene for gene, median in zip(vocabulary, medians, strict=True) if median > 0]
    if not genes:
        raise ConfigError("no training cell expresses a known gene", where="data")
    return GeneformerDictionaries.from_vocabulary(
        genes,
        {gene: float(medians[number[gene]]) for gene in genes},
        version=version,
        symbols={symbol_of[gene]: gene for gene in genes if gene in symbol_of},
    )


def _training_rows(source: CellSource, held_out: np.ndarray | None) -> np.ndarray:
    keep = filter_pass_of(source)
    rows = np.ones(len(source), dtype=bool) if keep is None else keep
    return rows if held_out is None else rows & ~held_out


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
