"""Blocks of cells in CSR form, and the one check that every block passes before anything computes on it.

A malformed matrix makes ordinary sparse code read outside its arrays: files of a few kilobytes crash the
usual tools or change numbers silently. So the check is not optional: one native pass over structure and
values costs less than a nanosecond a value. It also repairs what is harmless (rows out of order, repeated
columns) and counts what it saw, so that a reader can tell the user once instead of once a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.number_types import Array
from scfm.errors import BadCellError, FormatError, NotCountsError, ScfmError

__all__ = ["CountsReport", "CsrBlock", "check_indptr", "gather_rows", "validate_block"]

# Beyond this float32, the type most files use, no longer holds every integer.
_EXACT_IN_FLOAT32 = 2**24


@dataclass(frozen=True)
class CsrBlock:
    """Counts of some cells: cell ``i`` has ``data[indptr[i]:indptr[i+1]]`` in columns ``indices[...]``.

    indptr: int64 (num_cells + 1,), starting at 0; indices: int32 or int64; data: float32/64 or integers,
    raw counts; row_start: position of the first cell in the source that gave the block (a selection
    counts its own cells); rows: int64 (num_cells,), positions in the file or AnnData, whatever was
    selected from it. A validated block has ascending, distinct columns in each row; stored zeros are
    kept.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32] | NDArray[np.int64]
    data: Array
    row_start: int
    num_genes: int
    rows: NDArray[np.int64]

    @property
    def num_cells(self) -> int:
        return len(self.rows)


@dataclass
class CountsReport:
    """What the checks saw in a source's blocks so far."""

    num_cells: int = 0
    num_values: int = 0
    num_zeros: int = 0
    num_nonintegers: int = 0
    num_duplicate_rows: int = 0
    max_value: float = 0.0
    first_duplicate_block: int | None = field(default=None)
    num_bad_cells: int = 0
    bad_rows: list[int] = field(default_factory=list)

    def add(self, block: CsrBlock, check: Any) -> None:
        self.num_cells += block.num_cells
        self.num_values += len(block.data)
        self.num_zeros += check.num_zeros
        self.num_nonintegers += check.num_nonintegers
        self.num_duplicate_rows += check.duplicates
        if check.duplicates and self.first_duplicate_block is None:
            self.first_duplicate_block = int(block.rows[0])
        if len(block.data):
            self.max_value = max(self.max_value, check.max_value)

    def messages(self) -> dict[str, str]:
        """What a user should know, a sentence by kind; empty for ordinary counts."""
        found = {}
        if self.num_duplicate_rows:
            found["duplicates"] = (
                f"{self.num_duplicate_rows:,} of {self.num_cells:,} cells list a gene column more than once "
                f"(first in the block from row {self.first_duplicate_block}); the entries were summed."
            )
        if self.num_nonintegers:
            found["nonintegers"] = (
                f"{self.num_nonintegers:,} of {self.num_values:,} values are not integers; they were taken "
                "as counts because of assume_counts=True."
            )
        if self.num_bad_cells:
            found["bad cells"] = (
                f"{self.num_bad_cells:,} cells hold NaN, infinite or negative counts and were left empty "
                f"(rows {', '.join(map(str, self.bad_rows))}{' ...' if self.num_bad_cells > 5 else ''})."
            )
        if self.max_value > _EXACT_IN_FLOAT32:
            found["large"] = (
                f"the largest count is {self.max_value:,.0f}, above 2^24: float32 files hold such counts "
                "only approximately. Check that these are raw counts."
            )
        return found


def validate_block(
    block: CsrBlock,
    *,
    name: str,
    dataset: str,
    gene_names: Callable[[], Sequence[Any]],
    report: CountsReport,
    assume_counts: bool = False,
    empty_bad_cells: bool = False,
    facts: Any | None = None,
) -> CsrBlock:
    """The block, checked, with ascending distinct columns in each row; repeated columns are summed.

    empty_bad_cells: cells with NaN, infinite or negative counts come out empty, counted in the report,
    instead of raising BadCellError.

    gene_names is called only to word an error; facts: what the reader found on its way, instead of another
    pass. Raises FormatError for impossible structure, BadCellError
    for NaN, infinite or negative counts (row and gene named), NotCountsError for a non-integer unless
    assume_counts.
    """
    # Imported late: building the package must not need the module that it builds.
    from scfm import _native

    check = facts or _native.check_csr(block.indptr, block.indices, block.data, block.num_genes)
    if empty_bad_cells and check.error in ("not_finite", "negative"):
        block = _without_bad_cells(block, report)
        check = _native.check_csr(block.indptr, block.indices, block.data, block.num_genes)
    if check.error:
        raise _failure(check, block, name, dataset, gene_names)
    if check.num_nonintegers and not assume_counts:
        raise _not_counts(check, block, name, dataset, gene_names)
    report.add(block, check)
    if check.sorted and not check.duplicates:
        return block
    return _canonical(block, sum_duplicates=check.duplicates > 0)


def _without_bad_cells(block: CsrBlock, report: CountsReport) -> CsrBlock:
    """The block with every cell that holds a NaN, infinite or negative count emptied."""
    cells = np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
    bad = np.unique(cells[~np.isfinite(block.data) | (block.data < 0)])
    report.num_bad_cells += len(bad)
    report.bad_rows = [*report.bad_rows, *block.rows[bad].tolist()][:5]
    kept = ~np.isin(cells, bad)
    lengths = np.diff(block.indptr)
    lengths[bad] = 0
    return CsrBlock(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        indices=block.indices[kept],
        data=block.data[kept],
        row_start=block.row_start,
        num_genes=block.num_genes,
        rows=block.rows,
    )


