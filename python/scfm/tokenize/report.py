"""What tokenizing did to a source's cells and genes: the lines that tell a user whether to trust the result.

A list of sources has one report of its totals and, under it, one a part: each part has its own genes, so
coverage, library sizes and notes only make sense part by part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scfm.data.coverage import CoverageReport

__all__ = ["TokenizeReport", "total_of"]


@dataclass
class TokenizeReport:
    """What happened to one source's cells and genes.

    num_empty: cells without any known gene; num_filtered: cells left out by obs["filter_pass"];
    num_truncated: cells with more genes than fit; num_tokens: of all cells, special tokens included.
    library_size_from, values: where the library sizes come from and what the values are like, for the families that
    ask; None otherwise.
    parts: for a list of sources, the report of each part; ``coverage`` then adds up the parts' columns.
    """

    source: str
    counts_from: str
    library_size_from: str | None
    coverage: CoverageReport
    num_cells: int = 0
    num_empty: int = 0
    num_filtered: int = 0
    num_truncated: int = 0
    num_tokens: int = 0
    num_stored_zeros: int = 0
    values: str | None = None
    notes: list[str] = field(default_factory=list)
    parts: list[TokenizeReport] = field(default_factory=list)

    def __str__(self) -> str:
        share = self.coverage.share_of_counts
        over_parts = "" if share is None else f", {100 * share:.1f} % of counts mapped"
        origin = f"{'counts' if self.values is None else 'values'} from {self.counts_from}"
        if self.values is not None:
            origin += f" ({self.values})"
        if self.library_size_from is not None:
            origin += f", library size from {self.library_size_from}"
        lines = [
            f"{self.source}: {self.num_cells:,} cells, {origin}",
            f"{len(self.parts):,} parts{over_parts}" if self.parts else str(self.coverage),
            f"{self.num_tokens:,} tokens; {self.num_truncated:,} cells truncated, {self.num_empty:,} without "
            f"a known gene, {self.num_filtered:,} left out by filter_pass",
            *self.notes,
        ]
        for part in self.parts:
            lines += [f"  {part.source}: {part.num_cells:,} cells; {part.coverage}"]
            lines += [f"    {note}" for note in part.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; parts by number, as AnnData's ``uns`` takes no list of mappings."""
        plain = {key: value for key, value in vars(self).items() if key not in ("coverage", "notes", "parts")}
        plain |= {"coverage": self.coverage.to_dict(), "notes": list(self.notes)}
        if self.parts:
            plain["parts"] = {str(number): part.to_dict() for number, part in enumerate(self.parts)}
        return plain


def total_of(name: str, parts: Sequence[TokenizeReport]) -> TokenizeReport:
    """A report for all the parts, before any cell has passed."""
    routes: dict[str, int] = {}
    for part in parts:
        for route, number in part.coverage.by_route.items():
            routes[route] = routes.get(route, 0) + number
    coverage = CoverageReport(
        num_genes=sum(part.coverage.num_genes for part in parts),
        num_mapped=sum(part.coverage.num_mapped for part in parts),
        by_route=routes,
        ambiguous={name: ids for part in parts for name, ids in part.coverage.ambiguous.items()},
        missing=list(dict.fromkeys(name for part in parts for name in part.coverage.missing)),
    )
    return TokenizeReport(
        source=name,
        counts_from=", ".join(dict.fromkeys(part.counts_from for part in parts)),
        library_size_from=_joined([part.library_size_from for part in parts]),
        coverage=coverage,
        parts=list(parts),
    )


def _joined(texts: Sequence[str | None]) -> str | None:
    said = dict.fromkeys(text for text in texts if text is not None)
    return ", ".join(said) if said else None
