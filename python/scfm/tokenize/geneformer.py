"""Geneformer's rank-value encoding: each cell becomes its genes, most distinctively expressed first.

    value = count / library_size * 10,000 / gene_median;   tokens = genes by descending value

Exactly the authors' arithmetic and rules (which columns count, what is summed, what is truncated), straight
from blocks of CSR counts in native code. Ties, which the original leaves to an unstable sort, are broken by
column order. Source: Theodoris et al. 2023 and the released TranscriptomeTokenizer's behaviour.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from scfm import _native
from scfm.data.csr import CsrBlock
from scfm.data.gene_mapping import GeneMapping, map_genes
from scfm.data.packed import PackedCells
from scfm.data.source import CellSource
from scfm.data.windows import Piece
from scfm.errors import BadCellError, ConfigError, InvalidArgumentError
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.gene_plan import GenePlan, plan_genes
from scfm.tokenize.planned_genes import PlannedGenes
from scfm.tokenize.rank_on_device import RankOnDevice
from scfm.tokenize.report import TokenizeReport
from scfm.tokenize.source_tokenizer import Part, SourceTokenizer, add_cells, filter_pass_of

__all__ = ["MAX_TOKENS", "GeneformerTokenizer", "TokenizerOptions", "filter_pass_of", "library_size_of"]

MAX_TOKENS = {"V1": 2048, "V2": 4096}
_NO_TOKEN = -1


@dataclass(frozen=True)
class TokenizerOptions:
    """How GeneformerTokenizer departs from the authors' rules; the defaults do not.

    stored_zeros: "keep" makes explicitly stored zeros tokens, ranked last, as the original does for sparse
    input; "drop" treats them as not expressed. duplicate_genes: "repeat" gives a gene whose identifier stands
    twice two tokens; "sum" adds the columns. gene_rules: see scfm.data.gene_mapping. keep_counts: also return
    CP10k values in rank order.
    """

    stored_zeros: Literal["keep", "drop"] = "keep"
    duplicate_genes: Literal["repeat", "sum"] = "repeat"
    gene_rules: Literal["auto", "authors", "all"] = "auto"
    keep_counts: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "stored_zeros": ("keep", "drop"),
            "duplicate_genes": ("repeat", "sum"),
            "gene_rules": ("auto", "authors", "all"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InvalidArgumentError(f"{getattr(self, name)!r}; expected one of {values}", where=name)


@dataclass(frozen=True)
class _Plan:
    """What is worked out once for one part of a source. library_size: None for the row sums."""

    genes: GenePlan
    library_size: np.ndarray | None
    dense: bool


class GeneformerTokenizer(SourceTokenizer[_Plan]):
    """Rank-value tokenizer of one set of dictionaries.

    vocab: token, median and mapping dictionaries; max_tokens: including special tokens, default 2,048 (V1) or
    4,096 (V2); species: "human", or "mouse" through one-to-one orthologues; device: a GPU that ranks the genes
    instead of the CPU, with the same tokens. ``report`` tells about the last source tokenized.
    """

    def __init__(
        self,
        vocab: GeneformerDictionaries,
        *,
        max_tokens: int | None = None,
        species: str = "human",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        if not vocab.median:
            raise ConfigError(
                "no gene medians, without which genes cannot be ranked",
                path=vocab.source,
                hint="Put gene_median_dictionary*.pkl (or .json) beside the token dictionary.",
            )
        self.vocab = vocab
        self.max_tokens = MAX_TOKENS[vocab.version] if max_tokens is None else max_tokens
        self.species = species
        self.options = TokenizerOptions(**options)
        on_cpu = device is None or torch.device(device).type == "cpu"
        self._rank_on_device = None if device is None or on_cpu else RankOnDevice(device)
        self.report = None
        self._prefix = vocab.token.get("<cls>", _NO_TOKEN) if vocab.version == "V2" else _NO_TOKEN
        self._suffix = vocab.token.get("<eos>", _NO_TOKEN) if vocab.version == "V2" else _NO_TOKEN
        self._planned = PlannedGenes(self._map_and_plan)
        self._gene_vocabulary = [gene for gene in vocab.token if not gene.startswith("<")]
        specials = (self._prefix >= 0) + (self._suffix >= 0)
        if self.max_tokens <= specials:
            raise InvalidArgumentError(f"{max_tokens}; expected more than {specials}", where="max_tokens")

    @classmethod
    def from_dictionaries(
        cls, folder: str | Path, version: str | None = None, **options: Any
    ) -> GeneformerTokenizer:
        """From the authors' dictionaries (a folder, or a token-dictionary file): .pkl or .json, any suffix."""
        return cls(GeneformerDictionaries.from_files(folder, version=version), **options)

    def _plan_part(self, source: CellSource, species: str) -> tuple[_Plan, TokenizeReport]:
        mapping, plan = self._planned.of(source.genes, species)
        library_size, origin = library_size_of(source)
        report = TokenizeReport(source.name, source.counts_from, origin, mapping.coverage())
        report.notes += [*mapping.notes, *_plan_notes(plan)]
        return _Plan(plan, library_size, source.dense), report

    def _check_genes_of(self, source: CellSource, species: str) -> None:
        self._planned.of(source.genes, species)

    def _map_and_plan(self, genes: pd.DataFrame, species: str) -> tuple[GeneMapping, GenePlan]:
        mapping = map_genes(
            genes,
            known=self.vocab.mapping,
            vocabulary=self._gene_vocabulary,
            symbols=self.vocab.names,
            species=species,
            rules=self.options.gene_rules,
        )
        return mapping, plan_genes(mapping, self.vocab, sum_duplicates=self.options.duplicate_genes == "sum")

    def _tokenize_piece(self, piece: Piece, part: Part[_Plan], epoch: int) -> tuple[PackedCells, np.ndarray]:
        block, plan = piece.block, part.plan
        if plan.library_size is None:
            sizes = _native.row_sums(block.indptr, block.data)
        else:
            sizes = plan.library_size[piece.cells]
        single = sizes.dtype == np.float32 and np.result_type(block.data.dtype, np.float32) == np.float32
        rank_value = self._rank_on_device or _native.rank_value
        result = rank_value(
            block.indptr,
            block.indices,
            block.data,
            np.ascontiguousarray(sizes, dtype=np.float64),
            plan.genes.column_slot,
            plan.genes.slot_token,
            plan.genes.slot_median,
            plan.genes.num_single,
            ("divide" if plan.dense else "multiply") + ("32" if single else "64"),
            self.options.stored_zeros == "keep",
            self.max_tokens,
            self._prefix,
            self._suffix,
            self.options.keep_counts,
        )
        _check_library_size(sizes, result.total_counts, block, part.reports[0].source)
        chosen = add_cells(
            part,
            np.diff(result.cu_seqlens),
            result.num_gene_tokens,
            self.max_tokens - (self._prefix >= 0) - (self._suffix >= 0),
            piece.cells,
            result.mapped_counts,
            result.total_counts,
        )
        packed = PackedCells(
            token_ids=torch.from_numpy(result.token_ids),
            values=None if result.counts is None else torch.from_numpy(result.counts.astype(np.float32)),
            cu_seqlens=torch.from_numpy(result.cu_seqlens.astype(np.int32)),
            cell_ids=torch.from_numpy(piece.cells),
        )
        return packed, chosen

    def _conclude(self, source: CellSource, part: Part[_Plan]) -> None:
        report = part.reports[0]
        if report.num_stored_zeros and self.options.stored_zeros == "keep":
            report.notes.append(
                f"{report.num_stored_zeros:,} explicitly stored zeros; those of known genes became tokens, "
                'ranked last, as in the original; stored_zeros="drop" leaves them out'
            )

    def describe(self) -> dict[str, Any]:
        """Settings, for provenance."""
        return {
            "name": "geneformer",
            "version": self.vocab.version,
            "max_tokens": self.max_tokens,
            "species": self.species,
            "dictionaries": self.vocab.source,
            **asdict(self.options),
        }


