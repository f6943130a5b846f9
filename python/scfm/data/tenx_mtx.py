"""Reading 10x .mtx folders: matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv, gzipped or not.

The matrix is text, genes x cells, one entry a line in any order: it can only be read as a whole, by scipy's
threaded parser, after its header has been held against memory and against the size of the file.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.available_memory import require_memory
from scfm.data.cell_table import LoadedTable
from scfm.data.h5_file import reading
from scfm.data.matrix import CountMatrix, CsrInMemory
from scfm.data.matrix_subset import ChosenColumns
from scfm.data.number_types import Array
from scfm.data.raw_counts import Candidate, choose_counts
from scfm.data.source import CellSource
from scfm.data.tenx_h5 import choose_genes
from scfm.errors import FormatError, InvalidArgumentError, MissingFileError

__all__ = ["find_mtx", "is_mtx_name", "open_tenx_mtx"]

_MATRIX_NAME = re.compile(r"(?P<prefix>.*)matrix\.mtx(\.gz)?", re.IGNORECASE)
# The shortest entry, "1 1 1" and a line end; and the most that gzip can expand.
_MIN_ENTRY_BYTES = 6
_MAX_GZIP_RATIO = 1032
_MAX_LINE_BYTES = 4096
_BYTES_PER_ENTRY = 4 + 4 + 8


class MtxInMemory(CsrInMemory):
    """The parsed entries, one row a cell."""

    reader = "scipy (mtx text, in memory)"


def is_mtx_name(name: str) -> bool:
    return name.lower().endswith((".mtx", ".mtx.gz"))


def find_mtx(folder: Path) -> Path | None:
    """The matrix file of a 10x folder, if it is one. Raises InvalidArgumentError where there are several."""
    found = sorted(
        entry for entry in folder.iterdir() if _MATRIX_NAME.fullmatch(entry.name) and entry.name[0] != "."
    )
    if len(found) > 1:
        raise InvalidArgumentError(
            f"holds several matrices: {', '.join(entry.name for entry in found[:5])}",
            path=folder,
            hint="Give the path of one of them, or a list of their paths.",
        )
    return found[0] if found else None


def open_tenx_mtx(
    path: str | PathLike[str], *, layer: str | None = None, assume_counts: bool = False
) -> CellSource:
    """The cells of a 10x folder, given as its matrix.mtx or matrix.mtx.gz; raw counts, read into memory.

    A prefix of the matrix file's name ("GSM1_matrix.mtx.gz") is expected on the tables too. layer: the genome
    is not told by these files, so only "X". Raises MissingFileError, FormatError, ResourceError,
    NotCountsError.
    """
    matrix_file = Path(path)
    if layer not in (None, "X"):
        raise InvalidArgumentError(f"there is no {layer!r}; the counts are X", path=path, where="layer")
    shape = _header(matrix_file)
    features = _features(_table_beside(matrix_file, ("features.tsv", "genes.tsv")), shape[0])
    barcodes_file = _table_beside(matrix_file, ("barcodes.tsv",))
    barcodes = _rows(barcodes_file, shape[1], "barcodes (columns of the matrix)").iloc[:, 0]
    columns, genes = choose_genes(features, genome=None, path=str(matrix_file))

    def counts() -> CountMatrix:
        matrix = _parse(matrix_file, shape)
        return matrix if len(columns) == shape[0] else ChosenColumns(matrix, columns)

    genes_table = LoadedTable(genes)
    candidate = Candidate("X", counts, genes_table)
    choice = choose_counts([candidate], name=str(matrix_file), layer="X", assume_counts=assume_counts)
    return CellSource(
        choice.matrix,
        counts_from="X",
        genes=genes_table,
        obs=LoadedTable(pd.DataFrame(index=pd.Index(barcodes.to_numpy(dtype=object)))),
        is_counts=choice.is_counts,
        assume_counts=assume_counts,
    )


@contextmanager
def _text(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; damage to the compression becomes a FormatError."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FormatError(
            f"the compressed data are damaged ({error})", path=path, hint="Copy or download it again."
        ) from error
    except PermissionError as error:
        raise InvalidArgumentError("permission denied", path=path) from error


def _header(path: Path) -> tuple[int, int, int]:
    """(genes, cells, entries), held against the size of the file before anything is parsed."""
    if not path.exists():
        raise MissingFileError("no such file", path=path)
    if not path.is_file():
        raise InvalidArgumentError("is not a regular file", path=path)
    with _text(path) as file:
        banner = file.readline(_MAX_LINE_BYTES).decode("latin-1").lower().split()
        if banner[:3] != ["%%matrixmarket", "matrix", "coordinate"] or banner[4:] != ["general"]:
            raise FormatError(
                f"begins with {' '.join(banner)[:80]!r}, expected '%%MatrixMarket matrix coordinate integer "
                "general'",
                path=path,
                where="line 1",
            )
        if banner[3] not in ("integer", "unsigned-integer", "real"):
            raise FormatError(f"holds values of kind {banner[3]!r}, expected integers", path=path)
        line = file.readline(_MAX_LINE_BYTES)
        while line.startswith(b"%") or (line and not line.strip()):
            line = file.readline(_MAX_LINE_BYTES)
    sizes = line.decode("latin-1").split()
    if len(sizes) != 3 or not all(size.isascii() and size.isdecimal() and len(size) < 19 for size in sizes):
        raise FormatError(
            f"the sizes are {' '.join(sizes)[:80]!r}, expected three numbers: genes, cells, entries",
            path=path,
        )
    num_genes, num_cells, num_entries = map(int, sizes)
    most = path.stat().st_size * (_MAX_GZIP_RATIO if path.suffix.lower() == ".gz" else 1)
    if num_entries * (_MIN_ENTRY_BYTES - 1) > most or max(num_genes, num_cells) >= 2**31:
        raise FormatError(
            f"claims {num_genes:,} genes x {num_cells:,} cells with {num_entries:,} entries, more than the "
            "file can hold",
            path=path,
            hint="The file is truncated or damaged: copy or download it again.",
        )
    return num_genes, num_cells, num_entries


def _parse(path: Path, shape: tuple[int, int, int]) -> MtxInMemory:
    from scipy.io import mmread

    num_genes, num_cells, num_entries = shape
    require_memory(
        # What the parser gives, the rows made of it, and the order between.
        num_entries * (2 * _BYTES_PER_ENTRY + 8) + 8 * num_cells,
        purpose=f"reading {num_entries:,} entries of a text matrix",
        name=str(path),
        where="matrix",
        hint="Convert the matrix to .h5ad once, on a machine with more memory.",
    )
    with reading(str(path), "matrix"), _text(path) as file:
        # Parsed from the stream: by its name scipy would look for the file under other endings as well.
        entries: Any = mmread(file if path.suffix.lower() == ".gz" else path, spmatrix=False)
        genes, cells = (np.asarray(part) for part in entries.coords)
        values = np.asarray(entries.data)
    _check_bounds(genes, cells, shape, path)
    if values.dtype == np.int64 and len(values) and abs(int(values.max())) < 2**31 > -int(values.min()):
        values = values.astype(np.int32)
    indptr, order = _by_cell(cells, num_cells)
    if order is not None:
        genes, values = genes[order], values[order]
    return MtxInMemory(
        indptr,
        genes.astype(np.int32, copy=False),
        values,
        num_cells=num_cells,
        num_genes=num_genes,
        name=str(path),
        dataset="X",
    )


def _check_bounds(genes: Array, cells: Array, shape: tuple[int, int, int], path: Path) -> None:
    for label, found, size in (("gene", genes, shape[0]), ("cell", cells, shape[1])):
        if len(found) and (int(found.min()) < 0 or int(found.max()) >= size):
            position = int(np.flatnonzero((found < 0) | (found >= size))[0])
            raise FormatError(
                f"entry {position} names {label} {int(found[position]) + 1}, outside 1..{size}",
                path=path,
                hint="The file is damaged: copy or download it again.",
            )


def _by_cell(cells: Array, num_cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Row pointers by cell and the order that sorts the entries; None where they are sorted already.

    Repeated entries stay apart: the check of every block sums them and says so.
    """
    indptr = np.zeros(num_cells + 1, dtype=np.int64)
    np.cumsum(np.bincount(cells, minlength=num_cells), out=indptr[1:])
    if bool((cells[1:] >= cells[:-1]).all()):
        return indptr, None
    return indptr, np.argsort(cells, kind="stable")


