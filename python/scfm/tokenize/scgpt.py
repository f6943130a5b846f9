"""scGPT's tokens: each cell becomes the genes it expresses, with the bin of each value among the cell's own values.

    edges = 50 quantiles of the cell's non-zero values;   bin = how many edges lie below the value, 1 to 50

Straight from blocks of CSR values in native code, without a dense matrix. X is taken as it is, counts or
normalised: bins follow ranks. Where many values are equal, several bins are possible and the authors' code draws one
at random, as it does with the genes of cells that are too long; here the draws depend on the seed and on what the
cell holds, so a cell has the same tokens in any file, order and batch. The authors' own draws, and the rule
without draws that their pretraining used, are options. Source: Cui et al. 2024 and the released scGPT code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from scfm import _native
from scfm.data.csr import CsrBlock
from scfm.data.gene_mapping import GeneMapping
from scfm.data.number_types import Array
from scfm.data.packed import PackedCells
from scfm.data.raw_counts import Sample, describe
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.data.source_list import SourceList
from scfm.data.windows import Piece
from scfm.errors import BadCellError, InvalidArgumentError
from scfm.tokenize.gene_plan import plan_slots
from scfm.tokenize.planned_genes import PlannedGenes
from scfm.tokenize.report import TokenizeReport
from scfm.tokenize.scgpt_upstream import cut_as_upstream, upstream_draws
from scfm.tokenize.scgpt_vocab import ScgptVocab
from scfm.tokenize.source_tokenizer import Part, SourceTokenizer, add_cells
from scfm.tokenize.symbol_genes import map_symbols

__all__ = ["Binning", "InputStyle", "LongCells", "ScgptOptions", "ScgptTokenizer", "bin_quantiles"]

Binning = Literal["seeded", "upstream", "pretrain"]
LongCells = Literal["seeded", "top", "upstream"]
InputStyle = Literal["binned", "log1p", "normed_raw"]

MOST_BINS = 32_768
_NO_TOKEN = -1
_NO_LIMIT = -1
_TARGET_SUM = 10_000.0
_DESCRIBED_CELLS = 64
_AS_THEY_ARE = np.empty(0, dtype=np.float64)
_LARGEST = float(np.finfo(np.float32).max)
_RULES = {"seeded": "seeded", "pretrain": "left", "upstream": "given"}


@dataclass(frozen=True)
class ScgptOptions:
    """How ScgptTokenizer departs from the authors' defaults; see there."""

    num_bins: int = 51
    binning: Binning = "seeded"
    long_cells: LongCells = "seeded"
    input_style: InputStyle = "binned"
    cls_value: float = -2.0
    append_cls: bool = True
    include_zero_genes: bool = False
    duplicate_genes: Literal["repeat", "sum"] = "repeat"
    gene_column: str | None = None
    gene_rules: Literal["auto", "authors", "all"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "binning": ("seeded", "upstream", "pretrain"),
            "long_cells": ("seeded", "top", "upstream"),
            "input_style": ("binned", "log1p", "normed_raw"),
            "duplicate_genes": ("repeat", "sum"),
            "gene_rules": ("auto", "authors", "all"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InvalidArgumentError(f"{getattr(self, name)!r}; expected one of {values}", where=name)
        if not _is_whole(self.num_bins) or not 2 <= self.num_bins <= MOST_BINS:
            raise InvalidArgumentError(f"{self.num_bins!r}; expected 2 to {MOST_BINS:,}", where="num_bins")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**64:
            raise InvalidArgumentError(f"{self.seed!r}; expected 0 to 2^64 - 1", where="seed")
        if not isinstance(self.cls_value, int | float) or not np.isfinite(self.cls_value):
            raise InvalidArgumentError(f"{self.cls_value!r}; expected a finite number", where="cls_value")


@dataclass(frozen=True)
class _Plan:
    """What is worked out once for one part of a source. num_single: slots below it are fed by one column each;
    is_counts: a sample of its values was whole.
    """

    column_slot: np.ndarray
    slot_token: np.ndarray
    num_single: int
    is_counts: bool


class ScgptTokenizer(SourceTokenizer[_Plan]):
    """Value-binning tokenizer of one vocabulary.

    vocab: gene symbols and special tokens. max_tokens: including <cls>; None for no limit. num_bins: bin 0 is for
    zeros. binning: the bin of a value that several edges equal: "seeded", any of the possible ones at random;
    "upstream", the same drawn as the original does from numpy's global generator; "pretrain", the highest, as in the
    authors' pretraining. long_cells: what stays of a cell with more genes than fit: "seeded", any at random; "top",
    the most expressed; "upstream", as the original draws and permutes with torch's global generator. input_style:
    "binned" bins the values as they are; "normed_raw" gives them at 10,000 a cell, "log1p" the logarithm of that (of
    values that are no counts, the values themselves). cls_value: of <cls>, the pad value in the authors' pretraining
    and embed_data, 0 in their fine-tuning. include_zero_genes: every gene of the vocabulary that the data have is a
    token. duplicate_genes: "repeat" gives a symbol that stands twice two tokens, as the original does; "sum" adds the
    columns. gene_column, gene_rules: where the genes' names stand and which count, see scfm.tokenize.symbol_genes: by
    default symbols as the original takes them, and Ensembl ids where there are none. species: "human", or "mouse"
    through orthologues and upper-casing. seed: of what is "seeded". ``report`` tells about the last source tokenized.
    Raises InvalidArgumentError.
    """

    def __init__(
        self,
        vocab: ScgptVocab,
        *,
        max_tokens: int | None = 1200,
        num_bins: int = 51,
        binning: Binning = "seeded",
        long_cells: LongCells = "seeded",
        input_style: InputStyle = "binned",
        cls_value: float = -2.0,
        append_cls: bool = True,
        include_zero_genes: bool = False,
        duplicate_genes: Literal["repeat", "sum"] = "repeat",
        gene_column: str | None = None,
        gene_rules: Literal["auto", "authors", "all"] = "auto",
        species: str = "human",
        seed: int = 0,
    ) -> None:
        if not isinstance(vocab, ScgptVocab):
            raise InvalidArgumentError(
                f"is a {type(vocab).__name__}; expected a ScgptVocab",
                where="vocab",
                hint="Use ScgptTokenizer.from_vocab for a vocab.json.",
            )
        self.vocab = vocab
        self.max_tokens = max_tokens
        self.species = species
        self.options = ScgptOptions(
            num_bins=num_bins,
            binning=binning,
            long_cells=long_cells,
            input_style=input_style,
            cls_value=cls_value,
            append_cls=append_cls,
            include_zero_genes=include_zero_genes,
            duplicate_genes=duplicate_genes,
            gene_column=gene_column,
            gene_rules=gene_rules,
            seed=seed,
        )
        self.report = None
        self._prefix = vocab.cls_id if append_cls else _NO_TOKEN
        self._planned = PlannedGenes(self._map_and_plan)
        self._quantiles = bin_quantiles(num_bins) if input_style == "binned" else _AS_THEY_ARE
        least = 2 if append_cls else 1
        if max_tokens is not None and (not _is_whole(max_tokens) or max_tokens < least):
            raise InvalidArgumentError(f"{max_tokens!r}; expected at least {least}", where="max_tokens")

    @classmethod
    def from_vocab(cls, path: str | Path, **options: Any) -> ScgptTokenizer:
        """From the authors' vocab.json. Raises MissingFileError, FormatError."""
        return cls(ScgptVocab.from_file(path), **options)

    @property
    def num_bins(self) -> int:
        return self.options.num_bins

    def read(self, data: Any, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
        """X as it is, counts or normalised, or the layer named. A CellSource has chosen already."""
        if isinstance(data, CellSource):
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
        num_repeated = mapping.num_mapped - len(set(mapping.ids) - {None})
        if num_repeated and self.options.duplicate_genes == "repeat":
            report.notes.append(
                f"{num_repeated:,} columns bear the symbol of another column; each gives its own token, as in the "
                'original; duplicate_genes="sum" adds them'
            )
        if self.options.input_style != "binned" and not source.is_counts:
            report.notes.append(
                f"the values are no counts: for input_style={self.options.input_style!r} they were taken as they "
                "are, neither scaled nor logged"
            )
        return replace(plan, is_counts=source.is_counts), report

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
        slots = plan_slots(mapping.ids, collapse=self.options.duplicate_genes == "sum")
        tokens = (self.vocab.token[gene] for gene in slots.genes)
        slot_token = np.fromiter(tokens, dtype=np.int32, count=len(slots.genes))
        return mapping, _Plan(slots.column_slot, slot_token, slots.num_single, True)

    def _tokenize_piece(self, piece: Piece, part: Part[_Plan], epoch: int) -> tuple[PackedCells, np.ndarray]:
        block, own = piece.block, part.reports[0]
        if own.values is None:
            own.values = _look_of(block)
        _check_fits_float32(block, own)
        data = self._scaled(block, part.plan)
        if "upstream" in (self._binning, self.options.long_cells):
            result, packed = self._drawn_by_upstream(block, data, part.plan, epoch)
        else:
            result = self._bins_of(block, data, part.plan, epoch)
            packed = _packed(result)
        chosen = add_cells(
            part,
            packed.lengths.numpy(),
            result.num_gene_tokens,
            None if self.max_tokens is None else self.max_tokens - (self._prefix >= 0),
            piece.cells,
            result.mapped_counts,
            result.total_counts,
        )
        return packed, chosen

    @property
    def _binning(self) -> Binning | None:
        return self.options.binning if self.options.input_style == "binned" else None

    def _bins_of(
        self, block: CsrBlock, data: Array, plan: _Plan, epoch: int, **changed: Any
    ) -> _native.ValueBinsResult:
        arguments: dict[str, Any] = {
            "quantiles": self._quantiles,
            "rule": _RULES[self.options.binning] if self._binning else "left",
            "draws": None,
            "draw_offsets": None,
            "kept": "largest" if self.options.long_cells == "top" else "any",
            "max_tokens": _NO_LIMIT if self.max_tokens is None else self.max_tokens,
            "prefix_token": self._prefix,
            "prefix_value": self.options.cls_value,
            "with_zeros": self.options.include_zero_genes,
            "seed": self.options.seed,
            "epoch": epoch,
        }
        return _native.value_bins(
            block.indptr, block.indices, data, plan.column_slot, plan.slot_token, **(arguments | changed)
        )

    def _drawn_by_upstream(
        self, block: CsrBlock, data: Array, plan: _Plan, epoch: int
    ) -> tuple[_native.ValueBinsResult, PackedCells]:
        """The block's tokens with the original's own draws, in its order: cell by cell, value by value."""
        draws: dict[str, Any] = {}
        if self._binning == "upstream":
            whole = self._bins_of(
                block,
                data,
                plan,
                epoch,
                quantiles=_AS_THEY_ARE,
                rule="left",
                max_tokens=_NO_LIMIT,
                prefix_token=-1,
            )
            draws = upstream_draws(whole.values, whole.cu_seqlens)
        if self.options.long_cells != "upstream":
            result = self._bins_of(block, data, plan, epoch, **draws)
            return result, _packed(result)
        result = self._bins_of(block, data, plan, epoch, max_tokens=_NO_LIMIT, **draws)
        num_first = int(self._prefix >= 0)
        return result, cut_as_upstream(_packed(result), self.max_tokens, num_first=num_first)

    def _scaled(self, block: CsrBlock, plan: _Plan) -> Array:
        """The values that are tokenized: those of genes of the vocabulary at 10,000 a cell where so asked."""
        if self.options.input_style == "binned" or not plan.is_counts:
            return block.data
        known = plan.column_slot[block.indices] >= 0
        totals = _native.row_sums(block.indptr, np.where(known, block.data, block.data.dtype.type(0)))
        factors = np.divide(_TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        values: Array = (block.data * np.repeat(factors, np.diff(block.indptr))).astype(np.float32)
        if self.options.input_style != "log1p":
            return values
        summed = np.flatnonzero(plan.column_slot[block.indices] >= plan.num_single)
        _into_the_first(values, summed, block, plan.column_slot)
        scaled: Array = np.log1p(values)
        return scaled

    def _conclude(self, source: CellSource, part: Part[_Plan]) -> None:
        own, *total = part.reports
        if source.report.num_values and not source.report.num_nonintegers:
            own.values = f"counts, highest {source.report.max_value:,.0f}"
        for report in total:
            report.values = ", ".join(dict.fromkeys(one.values for one in report.parts if one.values))

    def describe(self) -> dict[str, Any]:
        """Settings, for provenance."""
        return {
            "name": "scgpt",
            "max_tokens": self.max_tokens,
            "species": self.species,
            "vocab": self.vocab.source,
            **asdict(self.options),
        }


def bin_quantiles(num_bins: int) -> np.ndarray:
    """float64 (num_bins - 1,): the quantiles that are the edges of bins 1 to num_bins - 1."""
    return np.linspace(0.0, 1.0, num_bins - 1)


def _into_the_first(values: Array, places: Array, block: CsrBlock, column_slot: Array) -> None:
    """Of entries that are one token together, the first gets the sum and the others 0, for their logarithms are added.

    values: of all the block's entries, changed in place; places: those whose slot is fed by several columns.
    """
    if not len(places):
        return
    row = np.searchsorted(block.indptr, places, side="right")
    slot = column_slot[block.indices[places]]
    _, first, token = np.unique(np.stack([row, slot], axis=1), axis=0, return_index=True, return_inverse=True)
    sums = np.bincount(token.ravel(), weights=values[places]).astype(values.dtype)
    values[places] = 0
    values[places[first]] = sums


def _packed(result: _native.ValueBinsResult) -> PackedCells:
    """The cells of a result, numbered from 0."""
    return PackedCells(
        token_ids=torch.from_numpy(result.token_ids),
        values=torch.from_numpy(result.values),
        cu_seqlens=torch.from_numpy(result.cu_seqlens.astype(np.int32)),
        cell_ids=torch.arange(len(result.num_gene_tokens), dtype=torch.int64),
    )


def _check_fits_float32(block: CsrBlock, report: TokenizeReport) -> None:
    """The original takes values as float32, where larger ones would be infinite. Raises BadCellError."""
    if block.data.dtype != np.float64 or not len(block.data) or block.data.max() <= _LARGEST:
        return
    place = int(block.data.argmax())
    cell = int(np.searchsorted(block.indptr, place, side="right")) - 1
    raise BadCellError(
        f"gene {block.indices[place]} has value {block.data[place]:g}; expected at most {_LARGEST:g}, as values are "
        "taken as float32",
        path=report.source,
        where=f"{report.counts_from}, row {block.rows[cell]}",
        hint="Remove or repair this cell.",
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _look_of(block: CsrBlock) -> str:
    """What the first cells' values look like."""
    num_cells = min(block.num_cells, _DESCRIBED_CELLS)
    indptr = block.indptr[: num_cells + 1]
    return describe(Sample(block.data[: indptr[-1]].astype(np.float64), indptr))
