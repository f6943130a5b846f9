"""From the genes of a data set to the Ensembl ids that are tokens of a model.

Two rules. The authors' rule reproduces Geneformer's tokenizer to the gene: var["ensembl_id"], looked up
upper-cased in their dictionary, everything else left out. The general rule takes what real files hold: ids
with versions, ids or symbols in any of a dozen columns, gene by gene. ``rules="auto"`` follows the authors
wherever their rule finds what it expects, and says how many genes the general rule might add.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cache

import pandas as pd

from scfm.data.coverage import CoverageReport
from scfm.data.gene_identifiers import GeneColumn, GeneTable
from scfm.data.gene_tables import human_symbols, mouse_orthologs
from scfm.errors import GeneMappingError, InvalidArgumentError

__all__ = ["GeneMapping", "map_genes", "refuse_murine"]

_RULES = ("auto", "authors", "all")
_SPECIES = ("human", "mouse")
# Murine data: at least the first share of the genes is known as murine (the orthologue table holds
# about a third of all murine genes), and less than the second maps as it is written.
_MURINE_SHARE = 0.05
_MAPPED_SHARE = 0.1
# Of a column's open genes, the share that must be found when upper-cased for any of them to count.
_UPPER_SHARE = 0.2


@dataclass(frozen=True)
class GeneMapping:
    """One entry a column of the counts.

    ids: Ensembl id in the model's vocabulary, or None; keys: the identifier that led there, or None;
    routes: "ensembl", "ensembl_version", "authors_symbol", "symbol_table", "ortholog", "upper_cased" or "unmapped".
    collapse: columns with the same id are to be summed; when False, repeated ids stay apart, as the authors
    do it. ambiguous: symbol -> its possible ids, all in the vocabulary; missing: names of the genes without
    id; notes: sentences for the user, to be shown as warnings.
    """

    ids: list[str | None]
    keys: list[str | None]
    routes: list[str]
    collapse: bool
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_mapped(self) -> int:
        return sum(gene is not None for gene in self.ids)

    def coverage(self) -> CoverageReport:
        """A fresh report on these genes, to which the reader of the cells adds the counts."""
        return CoverageReport(
            num_genes=len(self.ids),
            num_mapped=self.num_mapped,
            by_route=dict(Counter(self.routes)),
            ambiguous=self.ambiguous,
            missing=self.missing,
        )


def map_genes(
    genes: pd.DataFrame,
    *,
    known: Mapping[str, str],
    vocabulary: Collection[str],
    symbols: Mapping[str, str] | None = None,
    species: str = "human",
    rules: str = "auto",
) -> GeneMapping:
    """Match the genes of a data set to a model's vocabulary.

    genes: the table of genes, one row a column of the counts (var). known: the authors' mapping, upper-case
    key (Ensembl id; in V2 also symbol or alias) -> id in the vocabulary. vocabulary: the ids that are
    tokens. symbols: the authors' symbol -> id. species: "mouse" goes through one-to-one orthologues. rules:
    "authors" is their exact rule on the column ensembl_id; "all" takes every column and form of identifier;
    "auto" is "authors" unless most ids there carry versions or none maps, or there is no such column. In
    either rule columns are summed (``collapse``) when different identifiers lead to one id. Raises
    GeneMappingError when no gene maps or the data look murine, InvalidArgumentError for unknown options.
    """
    _check_options(genes, species, rules)
    dictionaries = _Dictionaries(known, vocabulary, symbols or {})
    search = _Search(genes)
    if species == "mouse":
        mapping = _mouse_rule(search, dictionaries)
    elif rules == "authors" or (rules == "auto" and _authors_rule_fits(search, dictionaries)):
        if rules == "auto":
            refuse_murine(search.table, sum(text in known for text in search.table.authors_texts or []))
        mapping = _authors_rule(search, dictionaries)
    else:
        mapping = _general_rule(search, dictionaries)
    if not mapping.num_mapped:
        raise _nothing_mapped(search, dictionaries, species, rules)
    return mapping


# What a symbol leads to: order of the rule that found it (the lowest counts), the id, the route.
_Found = tuple[int, str, str]


class _Dictionaries:
    """The authors' dictionaries and the package's table, every answer an id in the vocabulary or None."""

    def __init__(
        self, known: Mapping[str, str], vocabulary: Collection[str], symbols: Mapping[str, str]
    ) -> None:
        self.known = known
        self.vocabulary = (
            vocabulary if isinstance(vocabulary, AbstractSet | Mapping) else frozenset(vocabulary)
        )
        self.symbols = symbols
        self.table_tokens = cache(self._table_tokens)

    def token(self, gene: str | None) -> str | None:
        """The vocabulary's id for an Ensembl id, also through the authors' aliases."""
        if gene is None:
            return None
        found = self.known.get(gene, gene)
        return found if found in self.vocabulary else None

    def known_token(self, key: str) -> str | None:
        found = self.known.get(key)
        return found if found in self.vocabulary else None

    def _table_tokens(self, symbol: str) -> list[str]:
        """Every token that the package's table allows for a symbol."""
        tokens = (self.token(gene) for gene in human_symbols().get(symbol, ()))
        return sorted({gene for gene in tokens if gene is not None})

    def symbol(self, text: str) -> _Found | None:
        """The authors' mapping, their symbols, then the package's table where that leaves no choice."""
        gene = self.known_token(text)
        if gene is not None:
            return 0, gene, "authors_symbol"
        gene = self.token(self.symbols.get(text))
        if gene is not None:
            return 1, gene, "authors_symbol"
        tokens = self.table_tokens(text) if text in human_symbols() else ()
        return (2, tokens[0], "symbol_table") if len(tokens) == 1 else None


