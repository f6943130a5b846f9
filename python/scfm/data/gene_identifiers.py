"""What the columns of a gene table hold: Ensembl ids, symbols, or neither.

Files name the same thing in a dozen ways, put symbols into ensembl_id, and carry version suffixes on some
genes only. So identifiers are recognised gene by gene and by their form: ENSG00000139618 is an Ensembl id,
the gene ENSA is a symbol although it begins alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import pandas as pd

__all__ = ["GeneColumn", "GeneTable"]

# Human ENSG, other species' ENSMUSG..., the V1 vocabulary's ENSGR (Y copies); version; Y copy of GENCODE.
_ENSEMBL = re.compile(r"(ENS(?:[A-Z]{3})?(?:G\d{11}|GR\d{10}))(\.\d+)?(_PAR_Y)?", re.IGNORECASE)

_ENSEMBL_NAMES = (
    "ensembl_id",
    "ensembl",
    "feature_id",
    "gene_ids",
    "gene_id",
    "ensembl_gene_id",
    "ensembl_ids",
    "ensemblid",
    "gene_stable_id",
    "accession",
    "id",
)
_SYMBOL_NAMES = (
    "feature_name",
    "symbol",
    "symbols",
    "gene_symbols",
    "gene_symbol",
    "gene_names",
    "gene_name",
    "hgnc_symbol",
    "gene_short_name",
    "name",
    "gene",
    "genes",
)


class GeneColumn:
    """One column (or the index) of a gene table, as text.

    texts: stripped, "" where missing; ensembl: the upper-case id without version where the text has the
    form of one, else None; versioned: positions where a version or _PAR_Y was cut off.
    """

    def __init__(self, name: str, texts: list[str]) -> None:
        self.name = name
        self.texts = [text.strip() for text in texts]

    @cached_property
    def _parsed(self) -> tuple[list[str | None], frozenset[int]]:
        ensembl: list[str | None] = [None] * len(self.texts)
        versioned = []
        for position, text in enumerate(self.texts):
            if len(text) == 15 and text[:4] == "ENSG" and text[4:].isdecimal() and text.isascii():
                # The usual case, an order of magnitude faster than the pattern.
                ensembl[position] = text
            elif text[:3] in ("ENS", "ens", "Ens"):
                match = _ENSEMBL.fullmatch(text)
                if match is not None:
                    ensembl[position] = match[1].upper()
                    if match.end(1) < len(text):
                        versioned.append(position)
        return ensembl, frozenset(versioned)

    @property
    def ensembl(self) -> list[str | None]:
        return self._parsed[0]

    @property
    def versioned(self) -> frozenset[int]:
        return self._parsed[1]

    @property
    def num_ensembl(self) -> int:
        return len(self.ensembl) - self.ensembl.count(None)


class GeneTable:
    """The identifiers in a data set's table of genes, read column by column when asked for."""

    def __init__(self, genes: pd.DataFrame) -> None:
        self.num_genes = len(genes)
        self._genes = genes
        by_name: dict[str, int] = {}
        for position, name in enumerate(genes.columns):
            by_name.setdefault(str(name).lower().replace(" ", "_").replace(".", "_"), position)
        self._by_name = by_name

    @cached_property
    def authors(self) -> GeneColumn | None:
        """The column ensembl_id; None where there is none of exactly this name."""
        return GeneColumn("ensembl_id", self.authors_texts) if self.authors_texts is not None else None

    @cached_property
    def authors_texts(self) -> list[str] | None:
        """ensembl_id exactly as it stands, unstripped."""
        places = [place for place, name in enumerate(self._genes.columns) if name == "ensembl_id"]
        return _texts(self._genes.iloc[:, places[0]]) if places else None

    @cached_property
    def index(self) -> GeneColumn:
        return GeneColumn("index", _texts(self._genes.index.to_series()))

    @cached_property
    def ensembl_named(self) -> list[GeneColumn]:
        """Columns named as if they held Ensembl ids, likeliest first."""
        return self._named(_ENSEMBL_NAMES)

    @cached_property
    def symbol_named(self) -> list[GeneColumn]:
        """Columns named as if they held symbols, likeliest first."""
        return self._named(_SYMBOL_NAMES)

    @property
    def ensembl(self) -> list[GeneColumn]:
        """Where to look for Ensembl ids; columns of symbols hold them too, for genes without a name."""
        return [*self.ensembl_named, self.index, *self.symbol_named]

    @property
    def symbols(self) -> list[GeneColumn]:
        """Where to look for symbols: in columns meant for ids too, but there last."""
        return [*self.symbol_named, self.index, *self.ensembl_named]

    def names(self, positions: Iterable[int]) -> list[str]:
        """What to call these genes: the symbol, else the Ensembl id, else whatever the table says first."""
        wanted = list(positions)
        found = dict.fromkeys(wanted, "")
        for column in self._naming_columns():
            if not wanted:
                break
            for position in wanted:
                found[position] = column[position]
            wanted = [position for position in wanted if not found[position]]
        return list(found.values())

    def _naming_columns(self) -> Iterator[list[str]]:
        for column in self.symbol_named:
            yield column.texts
        for column in self.ensembl_named:
            yield [text if text[:3].upper() == "ENS" else "" for text in column.texts]
        yield self.index.texts
        for column in self.ensembl_named:
            yield column.texts

    def _named(self, names: tuple[str, ...]) -> list[GeneColumn]:
        found = [self._by_name[name] for name in names if name in self._by_name]
        return [GeneColumn(str(self._genes.columns[i]), _texts(self._genes.iloc[:, i])) for i in found]


def _texts(column: pd.Series) -> list[str]:
    """A column as text, unstripped; "" where missing."""
    values = column.astype(object).tolist()
    return values if set(map(type, values)) <= {str} else [_text(value) for value in values]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None or value is pd.NA or value != value else str(value)
