"""The tokenizer of a corpus: with the vocabulary that the settings name, or with one made from the training cells.

A vocabulary that is made holds every gene that some training cell expresses: Ensembl ids with their medians for
Geneformer, symbols in alphabetical order for the others. Genes are those of the package's table of human genes, however
the files write them, so that files of different origin share their tokens. Held-out cells are never looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.csr import CsrBlock
from scfm.data.gene_identifiers import GeneTable
from scfm.data.gene_mapping import GeneMapping, map_genes
from scfm.data.gene_tables import human_symbols
from scfm.data.source import CellSource
from scfm.errors import ConfigError, GeneMappingError
from scfm.models.scgpt.config import ScgptConfig
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.geneformer import GeneformerTokenizer, filter_pass_of, library_size_of
from scfm.tokenize.planned_genes import PlannedGenes
from scfm.tokenize.scbert import ScbertTokenizer
from scfm.tokenize.scbert_panel import ScbertPanel
from scfm.tokenize.scfoundation import ScfoundationTokenizer
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.tokenize.scgpt import ScgptTokenizer
from scfm.tokenize.scgpt_vocab import ScgptVocab
from scfm.tokenize.symbol_genes import map_symbols
from scfm.train.config import PretrainConfig
from scfm.train.corpus.gene_medians import GeneMedians

__all__ = [
    "Vocabulary",
    "build_dictionaries",
    "expressed_symbols",
    "given_vocabulary",
    "made_vocabulary",
    "read_vocabulary",
    "tokenizer_of",
    "vocabulary_text",
]

Vocabulary = GeneformerDictionaries | ScgptVocab | ScbertPanel | ScfoundationGenes
Watch = Callable[[], None]
_GIVE_GENES = "Give ``genes``, a file with the genes as these data call them."


def _unwatched() -> None:
    return None


def given_vocabulary(config: PretrainConfig) -> Vocabulary | None:
    """The one that the settings name a file of; None where it is to be made."""
    if config.family == "geneformer":
        return None if config.dictionaries is None else GeneformerDictionaries.from_files(config.dictionaries)
    if config.genes is None:
        return None
    path = Path(config.genes)
    if config.family == "scgpt":
        return ScgptVocab.from_file(path)
    return ScbertPanel.from_file(path) if config.family == "scbert" else ScfoundationGenes.from_file(path)


def made_vocabulary(
    config: PretrainConfig,
    parts: Sequence[CellSource],
    held_out: Sequence[NDArray[np.bool_]],
    watch: Watch = _unwatched,
) -> Vocabulary:
    """From the training cells. held_out: bool (cells,) of each part; watch: called now and then meanwhile."""
    if config.family == "geneformer":
        version = "V2" if config.special_tokens else "V1"
        return build_dictionaries(
            parts, version=version, species=config.species, held_out=held_out, watch=watch
        )
    symbols = expressed_symbols(parts, held_out=held_out, species=config.species, watch=watch)
    if config.family == "scgpt":
        return ScgptVocab.from_dict({symbol: i for i, symbol in enumerate(symbols)})
    return ScbertPanel(symbols) if config.family == "scbert" else ScfoundationGenes.of(symbols)


def tokenizer_of(config: PretrainConfig, vocab: Vocabulary, *, is_made: bool) -> Any:
    """The family's tokenizer with the settings of the run. is_made: the vocabulary was made from the corpus."""
    # With authors' symbols their own rule counts; with ours, genes are also found by Ensembl id, as they were when the
    # vocabulary was made.
    rules: Literal["all", "auto"] = "all" if is_made else "auto"
    if isinstance(vocab, GeneformerDictionaries):
        return GeneformerTokenizer(vocab, max_tokens=config.max_tokens, species=config.species)
    if isinstance(vocab, ScgptVocab):
        shape = ScgptConfig(**{**config.model_fields(), "vocab_size": vocab.size})
        return ScgptTokenizer(
            vocab,
            max_tokens=shape.max_tokens,
            num_bins=shape.num_bins,
            binning="pretrain",
            input_style=shape.input_style,
            cls_value=shape.pad_value,
            gene_rules=rules,
            species=config.species,
            seed=config.seed,
        )
    if isinstance(vocab, ScbertPanel):
        return ScbertTokenizer(vocab, gene_rules=rules, species=config.species)
    return ScfoundationTokenizer(vocab, species=config.species, gene_rules=rules)


def vocabulary_text(vocab: Vocabulary) -> str:
    """All of it, exactly, as ``read_vocabulary`` takes it."""
    if isinstance(vocab, GeneformerDictionaries):
        return vocab.to_json()
    if isinstance(vocab, ScgptVocab):
        return json.dumps(vocab.token, ensure_ascii=False, indent=0) + "\n"
    return "\n".join(vocab.genes) + "\n"