def library_size_of(source: CellSource) -> tuple[np.ndarray | None, str]:
    """obs["n_counts"] as the authors require it; where it is absent, None: the row sums will be used."""
    stored = source.obs_column("n_counts")
    if stored is None:
        return None, "row sums"
    column = stored.to_numpy()
    if not np.issubdtype(column.dtype, np.number) or np.iscomplexobj(column):
        raise BadCellError(
            f"dtype {column.dtype}; expected numbers",
            path=source.name,
            where="obs['n_counts']",
            hint="Drop the column and the row sums are used.",
        )
    bad = np.flatnonzero(~(np.isfinite(column) & (column >= 0)))
    if bad.size:
        raise BadCellError(
            f"{column[bad[0]]} in row {source.rows[bad[0]]} ({bad.size} such rows); expected finite numbers from 0",
            path=source.name,
            where="obs['n_counts']",
            hint="Drop the column and the row sums are used.",
        )
    return column if column.dtype == np.float32 else column.astype(np.float64), "obs['n_counts']"


def _check_library_size(sizes: np.ndarray, totals: np.ndarray, block: CsrBlock, name: str) -> None:
    """A library size of 0 in a cell with counts would make every value infinite and the ranks arbitrary."""
    wrong = np.flatnonzero((sizes == 0) & (totals > 0))
    if wrong.size:
        raise BadCellError(
            f"is 0 while the cell has {totals[wrong[0]]:g} counts ({wrong.size} such cells in this block)",
            path=name,
            where=f"obs['n_counts'], row {block.rows[wrong[0]]}",
            hint="Drop the column and the row sums are used.",
        )


def _plan_notes(plan: GenePlan) -> list[str]:
    notes = []
    if plan.num_repeated:
        notes.append(
            f"{plan.num_repeated} columns bear the identifier of another column; each gives its own token, as "
            'in the original; duplicate_genes="sum" adds them'
        )
    if plan.num_without_median:
        notes.append(f"{plan.num_without_median} columns map to genes without a median and were left out")
    return notes
