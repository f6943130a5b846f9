"""The table of cells (obs), readable a column at a time.

A tokenizer wants one column of fifty million cells, and a damaged or huge column that nobody asked for must
not stand in its way. Each file format says here which columns there are and how one of them is read; the
table as a whole is read only for those who want all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import pandas as pd

__all__ = ["CellTable", "LoadedTable", "TableInMemory"]


class CellTable(ABC):
    """obs of one file or object; calling it gives the whole table."""

    @abstractmethod
    def __call__(self) -> pd.DataFrame:
        """All columns, with the cells' names as index."""

    @abstractmethod
    def names(self) -> list[str]:
        """The columns, in order, without the index."""

    @abstractmethod
    def column(self, name: str) -> pd.Series | None:
        """One column with rows numbered from 0, nothing else read; None where there is no such column."""


class TableInMemory(CellTable):
    """A data frame that lies in memory, or that can only be had as a whole."""

    def __init__(self, load: Callable[[], pd.DataFrame]) -> None:
        self._load = load

    def __call__(self) -> pd.DataFrame:
        return self._load()

    def names(self) -> list[str]:
        return [str(name) for name in self().columns]

    def column(self, name: str) -> pd.Series | None:
        table = self()
        if name not in table.columns:
            return None
        column = table[name]
        # A repeated name gives a table: the first of them, as h5ad files could not hold the others.
        series = column if isinstance(column, pd.Series) else column.iloc[:, 0]
        return series.reset_index(drop=True)


class LoadedTable(TableInMemory):
    """A data frame that is there already."""

    def __init__(self, table: pd.DataFrame) -> None:
        self._table = table

    def __call__(self) -> pd.DataFrame:
        return self._table
