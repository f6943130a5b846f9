"""How much of a data set a model can see: genes, and counts, that were matched to its vocabulary.

A model embeds whatever it is given, also three genes out of twenty thousand. This is the line that tells
the user.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CoverageReport"]

_ROUTE_WORDS = {
    "ensembl": "by Ensembl id",
    "ensembl_version": "by Ensembl id without its version",
    "authors_symbol": "by symbol",
    "symbol_table": "by symbol (package table)",
    "ortholog": "by one-to-one orthologue",
    "upper_cased": "by upper-cased symbol",
}
_NAMED = 10


@dataclass
class CoverageReport:
    """Genes of the data set, those mapped, and by which route; counts are added by whoever reads the cells.

    ambiguous: symbol -> the ids it may stand for; missing: genes without a token, as the data set names them.
    """

    num_genes: int
    num_mapped: int
    by_route: dict[str, int]
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    mapped_counts: float = 0.0
    total_counts: float = 0.0

    def add_counts(self, mapped_sum: float, total_sum: float) -> None:
        """Add some cells' counts: those of mapped genes, and all."""
        self.mapped_counts += float(mapped_sum)
        self.total_counts += float(total_sum)

    @property
    def share_of_genes(self) -> float:
        """Mapped genes / genes; 0 for a data set without genes."""
        return self.num_mapped / self.num_genes if self.num_genes else 0.0

    @property
    def share_of_counts(self) -> float | None:
        """Mapped counts / counts; None before any count was added."""
        return self.mapped_counts / self.total_counts if self.total_counts else None

    def __str__(self) -> str:
        share = self.share_of_counts
        counts = "" if share is None else f" and {100 * share:.1f} % of counts"
        routes = ", ".join(
            f"{number:,} {_ROUTE_WORDS[route]}"
            for route, number in self.by_route.items()
            if route in _ROUTE_WORDS and number
        )
        line = f"{self.num_mapped:,} of {self.num_genes:,} genes{counts} mapped"
        parts = [f"{line} ({routes})" if routes else line]
        if self.ambiguous:
            parts.append(f"{len(self.ambiguous):,} ambiguous: {_some(list(self.ambiguous))}")
        if self.missing:
            parts.append(f"{len(self.missing):,} missing, e.g. {_some(self.missing)}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; at most ten ambiguous and missing genes are named."""
        return {
            "num_genes": self.num_genes,
            "num_mapped": self.num_mapped,
            "share_of_genes": self.share_of_genes,
            "share_of_counts": self.share_of_counts,
            "by_route": dict(self.by_route),
            "num_ambiguous": len(self.ambiguous),
            "ambiguous": {name: list(self.ambiguous[name]) for name in list(self.ambiguous)[:_NAMED]},
            "num_missing": len(self.missing),
            "missing": self.missing[:_NAMED],
        }


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