def check_indptr(
    indptr: NDArray[np.int64],
    *,
    num_rows: int,
    num_values: int,
    num_columns: int,
    name: str,
    dataset: str,
    line: str = "row",
) -> None:
    """Raise FormatError unless the row pointers of a whole matrix are possible; names the first bad row."""

    def fail(message: str) -> FormatError:
        return FormatError(
            message,
            path=name,
            where=f"{dataset}/indptr",
            hint="The file is damaged or was written with 32-bit overflow; write it again from its source.",
        )

    if len(indptr) != num_rows + 1:
        raise fail(f"{len(indptr):,} entries; {num_rows:,} {line}s need {num_rows + 1:,}")
    if indptr[0] != 0:
        raise fail(f"starts at {indptr[0]}, expected 0 ({line} 0)")
    # Compared, not subtracted: differences of hostile int64 values overflow.
    decreasing = np.flatnonzero(indptr[1:] < indptr[:-1])
    if len(decreasing):
        row = int(decreasing[0])
        raise fail(f"decreases from {indptr[row]} to {indptr[row + 1]} at {line} {row}")
    if indptr[-1] != num_values:
        raise fail(
            f"ends at {indptr[-1]:,}, but {num_values:,} values are stored (last {line} {num_rows - 1})"
        )
    # Duplicates are tolerated, but this bounds the memory that one row may claim.
    lengths = np.diff(indptr)
    if len(lengths) and int(lengths.max()) > 4 * num_columns:
        row = int(lengths.argmax())
        raise fail(f"{line} {row} has {lengths[row]:,} entries for {num_columns:,} columns")


def gather_rows(
    indptr: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row pointers of the chosen rows and the positions of their values in the arrays indptr belongs to."""
    lengths = indptr[rows + 1] - indptr[rows]
    chosen = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=chosen[1:])
    positions = np.arange(chosen[-1], dtype=np.int64)
    positions += np.repeat(indptr[rows] - chosen[:-1], lengths)
    return chosen, positions


def _gene(column: int, gene_names: Callable[[], Sequence[Any]]) -> str:
    """ "gene 17 'CD3E'"; without the name where the names themselves cannot be read."""
    try:
        return f"gene {column} ({str(gene_names()[column])!r})"
    except (ScfmError, IndexError, KeyError):
        return f"gene {column}"


def _failure(
    check: Any, block: CsrBlock, name: str, dataset: str, gene_names: Callable[[], Sequence[Any]]
) -> ScfmError:
    row = int(block.rows[check.row]) if 0 <= check.row < block.num_cells else check.row
    where = f"{dataset}, row {row}"
    if check.error in ("not_finite", "negative"):
        kind = "not a finite number" if check.error == "not_finite" else "negative"
        return BadCellError(
            f"{_gene(check.column, gene_names)} has count {check.value:g}, which is {kind}",
            path=name,
            where=where,
            hint="Remove or repair this cell; raw counts are whole numbers from 0.",
        )
    if check.error == "index_range":
        message = f"column index {check.column} is outside 0..{block.num_genes - 1}"
        return FormatError(message, path=name, where=where, hint="The file is damaged; write it again.")
    return FormatError(
        f"row pointers are inconsistent ({check.error.replace('_', ' ')}); {len(block.indices)} indices, "
        f"{len(block.data)} values",
        path=name,
        where=where,
        hint="The file is damaged; write it again.",
    )


def _not_counts(
    check: Any, block: CsrBlock, name: str, dataset: str, gene_names: Callable[[], Sequence[Any]]
) -> NotCountsError:
    local = int(check.first_noninteger)
    start, stop = block.indptr[local], block.indptr[local + 1]
    values = block.data[start:stop]
    offset = int(np.flatnonzero(values != np.trunc(values))[0])
    gene = _gene(int(block.indices[start + offset]), gene_names)
    return NotCountsError(
        f"{gene} has value {values[offset]:g}, not a whole number; {check.num_nonintegers:,} of the "
        f"{len(block.data):,} values in this block are not integers",
        path=name,
        where=f"{dataset}, row {int(block.rows[local])}",
        hint="Give the layer that holds raw counts (layer=...), or assume_counts=True to take these.",
    )


def _canonical(block: CsrBlock, *, sum_duplicates: bool) -> CsrBlock:
    from scipy.sparse import csr_matrix

    data = block.data
    if sum_duplicates and data.dtype.kind in "iu":
        # uint8 200 + 100 must be 300.
        data = data.astype(np.uint64 if data.dtype == np.uint64 else np.int64)
    matrix = csr_matrix(
        (data, block.indices, block.indptr), shape=(block.num_cells, block.num_genes), copy=True
    )
    matrix.has_sorted_indices = False
    matrix.sort_indices()
    if sum_duplicates:
        matrix.has_canonical_format = False
        matrix.sum_duplicates()
    return CsrBlock(
        indptr=matrix.indptr.astype(np.int64, copy=False),
        indices=matrix.indices,
        data=matrix.data,
        row_start=block.row_start,
        num_genes=block.num_genes,
        rows=block.rows,
    )
