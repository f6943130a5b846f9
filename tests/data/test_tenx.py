"""10x Genomics files: .h5 of versions 2 and 3, probe files, .mtx folders; several genomes, other features."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from scfm.data import available_memory
from scfm.data.gene_mapping import map_genes
from scfm.data.read import read
from scfm.errors import (
    FormatError,
    InvalidArgumentError,
    MissingFileError,
    NotCountsError,
    ResourceError,
    ScfmWarning,
    UnsafeFileError,
)

NUM_CELLS, NUM_FEATURES = 40, 9
RNG = np.random.default_rng(8)
COUNTS = RNG.integers(1, 60, (NUM_CELLS, NUM_FEATURES)) * (RNG.random((NUM_CELLS, NUM_FEATURES)) < 0.5)
COUNTS[7] = 0
IDS = [f"ENSG{i:011d}" for i in range(NUM_FEATURES)]
NAMES = [f"s{i}" for i in range(NUM_FEATURES)]
BARCODES = [f"cell{i}-1" for i in range(NUM_CELLS)]


def texts(values: list[str]) -> np.ndarray:
    return np.array([value.encode() for value in values], dtype="S64")


def write_h5(
    path: Path, *, place: str = "matrix", counts: np.ndarray = COUNTS, **features: list[str]
) -> Path:
    """features: version 3's table of features; none of them: version 2."""
    matrix = sparse.csr_matrix(counts)
    with h5py.File(path, "a") as file:
        group = file.create_group(place)
        for name, values in features.items():
            group[f"features/{name}"] = texts(values)
        if not features:
            group["genes"], group["gene_names"] = texts(IDS), texts(NAMES)
        group["barcodes"] = texts(BARCODES)
        group["shape"] = np.array(counts.shape[::-1], dtype=np.int32)
        options = {"chunks": (16,), "maxshape": (None,), "compression": "gzip", "shuffle": True}
        group.create_dataset("data", data=matrix.data.astype(np.int32), **options)
        group.create_dataset("indices", data=matrix.indices.astype(np.int64), **options)
        group["indptr"] = matrix.indptr.astype(np.int64)
    return path


def version_3(path: Path, **changed: Any) -> Path:
    usual = {
        "id": IDS,
        "name": NAMES,
        "feature_type": ["Gene Expression"] * NUM_FEATURES,
        "genome": ["GRCh38"] * NUM_FEATURES,
    }
    return write_h5(path, **(usual | changed))


def write_mtx(folder: Path, *, gz: bool = True, prefix: str = "", kind: str = "integer") -> Path:
    folder.mkdir(exist_ok=True)
    genes, cells = COUNTS.T.nonzero()
    order = np.random.default_rng(0).permutation(len(genes))
    lines = [f"{genes[i] + 1} {cells[i] + 1} {COUNTS[cells[i], genes[i]]}" for i in order]
    text = (
        f"%%MatrixMarket matrix coordinate {kind} general\n%metadata_json: {{}}\n"
        f"{NUM_FEATURES} {NUM_CELLS} {len(lines)}\n" + "\n".join(lines) + "\n"
    )
    tables = {
        "matrix.mtx": text,
        "features.tsv": "".join(f"{a}\t{b}\tGene Expression\n" for a, b in zip(IDS, NAMES, strict=True)),
        "barcodes.tsv": "".join(f"{name}\n" for name in BARCODES),
    }
    for name, content in tables.items():
        if gz:
            (folder / f"{prefix}{name}.gz").write_bytes(gzip.compress(content.encode()))
        else:
            (folder / f"{prefix}{name}").write_text(content)
    return folder


def dense(source: Any) -> np.ndarray:
    out = np.zeros((len(source), source.num_genes))
    for block in source.blocks(7):
        cells = np.repeat(np.arange(block.num_cells), np.diff(block.indptr))
        np.add.at(out, (cells + block.row_start, block.indices), block.data)
    return out


# --- .h5 ---


