"""scBERT's tokens: a cell is its panel, and each gene's token the bin of its logarithmic expression.

    bin = min(floor(log2(1 + 10,000 count / total)), 5),  total over the panel

Only bins above 0 are stored, as (position on the panel, bin): 94 to 99 % of a cell are zeros. Straight from CSR blocks
in native code, for counts by exact integer comparisons. Values that are not whole go through the authors' float32
arithmetic; values that are logarithms already can be said to be so. Source: preprocess.py and SCDataset of the released
scBERT code; Yang et al. 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

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
from scfm.errors import InvalidArgumentError
from scfm.tokenize.planned_genes import PlannedGenes
from scfm.tokenize.report import TokenizeReport
from scfm.tokenize.scbert_panel import ScbertPanel
from scfm.tokenize.source_tokenizer import Part, SourceTokenizer, add_cells
from scfm.tokenize.symbol_genes import map_symbols

__all__ = ["InputStyle", "ScbertTokenizer"]

InputStyle = Literal["counts", "log1p", "log2"]

AUTHORS_MIN_GENES = 200
_STYLES = ("counts", "log1p", "log2")
_RULES = ("auto", "authors", "all")
_DESCRIBED_CELLS = 64


@dataclass(frozen=True)
class _Plan:
    """What is worked out once for one part of a source. dropped: cells with too few genes, block by block."""

    column_position: np.ndarray
    num_repeated: int
    is_counts: bool = True
    dropped: list[int] = field(default_factory=list)


class ScbertTokenizer(SourceTokenizer[_Plan]):
    """Tokenizer of one panel of genes.

    genes: the panel, in the order of the checkpoint's positions: a list of symbols, or a file (.txt, or .h5ad for its
    var_names). min_genes: cells with fewer panel genes are left out, counted in ``report`` (the authors' preprocessing
    takes 200); None keeps all. input_style: "counts" (or linear values at any depth), or "log1p" and "log2" for values
    that are ln(1 + x) or log2(1 + x) of 10,000 a cell already. gene_column, gene_rules, species: where the genes' names
    stand and which count, see scfm.tokenize.symbol_genes; of columns with one symbol the first is taken, as in the
    original. ``report`` tells about the last source tokenized. Raises InvalidArgumentError.
    """

    def __init__(
        self,
        genes: ScbertPanel | str | Path | Sequence[str],
        *,
        min_genes: int | None = None,
        input_style: InputStyle = "counts",
        gene_column: str | None = None,
        gene_rules: Literal["auto", "authors", "all"] = "auto",
        species: str = "human",
    ) -> None:
        self.vocab = ScbertPanel.of(genes)
        self.species = species
        self.min_genes = min_genes
        self.input_style = input_style
        self.gene_column = gene_column
        self.gene_rules = gene_rules
        self.report = None
        self._planned = PlannedGenes(self._map_and_plan)
        if min_genes is not None and (isinstance(min_genes, bool) or min_genes < 1):
            raise InvalidArgumentError(f"{min_genes!r}; expected at least 1, or None", where="min_genes")
        for name, found, allowed in (
            ("input_style", input_style, _STYLES),
            ("gene_rules", gene_rules, _RULES),
        ):
            if found not in allowed:
                raise InvalidArgumentError(f"{found!r}; expected one of {allowed}", where=name)

    def read(self, data: Any, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
        """Raw counts; with another input_style X, or the layer named, as it is. A CellSource has chosen already."""
        if self.input_style == "counts" or isinstance(data, CellSource):
            return read(data, layer=layer, assume_counts=assume_counts)
        if isinstance(data, list | tuple) and data:
            return SourceList([self.read(one, layer=layer, assume_counts=assume_counts) for one in data])
        source = read(data, layer=layer, assume_counts=True)
        source.expect_fractions()
        return source

    def _plan_part(self, source: CellSource, species: str) -> tuple[_Plan, TokenizeReport]:
        mapping, plan = self._planned.of(source.genes, species)
        report = TokenizeReport(source.name, source.counts_from, None, mapping.coverage())
        report.notes += mapping.notes
        if plan.num_repeated:
            report.notes.append(
                f"{plan.num_repeated:,} columns bear the symbol of an earlier column and were left out, as in the "
                "original"
            )
        return replace(plan, is_counts=source.is_counts, dropped=[]), report

    def _check_genes_of(self, source: CellSource, species: str) -> None:
        self._planned.of(source.genes, species)

    def _map_and_plan(self, genes: pd.DataFrame, species: str) -> tuple[GeneMapping, _Plan]:
        mapping = map_symbols(
            genes, self.vocab.token, gene_column=self.gene_column, rules=self.gene_rules, species=species
        )
        column_position = np.full(len(mapping.ids), -1, dtype=np.int32)
        taken: set[str] = set()
        num_repeated = 0
        for column, gene in enumerate(mapping.ids):
            if gene is None:
                continue
            if gene in taken:
                num_repeated += 1
                continue
            taken.add(gene)
            column_position[column] = self.vocab.token[gene]
        return mapping, _Plan(column_position, num_repeated)

    def _tokenize_piece(self, piece: Piece, part: Part[_Plan], epoch: int) -> tuple[PackedCells, np.ndarray]:
        block, plan, own = piece.block, part.plan, part.reports[0]
        if own.values is None and not (plan.is_counts and self.input_style == "counts"):
            own.values = _look_of(block)
        data = block.data
        if self.input_style == "log1p":
            data = (data / np.float32(np.log(2))).astype(np.float32)
        result = _native.log_bins(
            block.indptr,
            block.indices,
            data,
            plan.column_position,
            len(self.vocab),
            self.input_style != "counts",
        )
        packed = _packed(result, slot=len(self.vocab))
        lengths = packed.lengths.numpy()
        chosen = add_cells(
            part,
            lengths,
            result.num_panel_genes,
            None,
            piece.cells,
            result.mapped_counts,
            result.total_counts,
        )
        few = chosen & (result.num_panel_genes < (self.min_genes or 0))
        plan.dropped.append(int(few.sum()))
        for report in part.reports:
            report.num_tokens -= int(lengths[few].sum())
        return packed, chosen & ~few

    def _conclude(self, source: CellSource, part: Part[_Plan]) -> None:
        own, dropped = part.reports[0], sum(part.plan.dropped)
        if dropped:
            own.notes.append(
                f"{dropped:,} cells with fewer than {self.min_genes} genes of the panel were left out by min_genes"
            )
        if self.input_style == "counts" and own.values is not None and source.report.num_nonintegers:
            own.notes.append(
                f"values that are not whole ({own.values}) were taken as linear, normalised to 10,000 a cell and "
                "logged; if they are logarithms already, every bin is wrong: give the raw counts, or "
                "input_style='log1p' or 'log2'"
            )

    def describe(self) -> dict[str, Any]:
        """Settings, for provenance."""
        return {
            "name": "scbert",
            "num_genes": len(self.vocab),
            "genes_sha256": self.vocab.sha256,
            "vocab": self.vocab.source,
            "min_genes": self.min_genes,
            "input_style": self.input_style,
            "gene_column": self.gene_column,
            "gene_rules": self.gene_rules,
            "species": self.species,
        }


def _packed(result: _native.LogBinsResult, *, slot: int) -> PackedCells:
    """The cells of a result, numbered from 0. A cell with genes but no bin above 0 gets its slot, with bin 0."""
    token_ids, values, offsets = result.token_ids, result.values, result.cu_seqlens
    lonely = np.flatnonzero((np.diff(offsets) == 0) & (result.num_panel_genes > 0))
    if lonely.size:
        token_ids = np.insert(token_ids, offsets[lonely], np.int32(slot))
        values = np.insert(values, offsets[lonely], np.float32(0))
        lengths = np.diff(offsets)
        lengths[lonely] = 1
        offsets = np.concatenate([[0], np.cumsum(lengths)])
    return PackedCells(
        token_ids=torch.from_numpy(token_ids),
        values=torch.from_numpy(values),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        cell_ids=torch.arange(len(result.num_panel_genes), dtype=torch.int64),
    )


def _look_of(block: CsrBlock) -> str:
    """What the first cells' values look like."""
    num_cells = min(block.num_cells, _DESCRIBED_CELLS)
    indptr = block.indptr[: num_cells + 1]
    return describe(Sample(block.data[: indptr[-1]].astype(np.float64), indptr))