class _Search:
    """The gene table and what has been found in it so far. open: positions without an id yet."""

    def __init__(self, genes: pd.DataFrame) -> None:
        self.table = GeneTable(genes)
        self.num_genes = len(genes)
        self.ids: list[str | None] = [None] * self.num_genes
        self.keys: list[str | None] = [None] * self.num_genes
        self.routes = ["unmapped"] * self.num_genes
        self.open = list(range(self.num_genes))

    def take(self, position: int, gene: str, key: str, route: str) -> None:
        self.ids[position], self.keys[position], self.routes[position] = gene, key, route

    def close(self) -> None:
        """Forget the positions that were taken since the last call."""
        ids = self.ids
        self.open = [position for position in self.open if ids[position] is None]

    def result(self, *, collapse: bool, ambiguous: dict[str, list[str]], notes: list[str]) -> GeneMapping:
        names = dict.fromkeys(self.table.names(self.open))
        missing = [name for name in names if name and name not in ambiguous]
        return GeneMapping(self.ids, self.keys, self.routes, collapse, ambiguous, missing, notes)


def _check_options(genes: object, species: str, rules: str) -> None:
    if not isinstance(genes, pd.DataFrame):
        raise InvalidArgumentError(f"is a {type(genes).__name__}, expected a DataFrame", where="genes")
    if species not in _SPECIES:
        raise InvalidArgumentError(f"is {species!r}, expected one of {', '.join(_SPECIES)}", where="species")
    if rules not in _RULES:
        raise InvalidArgumentError(f"is {rules!r}, expected one of {', '.join(_RULES)}", where="rules")
    if species == "mouse" and rules == "authors":
        raise InvalidArgumentError(
            "the authors' rule knows no murine genes; with species='mouse' leave rules at 'auto'",
            where="rules",
        )
    if rules == "authors" and "ensembl_id" not in genes.columns:
        raise GeneMappingError(
            "the authors' rule needs a column 'ensembl_id'; there are: "
            f"{', '.join(map(str, genes.columns)) or 'none'}",
            where="genes",
            hint="Leave rules at 'auto' to look in other columns too.",
        )


def _authors_rule_fits(search: _Search, dictionaries: _Dictionaries) -> bool:
    column = search.table.authors
    if column is None or 2 * len(column.versioned) > column.num_ensembl:
        return False
    return any(dictionaries.known_token(text.upper()) for text in search.table.authors_texts or [])


def _authors_rule(search: _Search, dictionaries: _Dictionaries) -> GeneMapping:
    """id = known[ensembl_id.upper()]; summed only where two of the known keys, as written, lead to one id."""
    known, texts, column = dictionaries.known, search.table.authors_texts, search.table.authors
    assert texts is not None
    assert column is not None
    for position, text in enumerate(texts):
        gene = dictionaries.known_token(text.upper())
        if gene is not None:
            route = "authors_symbol" if column.ensembl[position] is None else "ensembl"
            search.take(position, gene, text, route)
    search.close()
    keys = {text for text in texts if text in known}
    collapse = len(keys) != len({known[key] for key in keys})
    notes = _left_out_notes(search, column, dictionaries)
    return search.result(collapse=collapse, ambiguous={}, notes=notes)


