"""The gene tables that ship with the package: human symbols and human-mouse orthologues.

They serve where the authors' dictionaries are silent. Each table is read once, when first needed; where
they come from is said in tables/README.md.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

__all__ = ["MouseOrthologs", "human_symbols", "mouse_orthologs"]


@dataclass(frozen=True)
class MouseOrthologs:
    """Murine genes and their human counterparts.

    by_ensembl, by_symbol: one-to-one pairs only, to the human Ensembl id; several: murine Ensembl ids and
    symbols with more than one counterpart; symbols: every murine symbol in the table that is no human
    symbol too.
    """

    by_ensembl: dict[str, str]
    by_symbol: dict[str, str]
    several: frozenset[str]
    symbols: frozenset[str]


@cache
def human_symbols() -> dict[str, tuple[str, ...]]:
    """Human gene symbol -> every Ensembl id that bears it (GENCODE v44)."""
    found: dict[str, list[str]] = {}
    for gene, symbol in _rows("human_genes.tsv.gz"):
        found.setdefault(symbol, []).append(gene)
    return {symbol: tuple(genes) for symbol, genes in found.items()}


@cache
def mouse_orthologs() -> MouseOrthologs:
    """Human-mouse orthologues (Ensembl BioMart)."""
    by_ensembl: dict[str, str] = {}
    by_symbol: dict[str, str] = {}
    several: set[str] = set()
    clashing: set[str] = set()
    human: set[str] = set()
    for human_id, human_symbol, mouse_id, mouse_symbol, homology in _rows("human_mouse_orthologs.tsv.gz"):
        human.add(human_symbol)
        if homology != "one2one":
            several.update((mouse_id, mouse_symbol))
            continue
        by_ensembl[mouse_id] = human_id
        if mouse_symbol in by_symbol:
            clashing.add(mouse_symbol)
        by_symbol[mouse_symbol] = human_id
    several |= clashing
    several.discard("")
    by_symbol = {symbol: gene for symbol, gene in by_symbol.items() if symbol and symbol not in several}
    murine = {name for name in (*by_symbol, *several) if not name.startswith("ENSMUSG")}
    return MouseOrthologs(by_ensembl, by_symbol, frozenset(several), frozenset(murine - human))


def _rows(name: str) -> list[list[str]]:
    packed = files("scfm.data").joinpath("tables", name).read_bytes()
    _, *lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return [line.split("\t") for line in lines]