def test_version_3(tmp_path: Path) -> None:
    source = read(version_3(tmp_path / "a.h5"))
    assert source.reader.startswith("native")
    np.testing.assert_array_equal(dense(source), COUNTS)
    assert source.genes.index.tolist() == IDS
    assert source.genes.gene_name.tolist() == NAMES
    assert source.obs.index.tolist() == BARCODES
    assert source.obs_column_names == []
    assert source.obs_column("n_counts") is None
    rows = [30, 2, 2]
    np.testing.assert_array_equal(dense(source.select(rows)), COUNTS[rows])
    mapping = map_genes(source.genes, known={gene: gene for gene in IDS[:5]}, vocabulary=IDS[:5])
    assert mapping.num_mapped == 5


def test_version_2(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5", place="hg19")
    source = read(path)
    assert source.counts_from == "hg19"
    np.testing.assert_array_equal(dense(source), COUNTS)
    assert read(path, layer="hg19").genes.index.tolist() == IDS
    write_h5(path, place="mm10", counts=COUNTS[:, ::-1])
    with pytest.raises(InvalidArgumentError, match=r"2 genomes: hg19, mm10.*layer='hg19'"):
        read(path)
    np.testing.assert_array_equal(dense(read(path, layer="mm10")), COUNTS[:, ::-1])
    with pytest.raises(InvalidArgumentError, match="no 'GRCh38'; the genomes are: hg19, mm10"):
        read(path, layer="GRCh38")


def test_other_features_are_left_out(tmp_path: Path) -> None:
    """Antibodies between the genes: renumbered columns, and row sums without them."""
    types = ["Gene Expression"] * NUM_FEATURES
    types[0] = types[4] = "Antibody Capture"
    types[8] = "CRISPR Guide Capture"
    genes = [1, 2, 3, 5, 6, 7]
    with pytest.warns(ScfmWarning, match="2 of type Antibody Capture, 1 of type CRISPR Guide Capture"):
        source = read(version_3(tmp_path / "a.h5", feature_type=types))
    np.testing.assert_array_equal(dense(source), COUNTS[:, genes])
    assert source.genes.index.tolist() == [IDS[i] for i in genes]
    rows = [39, 7, 1]
    np.testing.assert_array_equal(dense(source.select(rows)), COUNTS[rows][:, genes])
    sums = np.concatenate([np.add.reduceat(np.append(b.data, 0), b.indptr[:-1]) for b in source.blocks(7)])
    kept = COUNTS[:, genes].sum(1)
    np.testing.assert_array_equal(sums[kept > 0], kept[kept > 0])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["matrix/indices"][3] = NUM_FEATURES
    row = int(np.searchsorted(np.cumsum((COUNTS > 0).sum(1)), 3, side="right"))
    with (
        pytest.warns(ScfmWarning),
        pytest.raises(FormatError, match=rf"row {row}: column index 9 is outside 0\.\.8"),
    ):
        dense(read(tmp_path / "a.h5"))
    with pytest.raises(FormatError, match="no feature has the type 'Gene Expression'"):
        read(version_3(tmp_path / "b.h5", feature_type=["Antibody Capture"] * NUM_FEATURES))


def test_several_genomes(tmp_path: Path) -> None:
    genomes = ["GRCh38", "mm10", "GRCh38"] * 3
    path = version_3(
        tmp_path / "a.h5",
        genome=genomes,
        id=[f"{genome}_{gene}" for genome, gene in zip(genomes, IDS, strict=True)],
        name=[f"{genome}_{gene}" for genome, gene in zip(genomes, NAMES, strict=True)],
    )
    with pytest.raises(InvalidArgumentError, match="2 genomes: GRCh38, mm10"):
        read(path)
    source = read(path, layer="mm10")
    np.testing.assert_array_equal(dense(source), COUNTS[:, 1::3])
    assert source.genes.index.tolist() == IDS[1::3]
    assert source.genes.gene_name.tolist() == NAMES[1::3]
    assert read(version_3(tmp_path / "b.h5"), layer="GRCh38").num_genes == NUM_FEATURES
    with pytest.raises(InvalidArgumentError, match="no 'mm10'"):
        read(tmp_path / "b.h5", layer="mm10")


def test_probes_bear_their_genes_ids(tmp_path: Path) -> None:
    path = version_3(tmp_path / "a.h5", id=[f"{gene}|x|1" for gene in IDS], gene_id=IDS)
    source = read(path)
    assert source.genes.index.tolist() == IDS
    assert source.genes.probe_id.iloc[0] == f"{IDS[0]}|x|1"


def test_anndata_and_others_under_the_same_ending(tmp_path: Path) -> None:
    anndata.AnnData(COUNTS.astype(np.float32)).write_h5ad(tmp_path / "a.h5")
    np.testing.assert_array_equal(dense(read(tmp_path / "a.h5")), COUNTS)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["table"] = [1, 2]
    with pytest.raises(FormatError, match="neither a 10x nor an AnnData file; at its top are: table"):
        read(tmp_path / "other.h5")
    shutil.copy(version_3(tmp_path / "b.h5"), tmp_path / "b.h5ad")
    with pytest.raises(FormatError, match=r"give it the ending \.h5"):
        read(tmp_path / "b.h5ad")
    with pytest.raises(MissingFileError):
        read(tmp_path / "none.h5")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("shape", [NUM_FEATURES, NUM_CELLS + 1], "barcodes has shape"),
        ("shape", [NUM_FEATURES + 1, NUM_CELLS], "features/id: has 9 entries, expected 10"),
        ("shape", [-1, NUM_CELLS], "barcodes has shape"),
        ("shape", [2**40, NUM_CELLS], "features/id: has 9 entries"),
        ("shape", [[1, 2]], "expected one dimension"),
        ("features/name", ["a"], "features/name: has 1 entries"),
        ("features/feature_type", ["a"], "features/feature_type: has 1 entries"),
        ("indptr", list(range(NUM_CELLS + 1)), "indptr: ends at"),
        ("data", [1, 2, 3], "3 values in data"),
    ],
)
def test_damaged_h5(name: str, values: list[Any], message: str, tmp_path: Path) -> None:
    path = version_3(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        del file[f"matrix/{name}"]
        file[f"matrix/{name}"] = values
    with pytest.raises(FormatError, match=message):
        dense(read(path))


def test_links_in_h5(tmp_path: Path) -> None:
    path = version_3(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        del file["matrix/features/name"]
        file["matrix/features/name"] = h5py.ExternalLink("/etc/passwd", "/x")
    with pytest.raises(UnsafeFileError, match="link to another file"):
        read(path)


# --- .mtx ---


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("kind", ["integer", "real"])
def test_mtx(gz: bool, kind: str, tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "filtered", gz=gz, kind=kind)
    for given in (folder, folder / ("matrix.mtx.gz" if gz else "matrix.mtx"), str(folder)):
        source = read(given)
        np.testing.assert_array_equal(dense(source), COUNTS)
        assert source.genes.index.tolist() == IDS
        assert source.genes.gene_name.tolist() == NAMES
        assert source.obs.index.tolist() == BARCODES
    assert "mtx" in source.reader


def test_mtx_with_a_prefix_and_old_names(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "geo", prefix="GSM1_")
    np.testing.assert_array_equal(dense(read(folder)), COUNTS)
    genes = gzip.decompress((folder / "GSM1_features.tsv.gz").read_bytes()).decode()
    (folder / "GSM1_features.tsv.gz").unlink()
    with pytest.raises(MissingFileError, match=r"GSM1_features\.tsv\.gz or .*GSM1_genes\.tsv"):
        read(folder)
    two = "\n".join(line.rpartition("\t")[0] for line in genes.splitlines())
    (folder / "GSM1_genes.tsv").write_text(two + "\n")
    assert read(folder).genes.gene_name.tolist() == NAMES
    write_mtx(folder, prefix="GSM2_")
    with pytest.raises(InvalidArgumentError, match="several matrices: GSM1_matrix"):
        read(folder)
    lists = read([folder / "GSM1_matrix.mtx.gz", folder / "GSM2_matrix.mtx.gz"])
    assert len(lists) == 2 * NUM_CELLS


def test_mtx_with_other_features(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "cite", gz=False)
    lines = (folder / "features.tsv").read_text().splitlines()
    lines[2] = "CD3\tCD3_TotalSeqB\tAntibody Capture"
    lines[3] = "NA\tNA\tGene Expression"
    (folder / "features.tsv").write_text("\n".join(lines))
    with pytest.warns(ScfmWarning, match="1 of type Antibody Capture"):
        source = read(folder)
    np.testing.assert_array_equal(dense(source), np.delete(COUNTS, 2, axis=1))
    assert source.genes.index[2] == "NA"


def test_repeated_entries_are_summed(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "twice", gz=False)
    text = (folder / "matrix.mtx").read_text()
    size = f"{NUM_FEATURES} {NUM_CELLS} "
    number = int(text.split(size)[1].split()[0])
    text = text.replace(f"{size}{number}", f"{size}{number + 2}") + "1 8 5\n1 8 6\n"
    (folder / "matrix.mtx").write_text(text)
    with pytest.warns(ScfmWarning, match="1 of 40 cells list a gene column more than once"):
        found = dense(read(folder))
    assert found[7].tolist() == [11, *[0] * (NUM_FEATURES - 1)]


GOOD_HEADER = "%%MatrixMarket matrix coordinate integer general\n"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "hello\n1 1 1\n",
        "%%MatrixMarket matrix array integer general\n9 40\n",
        "%%MatrixMarket matrix coordinate pattern general\n9 40 1\n1 1\n",
        "%%MatrixMarket matrix coordinate complex general\n9 40 1\n1 1 1 1\n",
        "%%MatrixMarket matrix coordinate integer symmetric\n9 40 1\n1 1 1\n",
        GOOD_HEADER,
        GOOD_HEADER + "9 40\n1 1 1\n",
        GOOD_HEADER + "9 40 x\n1 1 1\n",
        GOOD_HEADER + "-9 40 1\n1 1 1\n",
        GOOD_HEADER + "9 40 1\n0 1 1\n",
        GOOD_HEADER + "9 40 1\n10 1 1\n",
        GOOD_HEADER + "9 40 1\n1 41 1\n",
        GOOD_HEADER + "9 40 1\n1 1\n",
        GOOD_HEADER + "9 40 1\n1 1 one\n",
        GOOD_HEADER + "9 40 2\n1 1 1\n",
        GOOD_HEADER + "9 40 1\n1 1 1\n2 2 2\n",
        GOOD_HEADER + "9 40 999999999999\n1 1 1\n",
        GOOD_HEADER + "9 99999999999999999999 1\n1 1 1\n",
        GOOD_HEADER + "40 9 1\n1 1 1\n",
        "%" * 10_000,
    ],
)
@pytest.mark.parametrize("gz", [True, False])
def test_malformed_mtx(content: str, gz: bool, tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "bad", gz=gz)
    path = folder / ("matrix.mtx.gz" if gz else "matrix.mtx")
    path.write_bytes(gzip.compress(content.encode()) if gz else content.encode())
    with pytest.raises(FormatError, match="bad"):
        read(folder)


