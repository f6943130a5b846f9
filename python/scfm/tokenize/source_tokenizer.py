"""What every family's tokenizer does alike: walk a source window by window, each part by its own genes.

A family says how genes become tokens (mapped once per gene table) and how a block of one part becomes packed
cells. Everything around that is here: lists of sources, shuffled epochs, cells that are left out, reports.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from scfm.data.packed import PackedCells, concatenate
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.data.windows import Piece, Window
from scfm.errors import GeneMappingError, InvalidArgumentError, ScfmWarning
from scfm.tokenize.planned_genes import PlannedGenes
from scfm.tokenize.report import TokenizeReport, total_of

__all__ = ["Part", "SourceTokenizer", "filter_pass_of"]

PlanT = TypeVar("PlanT")


@dataclass(frozen=True)
class Part(Generic[PlanT]):
    """What is worked out once for one part of a source. keep: bool (cells,), None for all; reports: its own, and
    the list's if it is in one.
    """

    plan: PlanT
    keep: np.ndarray | None
    reports: tuple[TokenizeReport, ...]


class SourceTokenizer(ABC, Generic[PlanT]):
    """Base of the families' tokenizers. ``report`` tells about the last source tokenized."""

    species: str
    report: TokenizeReport | None
    vocab: Any
    _planned: PlannedGenes[Any]

    @abstractmethod
    def _plan_part(self, source: CellSource, species: str) -> tuple[PlanT, TokenizeReport]:
        """What one part needs, and its report before any cell has passed. Raises GeneMappingError."""

    @abstractmethod
    def _check_genes_of(self, source: CellSource, species: str) -> None:
        """Map the part's genes; raises GeneMappingError."""

    @abstractmethod
    def _tokenize_piece(self, piece: Piece, part: Part[PlanT], epoch: int) -> tuple[PackedCells, np.ndarray]:
        """Tokens of all the piece's cells, and which of the cells stay; adds to the part's reports."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings, for provenance."""

    def _conclude(self, source: CellSource, part: Part[PlanT]) -> None:
        """After a part's last cell: notes that only then are known, added to its report."""

    def read(self, data: Any, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
        """The source that this family tokenizes of ``data``."""
        return read(data, layer=layer, assume_counts=assume_counts)

    def __call__(
        self,
        data: Any,
        *,
        layer: str | None = None,
        assume_counts: bool = False,
        species: str | None = None,
    ) -> PackedCells:
        """Tokens of all cells of ``data`` (AnnData, path or CellSource).

        Cells without any known gene, and those with obs["filter_pass"] other than 1, are left out:
        ``cell_ids`` names the rows that stayed.
        """
        source = self.read(data, layer=layer, assume_counts=assume_counts)
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
        for _, packed in self._packs(source, windows, species, use_filter_pass, 0):
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
        ``start=cursor`` goes on behind them. A cell's tokens do not depend on where in the order it stands.
        Raises InvalidArgumentError.
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
        return self._packs(source, windows, species, use_filter_pass, epoch)

    def check_genes(self, source: CellSource, *, species: str | None = None) -> None:
        """Raise now what ``packs`` would raise about the genes of any part: GeneMappingError naming the file."""
        for part in source.parts:
            with _naming(part):
                self._check_genes_of(part, species or self.species)

    def column_tokens(self, genes: pd.DataFrame, *, species: str | None = None) -> NDArray[np.int32]:
        """The token of each column of a gene table, int32 (columns,), -1 where the model does not know the gene."""
        mapping, _ = self._planned.of(genes, species or self.species)
        tokens = (-1 if gene is None else self.vocab.token.get(gene, -1) for gene in mapping.ids)
        return np.fromiter(tokens, dtype=np.int32, count=len(mapping.ids))

    def _packs(
        self,
        source: CellSource,
        windows: Iterator[Window],
        species: str | None,
        use_filter_pass: bool,
        epoch: int,
    ) -> Iterator[tuple[int, PackedCells]]:
        parts = self.plan_parts(source, species or self.species, use_filter_pass)
        for window in windows:
            yield window.cursor, self.tokenize_window(window, parts, epoch)
        for number, part in parts.items():
            own, *total = part.reports
            own.num_stored_zeros = source.parts[number].report.num_zeros
            for report in total:
                report.num_stored_zeros += own.num_stored_zeros
            self._conclude(source.parts[number], part)
            self._warn(own)

    def plan_parts(
        self, source: CellSource, species: str, use_filter_pass: bool = True
    ) -> dict[int, Part[PlanT]]:
        """Each part's plan, by number; parts of a list from which no cell was taken need none."""
        sources = dict(enumerate(source.parts))
        if len(sources) > 1:
            sources = {number: part for number, part in sources.items() if len(part)}
        planned = {}
        for number, part in sources.items():
            with _naming(part):
                planned[number] = self._plan_part(part, species)
        own = [report for _, report in planned.values()]
        self.report = own[0] if len(source.parts) == 1 else total_of(source.name, own)
        return {
            number: Part(
                plan,
                filter_pass_of(sources[number]) if use_filter_pass else None,
                (report,) if report is self.report else (report, self.report),
            )
            for number, (plan, report) in planned.items()
        }

    def tokenize_window(self, window: Window, parts: dict[int, Part[PlanT]], epoch: int) -> PackedCells:
        """The window's cells in its order, without those that have no token or are filtered out.

        parts: by ``plan_parts``, of the source that the window is of; epoch: of a training run.
        """
        chosen = np.empty(len(window.cells), dtype=bool)
        packs = []
        for piece in window.pieces:
            packed, keep = self._tokenize_piece(piece, parts[piece.part], epoch)
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

    def _warn(self, report: TokenizeReport) -> None:
        if report.num_filtered:
            report.notes.append(f"{report.num_filtered:,} cells were left out by obs['filter_pass']")
        if report.coverage.share_of_counts is not None and report.coverage.share_of_counts < 0.5:
            report.notes.append(f"only {report.coverage.share_of_counts:.1%} of counts were mapped")
        for note in report.notes:
            warnings.warn(f"{report.source}: {note}", ScfmWarning, stacklevel=3)


@contextmanager
def _naming(source: CellSource) -> Iterator[None]:
    """Within it, a GeneMappingError that names no file names this source's."""
    try:
        yield
    except GeneMappingError as error:
        if error.path is not None:
            raise
        raise GeneMappingError(error.message, path=source.name, where=error.where, hint=error.hint) from error


def add_cells(
    part: Part[Any],
    lengths: np.ndarray,
    num_gene_tokens: np.ndarray,
    capacity: int | None,
    cells: np.ndarray,
    mapped_counts: np.ndarray,
    total_counts: np.ndarray,
) -> np.ndarray:
    """Adds some cells to the part's reports; bool, which of them stay: those with genes that are not filtered.

    lengths, num_gene_tokens: tokens a cell, with special ones and after cutting, without and before; capacity:
    gene tokens that fit, None for any number; cells: positions in the part.
    """
    has_genes = num_gene_tokens > 0
    chosen: np.ndarray = has_genes if part.keep is None else has_genes & part.keep[cells]
    for report in part.reports:
        report.coverage.add_counts(float(mapped_counts.sum()), float(total_counts.sum()))
        report.num_cells += len(cells)
        report.num_empty += int((~has_genes).sum())
        report.num_filtered += int((has_genes & ~chosen).sum())
        if capacity is not None:
            report.num_truncated += int((num_gene_tokens[chosen] > capacity).sum())
        report.num_tokens += int(lengths[chosen].sum())
    return chosen


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
