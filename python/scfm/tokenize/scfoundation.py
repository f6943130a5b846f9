"""scFoundation's tokens: each gene that a cell expresses, with its normalised expression, and two read depths.

    values = ln(1 + count / total * 10^4);   S = log10(total), what the cell has;   T, what the model is to assume

Straight from blocks of CSR values in native code: no dense row of 19,264 genes is ever made. Genes are aligned by
name, whatever their number and order; the original trusts the order of any table that is wide enough. A depth token
that is not above zero does not exist in the original, whose embeddings then read other tokens in its place: such cells
are kept as there and warned about, or refused. Source: the authors' get_embedding.py; Hao et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from scfm import _native
from scfm.data.csr import CsrBlock
from scfm.data.gene_mapping import GeneMapping
from scfm.data.packed import PackedCells
from scfm.data.raw_counts import Sample, describe
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.data.source_list import SourceList
from scfm.data.windows import Piece
from scfm.errors import BadCellError, InvalidArgumentError
from scfm.tokenize.planned_genes import PlannedGenes
from scfm.tokenize.report import TokenizeReport
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.tokenize.scfoundation_options import ScfoundationOptions, parse_target
from scfm.tokenize.source_tokenizer import Part, SourceTokenizer, add_cells
from scfm.tokenize.symbol_genes import map_symbols

__all__ = ["ScfoundationTokenizer", "parse_target"]

_DESCRIBED_CELLS = 64
_NAMED = 5
_HIGHEST_LOG = math.log1p(1e4)  # a gene with all of the cell's 10^4 counts
_LIKELY_LOG = 30.0


@dataclass
class _Depths:
    """What the depths of a part's cells looked like so far. Rows are positions in the part."""

    num_dropped: int = 0
    num_shallow_targets: int = 0
    dropped: list[int] = field(default_factory=list)
    shallow: list[int] = field(default_factory=list)

    def add(self, result: _native.ReadDepthResult, cells: np.ndarray) -> np.ndarray:
        """Adds a block's cells; returns the places of those that lack a depth token."""
        t, s = result.target_depth, result.source_depth
        expressed = result.mapped_counts > 0
        dropped = np.flatnonzero(expressed & ~((t > 0) & (s > 0)))
        shallow = np.flatnonzero(expressed & (t < s))
        self.num_dropped += len(dropped)
        self.num_shallow_targets += len(shallow)
        self.dropped += cells[dropped[: max(_NAMED - len(self.dropped), 0)]].tolist()
        self.shallow += cells[shallow[: max(_NAMED - len(self.shallow), 0)]].tolist()
        return dropped


@dataclass(frozen=True)
class _Plan:
    """What is worked out once for one part of a source. totals: float64 (cells,), the listed ones, or None."""

    column_position: np.ndarray
    totals: np.ndarray | None = None
    target_sum: float = 1.0
    depths: _Depths = field(default_factory=_Depths)