def _left_out_notes(search: _Search, column: GeneColumn, dictionaries: _Dictionaries) -> list[str]:
    """What the general rule would find in ensembl_id and the authors' rule does not."""
    versioned: list[str] = []
    symbols: list[str] = []
    for position in search.open:
        text = column.texts[position]
        if column.ensembl[position] is None:
            if text and dictionaries.symbol(text) is not None:
                symbols.append(text)
        elif position in column.versioned and dictionaries.token(column.ensembl[position]) is not None:
            versioned.append(text)
    return [
        f"{len(texts):,} {kind} in ensembl_id were left out, as the original does (e.g. {texts[0]}); "
        "gene_rules='all' takes them."
        for kind, texts in (("ids with a version suffix", versioned), ("symbols", symbols))
        if texts
    ]


def _num_repeats(ids: list[str | None]) -> int:
    found = [gene for gene in ids if gene is not None]
    return len(found) - len(set(found))


def _shared_ids(search: _Search) -> tuple[bool, list[str]]:
    """The authors' choice for any identifiers: summed if two different ones lead to one id, else apart."""
    pairs = {(gene, key) for gene, key in zip(search.ids, search.keys, strict=True) if gene is not None}
    collapse = len(pairs) != len({gene for gene, _ in pairs})
    repeated = _num_repeats(search.ids)
    if not collapse:
        return False, []
    return True, [f"{repeated:,} genes share an id with another; their counts are summed."]


def _general_rule(search: _Search, dictionaries: _Dictionaries) -> GeneMapping:
    """Ensembl ids of any column, then symbols: as written, at last upper-cased."""
    _take_ensembl(search, dictionaries.token)
    ambiguous = _ambiguous_symbols(search, dictionaries)
    _take_symbols(search, dictionaries.symbol)
    # Before upper-casing: that would turn murine Cd3e into human CD3E without a word.
    refuse_murine(search.table, search.num_genes - len(search.open))

    def upper_cased(text: str) -> _Found | None:
        return None if text.isupper() or text in ambiguous else dictionaries.symbol(text.upper())

    _take_symbols(search, upper_cased, least_share=_UPPER_SHARE)
    # An ambiguous symbol may have been settled by another column of the same gene.
    unsettled = {column.texts[position] for column in search.table.symbols for position in search.open}
    ambiguous = {symbol: tokens for symbol, tokens in ambiguous.items() if symbol in unsettled}
    collapse, notes = _shared_ids(search)
    return search.result(collapse=collapse, ambiguous=ambiguous, notes=notes)


def _take_ensembl(search: _Search, token: Callable[[str | None], str | None], route: str = "") -> None:
    for column in search.table.ensembl:
        for position in search.open:
            gene = token(column.ensembl[position])
            if gene is not None:
                by = "ensembl_version" if position in column.versioned else "ensembl"
                search.take(position, gene, column.texts[position], route or by)
        search.close()


def _take_symbols(search: _Search, find: Callable[[str], _Found | None], *, least_share: float = 0.0) -> None:
    """Of all columns' symbols for a gene the one found by the earliest rule, of these the likeliest column's.

    A gene that bears an Ensembl id is that gene and no other: its symbol, which may have been given to
    another gene since, is not tried. A column of which less than ``least_share`` is found is passed over:
    its few hits are placeholders (g16, x3) that happen to spell a gene.
    """
    best: dict[int, tuple[_Found, str]] = {}
    named = {i for column in search.table.ensembl for i in search.open if column.ensembl[i] is not None}
    positions = [position for position in search.open if position not in named]
    for column in search.table.symbols:
        texts = column.texts
        hits = [(i, texts[i], find(texts[i])) for i in positions if texts[i]]
        if sum(found is not None for _, _, found in hits) < least_share * len(hits):
            continue
        for position, text, found in hits:
            if found is not None and (position not in best or found[0] < best[position][0][0]):
                best[position] = found, text
    for position, ((_, gene, route), text) in best.items():
        search.take(position, gene, text, route)
    search.close()


def _ambiguous_symbols(search: _Search, dictionaries: _Dictionaries) -> dict[str, list[str]]:
    """Symbols that only the package's table knows, with several possible tokens: named, not guessed."""
    listed = human_symbols() if search.open else {}
    ambiguous: dict[str, list[str]] = {}
    for column in search.table.symbols:
        for position in search.open:
            text = column.texts[position]
            if text in listed and text not in ambiguous and dictionaries.symbol(text) is None:
                tokens = dictionaries.table_tokens(text)
                if len(tokens) > 1:
                    ambiguous[text] = tokens
    return ambiguous