def read_vocabulary(family: str, path: Path) -> Vocabulary:
    """What was written of ``vocabulary_text``. Raises FormatError."""
    if family == "geneformer":
        return GeneformerDictionaries.from_json(path.read_text(encoding="utf-8"), source=str(path))
    if family == "scgpt":
        return ScgptVocab.from_file(path)
    return ScbertPanel.from_file(path) if family == "scbert" else ScfoundationGenes.from_file(path)


def build_dictionaries(
    sources: Sequence[CellSource],
    *,
    version: str,
    species: str = "human",
    held_out: Sequence[NDArray[np.bool_]] | None = None,
    watch: Watch = _unwatched,
) -> GeneformerDictionaries:
    """Fresh dictionaries: every gene that some training cell expresses, with its median over the corpus.

    held_out: for each source bool (cells,), cells that neither vocabulary nor medians may see.
    """
    symbol_of = {gene: symbol for symbol, genes in human_symbols().items() for gene in genes}
    vocabulary = sorted({*symbol_of, *_human_ids(sources)})
    number = {gene: i for i, gene in enumerate(vocabulary)}
    identity = {gene: gene for gene in vocabulary}
    collected = GeneMedians(len(vocabulary))

    def plan(genes: pd.DataFrame, species: str) -> tuple[GeneMapping, NDArray[np.int32]]:
        mapping = map_genes(genes, known=identity, vocabulary=vocabulary, species=species)
        return mapping, _column_gene(mapping, number)

    planned = PlannedGenes(plan)
    for i, source in enumerate(sources):
        if not len(source):
            continue
        mapping, column_gene = planned.of(source.genes, species)
        rows = _training_rows(source, None if held_out is None else held_out[i])
        library_size, _ = library_size_of(source)
        for block in source.blocks(source.comfortable_block_size):
            span = slice(block.row_start, block.row_start + block.num_cells)
            collected.add(
                block,
                column_gene,
                library_size=None if library_size is None else library_size[span],
                rows=rows[span],
                sum_columns=mapping.collapse,
            )
            watch()
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


def expressed_symbols(
    sources: Sequence[CellSource],
    *,
    held_out: Sequence[NDArray[np.bool_]],
    species: str = "human",
    watch: Watch = _unwatched,
) -> list[str]:
    """Symbols of the human genes that some training cell expresses, in alphabetical order."""
    candidates = {symbol: i for i, symbol in enumerate(human_symbols())}
    expressed: set[str] = set()
    planned = PlannedGenes(
        lambda genes, species: (map_symbols(genes, candidates, rules="all", species=species), None)
    )
    for source, out in zip(sources, held_out, strict=True):
        if not len(source):
            continue
        try:
            mapping, _ = planned.of(source.genes, species)
        except GeneMappingError as error:
            hint = f"{error.hint} Or: {_GIVE_GENES}" if error.hint else _GIVE_GENES
            raise GeneMappingError(error.message, path=source.name, where=error.where, hint=hint) from error
        rows = _training_rows(source, out)
        seen = np.zeros(len(mapping.ids), dtype=bool)
        for block in source.blocks(source.comfortable_block_size):
            seen[_expressed_columns(block, rows)] = True
            watch()
        expressed |= {gene for gene, here in zip(mapping.ids, seen, strict=True) if here and gene is not None}
    if not expressed:
        raise ConfigError("no training cell expresses a known gene", where="data", hint=_GIVE_GENES)
    return sorted(expressed)


def _expressed_columns(block: CsrBlock, rows: NDArray[np.bool_]) -> NDArray[Any]:
    here = rows[block.row_start : block.row_start + block.num_cells]
    expressed = block.data != 0
    if not here.all():
        expressed &= np.repeat(here, np.diff(block.indptr))
    columns: NDArray[Any] = block.indices[expressed]
    return columns


def _training_rows(source: CellSource, held_out: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    keep = filter_pass_of(source)
    rows = np.ones(len(source), dtype=bool) if keep is None else keep
    return rows if held_out is None else rows & ~held_out


def _human_ids(sources: Sequence[CellSource]) -> set[str]:
    """Every human Ensembl id that the sources write down: genes without a symbol are in no symbol table."""
    found: set[str] = set()
    last: pd.DataFrame | None = None
    for source in sources:
        # The files of an atlas mostly share one table, and looking through it takes longer than comparing it.
        if last is not None and last.equals(source.genes):
            continue
        last = source.genes
        for column in GeneTable(last).ensembl:
            found.update(gene for gene in column.ensembl if gene is not None and gene.startswith("ENSG"))
    return found


def _column_gene(mapping: GeneMapping, number: dict[str, int]) -> NDArray[np.int32]:
    return np.fromiter(
        (-1 if gene is None else number[gene] for gene in mapping.ids), dtype=np.int32, count=len(mapping.ids)
    )