def _table_beside(matrix_file: Path, names: tuple[str, ...]) -> Path:
    match = _MATRIX_NAME.fullmatch(matrix_file.name)
    prefix = match["prefix"] if match else ""
    tried = [matrix_file.with_name(f"{prefix}{name}{end}") for name in names for end in (".gz", "")]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise MissingFileError(
            f"there is no {' or '.join(path.name for path in tried)} beside the matrix",
            path=matrix_file,
            hint="A 10x folder holds matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv.",
        )
    return found


def _features(path: Path, num_genes: int) -> pd.DataFrame:
    table = _rows(path, num_genes, "genes (rows of the matrix)")
    names = ["id", "gene_name", "feature_type"][: table.shape[1]]
    table = table.iloc[:, : len(names)].set_axis(names, axis=1)
    return table if "gene_name" in table else table.assign(gene_name=table["id"])


def _rows(path: Path, expected: int, what: str) -> pd.DataFrame:
    """A table without header, all text; its number of rows and its size checked."""
    limit = (expected + 1) * _MAX_LINE_BYTES
    with _text(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise FormatError(f"is far too large for {expected:,} {what}", path=path)
    if not content.strip():
        table = pd.DataFrame({0: pd.Series([], dtype=object)})
    else:
        with reading(str(path), "table"):
            table = pd.read_csv(
                io.BytesIO(content), sep="\t", header=None, dtype=str, quoting=3, keep_default_na=False
            )
    if len(table) != expected:
        raise FormatError(
            f"has {len(table):,} lines; the matrix has {expected:,} {what}",
            path=path,
            hint="The tables and the matrix must come from the same folder; matrices are genes x cells.",
        )
    return table
