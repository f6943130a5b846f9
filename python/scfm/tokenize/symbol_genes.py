"""From the genes of a data set to the symbols that are tokens of a model.

Two rules, as for models of Ensembl ids. The authors' rule takes one column of symbols and every gene that is written
there exactly as in the vocabulary. The general rule goes on with the other columns, then with Ensembl ids through
the package's table, for genes that are still open, and never takes a token that some gene of the file bears by name.
Murine genes go through one-to-one orthologues and, as users of the original do, by upper-casing the rest. The
coverage report counts each way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import pandas as pd

from scfm.data.gene_identifiers import GeneColumn, GeneTable
from scfm.data.gene_mapping import GeneMapping, refuse_murine
from scfm.data.gene_tables import human_symbols, mouse_orthologs
from scfm.errors import GeneMappingError, InvalidArgumentError

__all__ = ["map_symbols"]

_SPECIES = ("human", "mouse")
_RULES = ("auto", "authors", "all")
_AUTHORS_COLUMN = "feature_name"
# The authors' rule fits where it maps this share of the genes.
_FITTING_SHARE = 0.1


def map_symbols(
    genes: pd.DataFrame,
    vocabulary: Mapping[str, int],
    *,
    gene_column: str | None = None,
    rules: str = "auto",
    species: str = "human",
) -> GeneMapping:
    """Match the genes of a data set to a vocabulary of human symbols.

    genes: the table of genes, one row a column of the counts (var). vocabulary: its keys are the symbols.
    gene_column: the only column to look at ("index" for var.index). rules: "authors" is their exact rule, on
    gene_column or feature_name; "all" is the general rule; "auto" is the authors' on the column that maps most genes,
    and the general one where that maps few. species: "mouse" for murine ids or symbols. The mapping's ids are symbols
    of the vocabulary; columns that bear the same symbol keep it. Raises GeneMappingError when nothing maps or human
    data look murine, InvalidArgumentError for other arguments.
    """
    if species not in _SPECIES:
        raise InvalidArgumentError(f"is {species!r}, expected one of {', '.join(_SPECIES)}", where="species")
    if rules not in _RULES:
        raise InvalidArgumentError(f"is {rules!r}, expected one of {', '.join(_RULES)}", where="gene_rules")
    if rules == "authors" and gene_column is None:
        gene_column = _AUTHORS_COLUMN
    if gene_column is not None:
        genes = _only(genes, gene_column)
    if species == "mouse":
        search = _murine(_Search(genes, vocabulary))
    elif rules == "authors" or (gene_column is not None and rules == "auto"):
        search = _by_name(_Search(genes, vocabulary), only_best=True)
        refuse_murine(search.table, search.num_mapped)
    else:
        search = _human(genes, vocabulary, rules)
    if not search.num_mapped:
        raise _nothing_mapped(search, species, gene_column)
    return search.result()


def _human(genes: pd.DataFrame, vocabulary: Mapping[str, int], rules: str) -> _Search:
    general = _by_name(_Search(genes, vocabulary), only_best=False)
    general.take_ensembl(str, "ensembl")
    if rules == "auto":
        authors = _by_name(_Search(genes, vocabulary), only_best=True)
        if authors.num_mapped >= _FITTING_SHARE * len(genes):
            more = general.num_mapped - authors.num_mapped
            if more:
                authors.notes.append(
                    f"{more:,} genes more map by Ensembl id or another column than by symbol, as the original does it; "
                    "gene_rules='all' takes them."
                )
            return authors
    refuse_murine(general.table, general.num_mapped)
    return general


def _by_name(search: _Search, *, only_best: bool) -> _Search:
    """Symbols exactly as in the vocabulary: of the column that maps most genes, or of all, likeliest first."""
    columns = search.table.symbols
    if only_best:
        columns = [max(columns, key=search.num_named)]
    search.take_symbols(columns, str, "authors_symbol")
    return search


def _murine(search: _Search) -> _Search:
    orthologs, columns = mouse_orthologs(), search.table.symbols
    search.take_ensembl(orthologs.by_ensembl.get, "ortholog")
    search.take_symbols(columns, lambda text: search.symbol_of(orthologs.by_symbol.get(text)), "ortholog")
    search.take_symbols(columns, str.upper, "upper_cased")
    return search


def _only(genes: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table reduced to one column of symbols."""
    if column == "index":
        return pd.DataFrame(index=genes.index)
    if column not in genes.columns:
        raise GeneMappingError(
            f"there is no column {column!r} of genes; there are: index, {', '.join(map(str, genes.columns))}",
            where="gene_column",
        )
    places = [place for place, name in enumerate(genes.columns) if name == column]
    if len(places) > 1:
        raise GeneMappingError(f"{len(places)} columns of genes are named {column!r}", where="gene_column")
    return pd.DataFrame(index=pd.Index(genes.iloc[:, places[0]].astype(object)))