def test_damaged_gzip(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "cut")
    whole = (folder / "matrix.mtx.gz").read_bytes()
    for content in (
        whole[: len(whole) // 2],
        whole[:5],
        b"",
        b"no gzip",
        whole[:60] + b"\0" * 9 + whole[69:],
    ):
        (folder / "matrix.mtx.gz").write_bytes(content)
        with pytest.raises(FormatError, match=r"cut/matrix\.mtx\.gz"):
            read(folder)
    (folder / "matrix.mtx.gz").write_bytes(whole)
    (folder / "barcodes.tsv.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(FormatError, match="compressed data are damaged"):
        read(folder)
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"x" * 10_000_000))
    with pytest.raises(FormatError, match="far too large"):
        read(folder)
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"x\n" * 39))
    with pytest.raises(FormatError, match="has 39 lines; the matrix has 40 barcodes"):
        read(folder)


def test_mtx_memory_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_mtx(tmp_path / "large")
    monkeypatch.setattr(available_memory, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="entries of a text matrix"):
        read(folder)


def test_mtx_must_hold_counts(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "log", gz=False, kind="real")
    text = (folder / "matrix.mtx").read_text()
    (folder / "matrix.mtx").write_text(text[:-1].rpartition(" ")[0] + " 1.5\n")
    with pytest.raises(NotCountsError):
        dense(read(folder))


def test_folders_with_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InvalidArgumentError, match=r"is a folder with notes\.txt"):
        read(tmp_path)
