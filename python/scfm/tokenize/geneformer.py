"""Geneformer's rank-value encoding: each cell becomes its genes, most distinctively expressed first.

    value = count / library_size * 10,000 / gene_median;   tokens = genes by descending value

Exactly the authors' arithmetic and rules (which columns count, what is summed, what is truncated), straight
from blocks of CSR counts in native code. Ties, which the original leaves to an unstable sort, are broken by
column order. Source: Theodoris et al. 2023 and the released TranscriptomeTokenizer's behaviour.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from scfm import _native
from scfm.data.csr import CsrBlock
from scfm.data.gene_mapping import GeneMapping, map_genes
from scfm.data.packed import PackedCells, concatenate
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.data.windows import Piece, Window
from scfm.errors import BadCellError, ConfigError, GeneMappingError, InvalidArgumentError, ScfmWarning
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.gene_plan import GenePlan, plan_genes
from scfm.tokenize.planned_genes import PlannedGenes
from scfm.tokenize.report import TokenizeReport, total_of

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
class _Part:
    """What is worked out once for one part of a source. reports: its own, and the list's if it is in one."""

    plan: GenePlan
    library_size: np.ndarray | None
    keep: np.ndarray | None
    dense: bool
    reports: tuple[TokenizeReport, ...]


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
        block_size: int | None = None,
    ) -> Iterator[PackedCells]:
        """The source's cells, block by block, in constant memory; ``report`` grows as blocks pass.

        A list's cells come in its order, each by the genes of its own part. empty_bad_cells: cells with
        impossible counts are left out with a warning instead of an error.
        """
        block_size = source.comfortable_block_size if block_size is None else block_size
        windows = source.windows(block_size, empty_bad_cells=empty_bad_cells)
        for _, packed in self._packs(source, windows, species, use_filter_pass):
            yield packed

    def shuffled_packs(
        self,
        source: CellSource,
        *,
        seed: int,
        epoch: int = 0,
        block_size: int = 64,
        window: int = 4096,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        species: str | None = None,
        use_filter_pass: bool = True,
        empty_bad_cells: bool = False,
    ) -> Iterator[tuple[int, PackedCells]]:
        """One training epoch: (cursor, cells of a window in shuffled order); see ``CellSource.shuffled``.

        The cursor counts cells of the whole order up to the window's end, those without tokens included;
        ``start=cursor`` goes on behind them. A cell's tokens are those of ``packs``. Raises
        InvalidArgumentError.
        """
        shuffled = source.shuffled(
            seed=seed,
            epoch=epoch,
            block_size=block_size,
            window=window,
            start=start,
            rank=rank,
            world_size=world_size,
        )
        windows = shuffled.windows(empty_bad_cells=empty_bad_cells)
        return self._packs(source, windows, species, use_filter_pass)

    def _packs(
        self, source: CellSource, windows: Iterator[Window], species: str | None, use_filter_pass: bool
    ) -> Iterator[tuple[int, PackedCells]]:
        parts = self._plan_parts(source, species or self.species, use_filter_pass)
        for window in windows:
            yield window.cursor, self._tokenize(window, parts)
        for number, part in parts.items():
            own, *total = part.reports
            own.num_stored_zeros = source.parts[number].report.num_zeros
            for report in total:
                report.num_stored_zeros += own.num_stored_zeros
            self._warn(own)

    def _plan_parts(self, source: CellSource, species: str, use_filter_pass: bool) -> dict[int, _Part]:
        """Each part's gene plan, by number; parts of a list from which no cell was taken need none."""
        sources = dict(enumerate(source.parts))
        if len(sources) > 1:
            sources = {number: part for number, part in sources.items() if len(part)}
        planned = {number: self._plan_part(part, species) for number, part in sources.items()}
        own = [report for _, _, report in planned.values()]
        self.report = own[0] if len(source.parts) == 1 else total_of(source.name, own)
        return {
            number: _Part(
                plan,
                library_size,
                filter_pass_of(sources[number]) if use_filter_pass else None,
                sources[number].dense,
                (report,) if report is self.report else (report, self.report),
            )
            for number, (plan, library_size, report) in planned.items()
        }

    def _plan_part(
        self, source: CellSource, species: str
    ) -> tuple[GenePlan, np.ndarray | None, TokenizeReport]:
        mapping, plan = self._genes_of(source, species)
        library_size, origin = library_size_of(source)
        report = TokenizeReport(source.name, source.counts_from, origin, mapping.coverage())
        report.notes += [*mapping.notes, *_plan_notes(plan)]
        return plan, library_size, report

    def check_genes(self, source: CellSource, *, species: str | None = None) -> None:
        """Raise now what ``packs`` would raise about the genes of any part: GeneMappingError naming the file."""
        for part in source.parts:
            self._genes_of(part, species or self.species)

    def _genes_of(self, source: CellSource, species: str) -> tuple[GeneMapping, GenePlan]:
        try:
            return self._planned.of(source.genes, species)
        except GeneMappingError as error:
            if error.path is not None:
                raise
            raise GeneMappingError(
                error.message, path=source.name, where=error.where, hint=error.hint
            ) from error

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

    def _tokenize(self, window: Window, parts: dict[int, _Part]) -> PackedCells:
        """The window's cells in its order, without those that have no token or are filtered out."""
        chosen = np.empty(len(window.cells), dtype=bool)
        packs = []
        for piece in window.pieces:
            packed, keep = self._tokenize_piece(piece, parts[piece.part])
            packs.append(packed)
            chosen[piece.slots] = keep
        packed = concatenate(packs)
        if len(packs) > 1:
            slots = np.concatenate([piece.slots for piece in window.pieces])
            packed = packed.select(np.argsort(slots)[chosen])
        elif not chosen.all():
            packed = packed.select(np.flatnonzero(chosen))
        cell_ids = torch.from_numpy(window.cells[chosen])
        return PackedCells(packed.token_ids, packed.values, packed.cu_seqlens, cell_ids)

    def _tokenize_piece(self, piece: Piece, part: _Part) -> tuple[PackedCells, np.ndarray]:
        """Tokens of all the piece's cells, and which of the cells stay."""
        block = piece.block
        if part.library_size is None:
            sizes = _native.row_sums(block.indptr, block.data)
        else:
            sizes = part.library_size[piece.cells]
        single = sizes.dtype == np.float32 and np.result_type(block.data.dtype, np.float32) == np.float32
        result = _native.rank_value(
            block.indptr,
            block.indices,
            block.data,
            np.ascontiguousarray(sizes, dtype=np.float64),
            part.plan.column_slot,
            part.plan.slot_token,
            part.plan.slot_median,
            part.plan.num_single,
            ("divide" if part.dense else "multiply") + ("32" if single else "64"),
            self.options.stored_zeros == "keep",
            self.max_tokens,
            self._prefix,
            self._suffix,
            self.options.keep_counts,
        )
        _check_library_size(sizes, result.total_counts, block, part.reports[0].source)
        has_genes = result.num_gene_tokens > 0
        chosen = has_genes if part.keep is None else has_genes & part.keep[piece.cells]
        capacity = self.max_tokens - (self._prefix >= 0) - (self._suffix >= 0)
        for report in part.reports:
            report.coverage.add_counts(float(result.mapped_counts.sum()), float(result.total_counts.sum()))
            report.num_cells += block.num_cells
            report.num_empty += int((~has_genes).sum())
            report.num_filtered += int((has_genes & ~chosen).sum())
            report.num_truncated += int((result.num_gene_tokens[chosen] > capacity).sum())
            report.num_tokens += int(np.diff(result.cu_seqlens)[chosen].sum())
        packed = PackedCells(
            token_ids=torch.from_numpy(result.token_ids),
            values=None if result.counts is None else torch.from_numpy(result.counts.astype(np.float32)),
            cu_seqlens=torch.from_numpy(result.cu_seqlens.astype(np.int32)),
            cell_ids=torch.from_numpy(piece.cells),
        )
        return packed, chosen

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


def filter_pass_of(source: CellSource) -> np.ndarray | None:
    """bool (cells,): obs["filter_pass"] == 1, the authors' switch for cells; None without the column."""
    column = source.obs_column("filter_pass")
    if column is None:
        return None
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