class _Search:
    """The gene table and what has been found in it so far."""

    def __init__(self, genes: pd.DataFrame, vocabulary: Mapping[str, int]) -> None:
        self.table = GeneTable(genes)
        self.vocabulary = vocabulary
        self.ids: list[str | None] = [None] * len(genes)
        self.keys: list[str | None] = [None] * len(genes)
        self.routes = ["unmapped"] * len(genes)
        self.open = list(range(len(genes)))
        self.notes: list[str] = []

    @property
    def num_mapped(self) -> int:
        return len(self.ids) - len(self.open)

    def num_named(self, column: GeneColumn) -> int:
        """Genes of the column that are written exactly as in the vocabulary."""
        return sum(text in self.vocabulary for text in column.texts)

    def take_symbols(
        self, columns: Sequence[GeneColumn], symbol_of: Callable[[str], str | None], route: str
    ) -> None:
        """Genes whose symbol, or what ``symbol_of`` makes of it, is in the vocabulary.

        Another route than by name takes no token that is taken.
        """
        taken = set() if route == "authors_symbol" else set(self.ids)
        for column in columns:
            for position in self.open:
                text = column.texts[position]
                symbol = symbol_of(text) if text else None
                if symbol in self.vocabulary and symbol not in taken and not _is_special(symbol):
                    self._take(position, symbol, text, route)
            self._close()

    def take_ensembl(self, gene_of: Callable[[str], str | None], route: str) -> None:
        """Genes whose Ensembl id is, or leads through ``gene_of`` to, that of a gene in the vocabulary."""
        taken = set(self.ids)
        for column in self.table.ensembl:
            for position in self.open:
                own = column.ensembl[position]
                symbol = self.symbol_of(gene_of(own)) if own else None
                if symbol is not None and symbol not in taken:
                    versioned = route == "ensembl" and position in column.versioned
                    self._take(
                        position, symbol, column.texts[position], "ensembl_version" if versioned else route
                    )
            self._close()

    def symbol_of(self, gene: str | None) -> str | None:
        """How the vocabulary calls a human Ensembl id; where genes share a symbol, CELLxGENE adds the id to it."""
        if gene is None:
            return None
        symbol = _symbols_of_genes().get(gene)
        names = (gene,) if symbol is None else (f"{symbol}_{gene}", symbol, gene)
        return next((name for name in names if name in self.vocabulary), None)

    def _take(self, position: int, gene: str | None, key: str, route: str) -> None:
        self.ids[position], self.keys[position], self.routes[position] = gene, key, route

    def _close(self) -> None:
        self.open = [position for position in self.open if self.ids[position] is None]

    def result(self) -> GeneMapping:
        missing = list(dict.fromkeys(name for name in self.table.names(self.open) if name))
        return GeneMapping(
            self.ids, self.keys, self.routes, collapse=False, missing=missing, notes=self.notes
        )


def _is_special(name: str | None) -> bool:
    return name is not None and name.startswith("<")


@cache
def _symbols_of_genes() -> dict[str, str]:
    """Human Ensembl id -> symbol."""
    return {gene: symbol for symbol, genes in human_symbols().items() for gene in genes}


def _nothing_mapped(search: _Search, species: str, gene_column: str | None) -> GeneMappingError:
    num_genes = len(search.ids)
    if not num_genes:
        return GeneMappingError("the data set has no genes", where="genes")
    names = [name for name in search.table.names(range(num_genes)) if name]
    if species == "mouse":
        hint = "Give murine symbols (Cd3e) or Ensembl ids (ENSMUSG...), or leave species at 'human'."
    elif 2 * sum(name.isdigit() for name in names) > len(names):
        hint = "The genes are only numbered: put gene symbols into var.index or var['feature_name']."
    elif gene_column is not None:
        hint = "Leave gene_column and gene_rules out to look in all columns, for Ensembl ids too."
    else:
        hint = "Put human gene symbols or Ensembl ids (ENSG...) into var.index or var['feature_name']."
    return GeneMappingError(
        f"none of the {num_genes:,} genes is in the vocabulary of {len(search.vocabulary):,} tokens "
        f"(e.g. {', '.join(names[:5]) or 'only empty names'})",
        where="genes",
        hint=hint,
    )
