"""scBERT's panel: which gene stands at which position. Position is all a gene has: its row of gene2vec is found by it.

The order is part of a checkpoint but is not in it. The authors take it from the AnnData that they aligned everything
to; it is not alphabetical, so it cannot be guessed, only given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from scfm.data.read import read
from scfm.errors import FormatError, InvalidArgumentError, MissingFileError

__all__ = ["PANEL_FILES", "ScbertPanel"]

# The authors' AnnData of that order, the plain lists that others made of it, and scfm's own.
PANEL_FILES = (
    "genes.txt",
    "panglao_human.h5ad",
    "panglao_10000.h5ad",
    "panglao_gene_order_16906.txt",
    "panglao_genes.txt",
    "gene_order.txt",
)
_FOLDERS = (".", "data")
_MAX_BYTES = 16 << 20


class ScbertPanel:
    """Gene symbols in the order of a checkpoint's positions; behind the last one is the slot of every cell.

    genes: symbols, each once; source: the file they came from, or "". Raises FormatError.
    """

    def __init__(self, genes: Sequence[str], source: str = "") -> None:
        self.genes = list(genes)
        self.source = source
        wrong = [gene for gene in self.genes if not isinstance(gene, str) or not gene.strip()]
        if wrong or not self.genes:
            raise FormatError(
                f"{len(wrong):,} of {len(self.genes):,} genes are no names: {wrong[:5]}", path=source or None
            )
        self.token = {gene: position for position, gene in enumerate(self.genes)}
        if len(self.token) < len(self.genes):
            twice = sorted({gene for gene in self.genes if self.genes.count(gene) > 1})[:5]
            raise FormatError(f"genes stand in the list twice: {twice}", path=source or None)

    def __len__(self) -> int:
        return len(self.genes)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256("\n".join(self.genes).encode()).hexdigest()

    @classmethod
    def of(cls, genes: ScbertPanel | str | Path | Sequence[str]) -> ScbertPanel:
        """A panel, a file of one, or a list of symbols."""
        if isinstance(genes, ScbertPanel):
            return genes
        if isinstance(genes, str | Path):
            return cls.from_file(genes)
        if not isinstance(genes, Sequence):
            raise InvalidArgumentError(
                f"is a {type(genes).__name__}; expected a file or a list of gene symbols", where="genes"
            )
        return cls(genes)

    @classmethod
    def from_file(cls, path: str | Path) -> ScbertPanel:
        """From a text file with a symbol a line, or the var_names of an AnnData (.h5ad).

        Raises MissingFileError, FormatError.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError("no such file of genes", path=path)
        if path.suffix == ".h5ad":
            return cls([str(gene) for gene in read(path, assume_counts=True).genes.index], str(path))
        if path.stat().st_size > _MAX_BYTES:
            raise FormatError(f"{path.stat().st_size:,} bytes; no list of genes is that long", path=path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise FormatError("is no text file; expected a gene symbol a line", path=path) from None
        return cls([line.strip() for line in lines if line.strip()], str(path))

    @classmethod
    def beside(cls, folder: Path) -> ScbertPanel | None:
        """The panel that lies in a checkpoint's folder, or its ``data``, under a known name; None where none does."""
        for place in _FOLDERS:
            for name in PANEL_FILES:
                if (folder / place / name).is_file():
                    return cls.from_file(folder / place / name)
        return None