def _mouse_rule(search: _Search, dictionaries: _Dictionaries) -> GeneMapping:
    """Murine ids and symbols through one-to-one orthologues; nothing is upper-cased or guessed."""
    orthologs = mouse_orthologs()

    def by_ensembl(gene: str | None) -> str | None:
        return dictionaries.token(orthologs.by_ensembl.get(gene or ""))

    def by_symbol(symbol: str) -> _Found | None:
        gene = dictionaries.token(orthologs.by_symbol.get(symbol))
        return None if gene is None else (0, gene, "ortholog")

    _take_ensembl(search, by_ensembl, "ortholog")
    _take_symbols(search, by_symbol)
    several = 0
    for position in search.open:
        ids = (column.ensembl[position] for column in search.table.ensembl)
        names = (*ids, *(column.texts[position] for column in search.table.symbols))
        several += any(name in orthologs.several for name in names)
    notes = []
    if several:
        notes.append(
            f"{several:,} murine genes have several human orthologues and were left out; only one-to-one "
            "orthologues are mapped."
        )
    collapse, shared = _shared_ids(search)
    return search.result(collapse=collapse, ambiguous={}, notes=[*notes, *shared])


def refuse_murine(table: GeneTable, num_human: int) -> None:
    """Raise GeneMappingError when far more genes are murine than map as they are written."""
    if not table.num_genes or num_human >= _MAPPED_SHARE * table.num_genes:
        return
    murine = mouse_orthologs().symbols
    found: set[int] = set()
    for column in table.ensembl:
        found.update(i for i, gene in enumerate(column.ensembl) if gene and gene.startswith("ENSMUSG"))
    for column in table.symbols:
        found.update(i for i, text in enumerate(column.texts) if text in murine)
    if len(found) >= _MURINE_SHARE * table.num_genes and len(found) > 5 * num_human:
        examples = ", ".join(table.names(sorted(found)[:5]))
        raise GeneMappingError(
            f"the genes look murine ({len(found):,} of {table.num_genes:,}, e.g. {examples}) and the model's "
            "are human",
            where="genes",
            hint="Give species='mouse' to map them through one-to-one orthologues.",
        )


def _nothing_mapped(
    search: _Search, dictionaries: _Dictionaries, species: str, rules: str
) -> GeneMappingError:
    if not search.num_genes:
        return GeneMappingError("the data set has no genes", where="genes")
    column = max(search.table.ensembl, key=lambda entry: entry.num_ensembl)
    names = column.texts if column.num_ensembl else search.table.names(range(search.num_genes))
    examples = ", ".join([name for name in names if name][:5])
    return GeneMappingError(
        f"none of the {search.num_genes:,} genes is in the model's vocabulary of "
        f"{len(dictionaries.vocabulary):,} (e.g. {examples or 'only empty names'})",
        where="genes",
        hint=_likely_fix(search, column, species, rules),
    )


def _likely_fix(search: _Search, column: GeneColumn, species: str, rules: str) -> str:
    prefixes = Counter(gene[: gene.index("G", 3)] for gene in column.ensembl if gene is not None)
    common = prefixes.most_common(1)[0][0] if prefixes else ""
    if species == "mouse":
        if common == "ENS":
            return "These are human Ensembl ids: leave species at 'human'."
        return "Give murine Ensembl ids (ENSMUSG...) or symbols (Cd3e) in var, or leave species at 'human'."
    if common == "ENSMUS":
        return "These are murine ids: give species='mouse'."
    if common not in ("", "ENS"):
        return f"Ids beginning with {common}G belong to another species; this model knows human genes."
    if rules == "authors":
        return "The authors' rule takes neither versions nor unknown symbols: try gene_rules='all'."
    names = [name for name in search.table.names(range(search.num_genes)) if name]
    if _mostly(name.isdigit() for name in names):
        return "The genes are only numbered: put Ensembl ids or symbols into var.index or var['ensembl_id']."
    if _mostly(name.upper().startswith("ENST") for name in names):
        return "These are transcripts: sum their counts by gene and give Ensembl gene ids."
    return "Put human Ensembl gene ids (ENSG...) or symbols into var['ensembl_id'] or var.index."


def _mostly(checks: Iterable[bool]) -> bool:
    found = list(checks)
    return 2 * sum(found) > len(found)