class ScfoundationTokenizer(SourceTokenizer[_Plan]):
    """Read-depth-aware tokenizer of one list of genes.

    genes: the authors' file, or symbols in the model's order. Tokens are positions: those of the genes ascending, then
    T and S; values are ln(1 + CP10k) and depths. target: "t4" (T = 4), "f5" (T = log10(5 total)) or "a1"
    (T = log10(total) + 1). input_type, pre_normalized: what the values are, see scfm.tokenize.scfoundation_options.
    total_counts: the column of obs with raw totals, for pre_normalized="A". bulk_target_sum: the depth that bulk
    samples are scaled to; by default the median of their file, as in the original, so that a sample then depends on
    the others. arithmetic: "float64" as for the authors' tables, or "float32" as for their .h5ad matrices.
    depth_tokens: cells of which a depth is not above zero keep what tokens they have ("authors", with a warning) or
    raise BadCellError ("error"). duplicate_genes: columns of one symbol are summed, or the "first" counts; of
    logarithms always the first. gene_column, gene_rules: see scfm.tokenize.symbol_genes. species: "human", or "mouse"
    through orthologues and upper-casing. ``report`` tells about the last source tokenized.
    Raises InvalidArgumentError, MissingFileError, FormatError.
    """

    def __init__(
        self,
        genes: str | Path | Iterable[str] | ScfoundationGenes,
        *,
        species: str = "human",
        **options: Any,
    ) -> None:
        self.vocab = ScfoundationGenes.of(genes)
        self.species = species
        self.options = ScfoundationOptions(**options)
        self.report = None
        self._planned = PlannedGenes(self._map_and_plan)

    def with_options(self, **changed: Any) -> ScfoundationTokenizer:
        """Another one of the same genes, with some options changed."""
        species = changed.pop("species", self.species)
        return ScfoundationTokenizer(self.vocab, species=species, **{**asdict(self.options), **changed})

    def read(self, data: Any, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
        """Raw counts; for bulk and pre-normalised input X as it is, or the layer named."""
        if self.options.takes_counts or isinstance(data, CellSource):
            return read(data, layer=layer, assume_counts=assume_counts)
        if isinstance(data, list | tuple) and data:
            return SourceList([self.read(one, layer=layer, assume_counts=assume_counts) for one in data])
        source = read(data, layer=layer, assume_counts=True)
        source.expect_fractions()
        return source

    def positions_of(self, genes: pd.DataFrame, *, species: str | None = None) -> np.ndarray:
        """int64 (genes,): the position of each gene of a table (var), -1 where the model has none."""
        mapping, _ = self._planned.of(genes, species or self.species)
        found = (-1 if gene is None else self.vocab.token[gene] for gene in mapping.ids)
        return np.fromiter(found, dtype=np.int64, count=len(mapping.ids))

    def _plan_part(self, source: CellSource, species: str) -> tuple[_Plan, TokenizeReport]:
        mapping, plan = self._planned.of(source.genes, species)
        report = TokenizeReport(source.name, source.counts_from, self._library_size_from, mapping.coverage())
        report.notes += mapping.notes
        num_repeated = mapping.num_mapped - len(set(mapping.ids) - {None})
        if num_repeated:
            which = "are summed" if self._sums_columns else "are passed over"
            report.notes.append(
                f"{num_repeated:,} columns bear the symbol of another column and {which}; the original would shift "
                "all genes behind them"
            )
        plan = replace(plan, depths=_Depths(), totals=self._listed_totals(source))
        if self.options.takes_median:
            plan = replace(plan, target_sum=self._bulk_target_sum(source, plan, report))
        return plan, report

    def _check_genes_of(self, source: CellSource, species: str) -> None:
        self._planned.of(source.genes, species)

    def _map_and_plan(self, genes: pd.DataFrame, species: str) -> tuple[GeneMapping, _Plan]:
        mapping = map_symbols(
            genes,
            self.vocab.token,
            gene_column=self.options.gene_column,
            rules=self.options.gene_rules,
            species=species,
        )
        positions = np.full(len(mapping.ids), -1, dtype=np.int32)
        seen: set[str] = set()
        for column, gene in enumerate(mapping.ids):
            if gene is not None and (self._sums_columns or gene not in seen):
                positions[column] = self.vocab.token[gene]
                seen.add(gene)
        return mapping, _Plan(positions)

    def _tokenize_piece(self, piece: Piece, part: Part[_Plan], epoch: int) -> tuple[PackedCells, np.ndarray]:
        block, own, plan = piece.block, part.reports[0], part.plan
        if own.values is None and not self.options.takes_counts:
            own.values = _look_of(block)
        totals = None if plan.totals is None else np.ascontiguousarray(plan.totals[piece.cells])
        result = self._tokens_of(block, block.data, plan, totals)
        dropped = plan.depths.add(result, piece.cells)
        if self.options.depth_tokens == "error" and dropped.size:
            raise self._no_depth(result, int(dropped[0]), int(piece.cells[dropped[0]]), own.source)
        packed = _packed(result)
        chosen = add_cells(
            part,
            packed.lengths.numpy(),
            result.num_gene_tokens,
            None,
            piece.cells,
            result.mapped_counts,
            result.total_counts,
        )
        return packed, chosen

    def _tokens_of(
        self, block: CsrBlock, data: np.ndarray, plan: _Plan, totals: np.ndarray | None
    ) -> _native.ReadDepthResult:
        return _native.read_depth(
            block.indptr,
            block.indices,
            data,
            plan.column_position,
            self.vocab.num_genes,
            totals=totals,
            target_sum=plan.target_sum,
            **self.options.native(),
        )

    @property
    def _sums_columns(self) -> bool:
        # The sum of two logarithms is the logarithm of nothing.
        return self.options.duplicate_genes == "sum" and self.options.pre_normalized == "F"

    @property
    def _library_size_from(self) -> str:
        column = self.options.total_counts
        return "the model's genes" if column is None else f"obs[{column!r}]"

    def _listed_totals(self, source: CellSource) -> np.ndarray | None:
        column = self.options.total_counts
        if column is None:
            return None
        found = source.obs_column(column)
        if found is None:
            raise InvalidArgumentError(
                f"there is no column {column!r}; there are: {', '.join(source.obs_column_names) or 'none'}",
                path=source.name,
                where="total_counts",
            )
        totals = pd.to_numeric(found, errors="coerce").to_numpy(dtype=np.float64)
        wrong = np.flatnonzero(~(np.isfinite(totals) & (totals >= 0)))
        if wrong.size:
            raise InvalidArgumentError(
                f"{found.iloc[int(wrong[0])]!r:.60} in row {wrong[0]}; expected the cell's raw total",
                path=source.name,
                where=f"obs[{column!r}]",
            )
        return totals

    def _bulk_target_sum(self, source: CellSource, plan: _Plan, report: TokenizeReport) -> float:
        """The depth that every sample is scaled to: as given, or the median over the source's samples."""
        if self.options.bulk_target_sum is not None:
            return float(self.options.bulk_target_sum)
        known = plan.column_position >= 0
        totals = [
            _native.row_sums(
                block.indptr, np.where(known[block.indices], block.data, block.data.dtype.type(0))
            )
            for block in source.blocks(source.comfortable_block_size)
        ]
        expressed = np.concatenate([np.empty(0), *totals])
        expressed = expressed[expressed > 0]
        median = float(np.median(expressed)) if expressed.size else 1.0
        report.notes.append(
            f"scaled to {median:,.6g}, the median total of these {len(expressed):,} samples, as the original does: "
            "a sample's values depend on the others; bulk_target_sum= fixes the depth"
        )
        return median

    def _conclude(self, source: CellSource, part: Part[_Plan]) -> None:
        own, *total = part.reports
        own.notes += [*self._depth_notes(source, part.plan.depths), *self._value_notes(source)]
        for report in total:
            report.values = ", ".join(dict.fromkeys(one.values for one in report.parts if one.values)) or None

    def _depth_notes(self, source: CellSource, depths: _Depths) -> list[str]:
        notes = []
        if depths.num_dropped:
            notes.append(
                f"{depths.num_dropped:,} cells (rows {_rows(source, depths.dropped)}) have a read depth T or S that is "
                "not above zero, such as log10 of one count. That token is left out, as in the original, and what "
                'reads the last two tokens as S and T (pooling "all") then reads others: leave these cells out '
                '(depth_tokens="error" refuses them)'
            )
        if depths.num_shallow_targets and self.options.input_type == "singlecell":
            notes.append(
                f"{depths.num_shallow_targets:,} cells (rows {_rows(source, depths.shallow)}) are deeper than the "
                f"target {self.options.target!r} (T < S); the model was trained to enhance the depth, never to lower "
                'it: a target such as "a0" or "f1" keeps each cell\'s own'
            )
        return notes

    def _value_notes(self, source: CellSource) -> list[str]:
        seen = source.report
        if not seen.num_values or self.options.takes_counts:
            return []
        if self.options.takes_median:
            if seen.num_nonintegers and seen.max_value < _LIKELY_LOG:
                return [
                    f'the highest value is {seen.max_value:.4g}: these look log-transformed, and pre_normalized="F" '
                    'takes amounts and logs them; give "T"'
                ]
            return []
        if not seen.num_nonintegers:
            return [
                "all values are whole numbers, as raw counts are; "
                f'pre_normalized="{self.options.pre_normalized}" takes ln(1 + CP10k) as it is: give "F" for counts'
            ]
        if self.options.input_type == "singlecell" and seen.max_value > _HIGHEST_LOG + 1e-3:
            return [
                f"the highest value is {seen.max_value:.4g}; ln(1 + CP10k) is at most {_HIGHEST_LOG:.2f}, so these are "
                "another normalisation than the model was trained on"
            ]
        return []

    def _no_depth(self, result: _native.ReadDepthResult, place: int, cell: int, name: str) -> BadCellError:
        t, s = float(result.target_depth[place]), float(result.source_depth[place])
        return BadCellError(
            f"its read depths are T = {t:.4g} and S = {s:.4g}; only numbers above zero become tokens",
            path=name,
            where=f"row {cell}",
            hint="Leave cells of one count or less out.",
        )

    def describe(self) -> dict[str, Any]:
        """Settings, for provenance."""
        return {
            "name": "scfoundation",
            "species": self.species,
            "vocab": self.vocab.source,
            "num_genes": self.vocab.num_genes,
            **asdict(self.options),
        }


def _rows(source: CellSource, cells: list[int]) -> str:
    names = ", ".join(source.row_labels(np.asarray(cells)))
    return f"{names} ..." if len(cells) == _NAMED else names


def _packed(result: _native.ReadDepthResult) -> PackedCells:
    """The cells of a result, numbered from 0."""
    return PackedCells(
        token_ids=torch.from_numpy(result.token_ids),
        values=torch.from_numpy(result.values),
        cu_seqlens=torch.from_numpy(result.cu_seqlens.astype(np.int32)),
        cell_ids=torch.arange(len(result.num_gene_tokens), dtype=torch.int64),
    )


def _look_of(block: CsrBlock) -> str:
    """What the first cells' values look like."""
    num_cells = min(block.num_cells, _DESCRIBED_CELLS)
    indptr = block.indptr[: num_cells + 1]
    return describe(Sample(block.data[: indptr[-1]].astype(np.float64), indptr))
