"""scFoundation's genes: 19,264 human symbols in one order, which numbers the rows of its position table.

The order is part of the model. The authors give it as OS_scRNA_gene_index.19264.tsv (columns gene_name and index);
a plain list of symbols, one a line, says the same. Behind the genes stand two positions that are no genes: the
target's read depth T and the source's, S.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from scfm.data.safe_pickle import refuse_stand_in
from scfm.errors import FormatError, InvalidArgumentError, MissingFileError

__all__ = ["GENES_FILE", "SOURCE_DEPTH", "TARGET_DEPTH", "ScfoundationGenes"]

GENES_FILE = "OS_scRNA_gene_index.19264.tsv"
TARGET_DEPTH, SOURCE_DEPTH = "<T>", "<S>"
_MAX_BYTES = 8 << 20
_MOST_GENES = 1_000_000
_LONGEST_NAME = 200


@dataclass(frozen=True)
class ScfoundationGenes:
    """token: symbol -> position, in order; source: the file it came from, "" for none."""

    token: dict[str, int] = field(repr=False)
    source: str = ""

    @classmethod
    def of(cls, genes: str | Path | Iterable[str] | ScfoundationGenes) -> ScfoundationGenes:
        """From the authors' file, a file with one symbol a line, or a list of symbols in the model's order.

        Raises MissingFileError, FormatError naming the line, InvalidArgumentError.
        """
        if isinstance(genes, ScfoundationGenes):
            return genes
        if isinstance(genes, str | Path):
            return cls.from_file(genes)
        names = list(genes)
        if not all(isinstance(name, str) for name in names):
            raise InvalidArgumentError("expected gene symbols as text", where="genes")
        return _checked(names, "")

    @classmethod
    def from_file(cls, path: str | Path) -> ScfoundationGenes:
        """Read the authors' .tsv, or a list of symbols. Raises MissingFileError, FormatError naming the line."""
        path = Path(path)
        if not path.is_file():
            raise MissingFileError("no such file", path=path, hint=f"Give the authors' {GENES_FILE}.")
        if path.stat().st_size > _MAX_BYTES:
            raise FormatError(f"{path.stat().st_size:,} bytes are no list of genes", path=path)
        content = path.read_bytes()
        refuse_stand_in(content[:512], path)
        try:
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise FormatError("not a text file", path=path) from None
        if lines and lines[0].split("\t") == ["gene_name", "index"]:
            return _checked([_numbered(line, row, path) for row, line in enumerate(lines[1:])], str(path))
        return _checked([line.strip() for line in lines], str(path))

    @property
    def genes(self) -> list[str]:
        return list(self.token)

    @property
    def num_genes(self) -> int:
        return len(self.token)

    @property
    def target_position(self) -> int:
        """Where the target's depth T stands, behind the genes; the source's S is the next."""
        return len(self.token)

    def to_tsv(self) -> str:
        """The authors' file."""
        rows = (f"{name}\t{position}" for name, position in self.token.items())
        return "\n".join(["gene_name\tindex", *rows, ""])


def _numbered(line: str, row: int, path: Path) -> str:
    name, _, number = line.partition("\t")
    if number.strip() != str(row):
        raise FormatError(
            f"index is {number.strip()[:40]!r}, expected {row}: the order of the genes is that of the model",
            path=path,
            where=f"line {row + 2}",
        )
    return name


def _checked(names: list[str], source: str) -> ScfoundationGenes:
    def refuse(message: str) -> FormatError:
        return FormatError(f"no list of scFoundation's genes: {message}", path=source or None)

    if not 0 < len(names) <= _MOST_GENES:
        raise refuse(f"{len(names):,} lines, expected 1 to {_MOST_GENES:,}")
    token: dict[str, int] = {}
    for position, name in enumerate(names):
        if not name or name.startswith("<") or "\t" in name or len(name) > _LONGEST_NAME:
            raise refuse(f"{name[:60]!r} at position {position} is no gene symbol")
        if name in token:
            raise refuse(f"{name!r} stands at positions {token[name]} and {position}")
        token[name] = position
    return ScfoundationGenes(token, source)
