"""Plans of the gene tables seen last, so that the shards, epochs and files of one atlas share one plan.

Mapping twenty thousand genes takes as long as tokenizing thousands of cells. Tables are compared by their
contents, against copies: a table that its owner has changed in place is another table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import pandas as pd

from scfm.data.gene_mapping import GeneMapping

__all__ = ["PlannedGenes"]

_MOST_TABLES = 8

PlanT = TypeVar("PlanT")


class PlannedGenes(Generic[PlanT]):
    """plan: works out mapping and plan of a gene table and a species; must depend on nothing that changes."""

    def __init__(self, plan: Callable[[pd.DataFrame, str], tuple[GeneMapping, PlanT]]) -> None:
        self._plan = plan
        self._known: list[tuple[str, pd.DataFrame, tuple[GeneMapping, PlanT]]] = []

    def of(self, genes: pd.DataFrame, species: str) -> tuple[GeneMapping, PlanT]:
        for place, (its_species, table, planned) in enumerate(self._known):
            if its_species == species and table.equals(genes):
                self._known.append(self._known.pop(place))
                return planned
        planned = self._plan(genes, species)
        self._known = [*self._known[1 - _MOST_TABLES :], (species, genes.copy(deep=True), planned)]
        return planned
