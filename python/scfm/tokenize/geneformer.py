"""Geneformer's rank-value encoding: each cell becomes its genes, most distinctively expressed first.

    value = count / library_size * 10,000 / gene_median;   tokens = genes by descending value

Exactly the authors' arithmetic and rules (which columns count, what is summed, what is truncated), straight
from blocks of CSR counts in native code. Ties, which the original leaves to an unstable sort, are broken by
column order. Source: Theodoris et al. 2023 and the released TranscriptomeTokenizer's behaviour.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from scfm import _native
from scfm.data.coverage import CoverageReport
from scfm.data.csr import CsrBlock
from scfm.data.gene_mapping import map_genes
from scfm.data.packed import PackedCells, concatenate
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.errors import BadCellError, ConfigError, InvalidArgumentError, ScfmWarning
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.gene_plan import GenePlan, plan_genes

MAX_TOKENS = {"V1": 2048, "V2": 4096}
_NO_TOKEN = -1


@dataclass
class TokenizeReport:
    """What happened to one source's cells and genes.

    num_empty: cells without any known gene; num_filtered: cells left out by obs["filter_pass"];
    num_truncated: cells with more genes than fit; num_tokens: of all cells, special tokens included.
    """

    source: str
    counts_from: str
    library_size_from: str
    coverage: CoverageReport
    num_cells: int = 0
    num_empty: int = 0
    num_filtered: int = 0
    num_truncated: int = 0
    num_tokens: int = 0
    num_stored_zeros: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.num_cells:,} cells, counts from {self.counts_from}, "
            f"library size from {self.library_size_from}",
            str(self.coverage),
            f"{self.num_tokens:,} tokens; {self.num_truncated:,} cells truncated, {self.num_empty:,} without "
            f"a known gene, {self.num_filtered:,} left out by filter_pass",
        ]
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if key not in ("coverage", "notes")}
        return {**plain, "coverage": self.coverage.to_dict(), "notes": list(self.notes)}


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


class GeneformerTokenizer:
    """Rank-value tokenizer of one set of dictionaries.

    vocab: token, median and mapping dictionaries; max_tokens: including special tokens, default 2,048 (V1) or
    4,096 (V2); species: "human", or "mouse" through one-to-one orthologues. ``report`` tells about the last
    source tokenized.
    """

    def __init__(
        self,
        vocab: GeneformerDictionaries,
        *,
        max_tokens: int | None = None,
        species: str = "human",
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
        self.report: TokenizeReport | None = None
        self._prefix = vocab.token.get("<cls>", _NO_TOKEN) if vocab.version == "V2" else _NO_TOKEN
        self._suffix = vocab.token.get("<eos>", _NO_TOKEN) if vocab.version == "V2" else _NO_TOKEN
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

    def __call__(
        self,
        data: Any,
        *,
        layer: str | None = None,
        assume_counts: bool = False,
        species: str | None = None,
    ) -> PackedCells:
        """Tokens of all cells of ``data`` (AnnData, path or CellSource; raw counts).

        Cells without any known gene, and those with obs["filter_pass"] other than 1, are left out:
        ``cell_ids`` names the rows that stayed.
        """
        source = read(data, layer=layer, assume_counts=assume_counts)
        return concatenate(list(self.packs(source, species=species)))

    def packs(
        self,
        source: CellSource,
        *,
        species: str | None = None,
        use_filter_pass: bool = True,
        empty_bad_cells: bool = False,
        block_size: int = 4096,
    ) -> Iterator[PackedCells]:
        """The source's cells, block by block, in constant memory; ``report`` grows as blocks pass.

        empty_bad_cells: cells with impossible counts are left out with a warning instead of an error.
        """
        mapping = map_genes(
            source.genes,
            known=self.vocab.mapping,
            vocabulary=self._gene_vocabulary,
            symbols=self.vocab.names,
            species=species or self.species,
            rules=self.options.gene_rules,
        )
        plan = plan_genes(mapping, self.vocab, sum_duplicates=self.options.duplicate_genes == "sum")
        library_size, origin = library_size_of(source)
        report = TokenizeReport(source.name, source.counts_from, origin, mapping.coverage())
        self.report = report
        report.notes += [*mapping.notes, *_plan_notes(plan)]
        keep = filter_pass_of(source) if use_filter_pass else None
        for block in source.blocks(block_size, empty_bad_cells=empty_bad_cells):
            yield self._tokenize(block, plan, library_size, keep, source.dense, report)
        report.num_stored_zeros = source.report.num_zeros
        self._warn(report)

    def _tokenize(
        self,
        block: CsrBlock,
        plan: GenePlan,
        library_size: np.ndarray | None,
        keep: np.ndarray | None,
        dense: bool,
        report: TokenizeReport,
    ) -> PackedCells:
        rows = slice(block.row_start, block.row_start + block.num_cells)
        if library_size is None:
            sizes = _native.row_sums(block.indptr, block.data)
        else:
            sizes = library_size[rows]
        single = sizes.dtype == np.float32 and np.result_type(block.data.dtype, np.float32) == np.float32
        result = _native.rank_value(
            block.indptr,
            block.indices,
            block.data,
            np.ascontiguousarray(sizes, dtype=np.float64),
            plan.column_slot,
            plan.slot_token,
            plan.slot_median,
            plan.num_single,
            ("divide" if dense else "multiply") + ("32" if single else "64"),
            self.options.stored_zeros == "keep",
            self.max_tokens,
            self._prefix,
            self._suffix,
            self.options.keep_counts,
        )
        _check_library_size(sizes, result.total_counts, block, report.source)
        report.coverage.add_counts(float(result.mapped_counts.sum()), float(result.total_counts.sum()))
        packed = PackedCells(
            token_ids=torch.from_numpy(result.token_ids),
            values=None if result.counts is None else torch.from_numpy(result.counts.astype(np.float32)),
            cu_seqlens=torch.from_numpy(result.cu_seqlens.astype(np.int32)),
            cell_ids=torch.arange(rows.start, rows.stop, dtype=torch.int64),
        )
        chosen = result.num_gene_tokens > 0
        report.num_cells += block.num_cells
        report.num_empty += int((~chosen).sum())
        if keep is not None:
            report.num_filtered += int((chosen & ~keep[rows]).sum())
            chosen = chosen & keep[rows]
        kept = packed if chosen.all() else packed.select(np.flatnonzero(chosen))
        capacity = self.max_tokens - (self._prefix >= 0) - (self._suffix >= 0)
        report.num_truncated += int((result.num_gene_tokens[chosen] > capacity).sum())
        report.num_tokens += kept.num_tokens
        return kept

    def _warn(self, report: TokenizeReport) -> None:
        if report.num_stored_zeros and self.options.stored_zeros == "keep":
            report.notes.append(
                f"{report.num_stored_zeros:,} explicitly stored zeros; those of known genes became tokens, "
                'ranked last, as in the original; stored_zeros="drop" leaves them out'
            )
        if report.num_filtered:
            report.notes.append(f"{report.num_filtered:,} cells were left out by obs['filter_pass']")
        if report.coverage.share_of_counts is not None and report.coverage.share_of_counts < 0.5:
            report.notes.append(f"only {report.coverage.share_of_counts:.1%} of counts were mapped")
        for note in report.notes:
            warnings.warn(f"{report.source}: {note}", ScfmWarning, stacklevel=3)

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
    if "n_counts" not in source.obs.columns:
        return None, "row sums"
    column = source.obs["n_counts"].to_numpy()
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


def filter_pass_of(source: CellSource) -> np.ndarray | None:
    """bool (cells,): obs["filter_pass"] == 1, the authors' switch for cells; None without the column."""
    if "filter_pass" not in source.obs.columns:
        return None
    column = source.obs["filter_pass"]
    if not (pd.api.types.is_bool_dtype(column) or pd.api.types.is_numeric_dtype(column)):
        raise InvalidArgumentError(
            f"dtype {column.dtype}; expected numbers, 1 for the cells to keep",
            where="obs['filter_pass']",
            hint="Make it numeric, or drop it to keep every cell.",
        )
    return np.asarray(column == 1, dtype=bool)


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
