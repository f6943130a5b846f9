"""Rows 39 and 40: which gene of a data set becomes which token, by both rules, and what is said of the rest."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.data.coverage import CoverageReport
from scfm.data.gene_mapping import GeneMapping, map_genes
from scfm.data.gene_tables import human_symbols, mouse_orthologs
from scfm.errors import GeneMappingError, InvalidArgumentError

# Real genes, so that the package's tables apply.
CD3E, CD3D, ENSA, ACTB, GAPDH = (
    "ENSG00000198851",
    "ENSG00000167286",
    "ENSG00000143420",
    "ENSG00000075624",
    "ENSG00000111640",
)
OLD_ACTB = "ENSG00000999999"
VOCABULARY = {CD3E, CD3D, ENSA, ACTB, GAPDH}
# V2 knows symbols and aliases; V1 is the identity.
V2 = {gene: gene for gene in VOCABULARY} | {OLD_ACTB: ACTB, "CD3E": CD3E, "T3E": CD3E}
V1 = {gene: gene for gene in VOCABULARY}
CD3E_MOUSE, ACTB_MOUSE = "ENSMUSG00000032093", "ENSMUSG00000029580"


def mapped(genes: pd.DataFrame, known: dict[str, str] = V2, **options: object) -> GeneMapping:
    return map_genes(genes, known=known, vocabulary=VOCABULARY, **options)  # type: ignore[arg-type]


def column(*ids: object) -> pd.DataFrame:
    return pd.DataFrame({"ensembl_id": ids}, index=[f"name{i}" for i in range(len(ids))])


# --- the authors' rule ---


def authors_oracle(ids: list[str], known: dict[str, str]) -> tuple[list[str | None], bool]:
    """The original's steps, spelled out gene by gene."""
    keys = [gene for gene in ids if gene in known]
    collapse = len(set(keys)) != len({known[key] for key in keys})
    return [known.get(gene.upper()) for gene in ids], collapse


@given(
    ids=st.lists(
        st.sampled_from(
            [
                CD3E,
                CD3E.lower(),
                f"{CD3E}.7",
                ACTB,
                OLD_ACTB,
                "T3E",
                "t3e",
                "CD3E",
                "GAPDH",
                "NOENS_1",
                "",
                ENSA,
            ]
        ),
        min_size=1,
        max_size=12,
    ),
    version=st.sampled_from([V1, V2]),
)
@settings(max_examples=200, deadline=None)
def test_authors_rule_is_the_originals(ids: list[str], version: dict[str, str]) -> None:
    expected, collapse = authors_oracle(ids, version)
    if not any(expected):
        with pytest.raises(GeneMappingError):
            mapped(column(*ids), version, rules="authors")
        return
    mapping = mapped(column(*ids), version, rules="authors")
    assert mapping.ids == expected
    assert mapping.collapse == collapse
    assert [key if gene else None for key, gene in zip(ids, expected, strict=True)] == mapping.keys


@pytest.mark.parametrize(
    ("ids", "expected", "collapse"),
    [
        ((CD3E, ACTB), [CD3E, ACTB], False),
        ((CD3E, CD3E), [CD3E, CD3E], False),
        ((ACTB, OLD_ACTB), [ACTB, ACTB], True),
        ((ACTB, OLD_ACTB.lower()), [ACTB, ACTB], False),
        ((CD3E, "T3E"), [CD3E, CD3E], True),
        ((CD3E.lower(), ACTB), [CD3E, ACTB], False),
        ((CD3E, f"{ACTB}.3"), [CD3E, None], False),
        ((CD3E, "GAPDH"), [CD3E, None], False),
        ((CD3E, None, float("nan"), pd.NA, b"T3E", 5), [CD3E, None, None, None, CD3E, None], True),
    ],
)
def test_authors_rule_truth_table(
    ids: tuple[object, ...], expected: list[str | None], collapse: bool
) -> None:
    mapping = mapped(column(*ids))
    assert mapping.ids == expected
    assert mapping.collapse == collapse


def test_what_the_authors_leave_out_is_said() -> None:
    mapping = mapped(column(CD3E, CD3E, f"{ACTB}.3", "GAPDH", "NOENS_7"))
    notes = " ".join(mapping.notes)
    assert (
        f"1 ids with a version suffix in ensembl_id were left out, as the original does (e.g. {ACTB}.3)"
        in notes
    )
    assert "1 symbols in ensembl_id were left out" in notes
    assert notes.count("rules='all'") == 2
    assert mapped(column(CD3E, ACTB, "NOENS_7")).notes == []
    everything = mapped(column(CD3E, CD3E, f"{ACTB}.3", "GAPDH", "NOENS_7"), rules="all")
    assert everything.ids == [CD3E, CD3E, ACTB, GAPDH, None]
    assert not everything.collapse


def test_auto_leaves_the_authors_rule_for_versioned_or_useless_columns() -> None:
    versioned = mapped(column(f"{CD3E}.1", f"{ACTB}.2", GAPDH))
    assert versioned.ids == [CD3E, ACTB, GAPDH]
    assert versioned.routes == ["ensembl_version", "ensembl_version", "ensembl"]
    few = mapped(column(f"{CD3E}.1", ACTB, GAPDH))
    assert few.ids == [None, ACTB, GAPDH]
    symbols = mapped(column("ACTB", "GAPDH", "NOT_A_GENE"), V1)
    assert symbols.ids == [ACTB, GAPDH, None]
    with pytest.raises(GeneMappingError, match="rules='all'"):
        mapped(column(f"{CD3E}.1", f"{ACTB}.2"), rules="authors")
    with pytest.raises(GeneMappingError, match="ensembl_id"):
        mapped(pd.DataFrame(index=[CD3E]), rules="authors")


# --- the general rule ---


@pytest.mark.parametrize(
    ("text", "gene", "route"),
    [
        (CD3E, CD3E, "ensembl"),
        (CD3E.lower(), CD3E, "ensembl"),
        (f" {CD3E} ", CD3E, "ensembl"),
        (f"{CD3E}.12", CD3E, "ensembl_version"),
        (f"{CD3E}.12_PAR_Y", CD3E, "ensembl_version"),
        (f"{CD3E}_PAR_Y", CD3E, "ensembl_version"),
        (OLD_ACTB, ACTB, "ensembl"),
        (f"{OLD_ACTB}.1", ACTB, "ensembl_version"),
        ("T3E", CD3E, "authors_symbol"),
        ("t3e", CD3E, "authors_symbol"),
        ("ENSA", ENSA, "symbol_table"),
        ("GAPDH", GAPDH, "symbol_table"),
        ("gapdh", GAPDH, "symbol_table"),
        (f"{CD3E}X", None, "unmapped"),
        ("ENSG0001", None, "unmapped"),
        ("ENST00000361763", None, "unmapped"),
        ("NOT_A_GENE", None, "unmapped"),
        ("", None, "unmapped"),
    ],
)
@pytest.mark.parametrize("place", ["index", "gene_ids", "feature_name", "Gene Name"])
def test_one_identifier_anywhere(text: str, gene: str | None, route: str, place: str) -> None:
    """GAPDH stands beside it, so that something maps; ENSA is a symbol although it begins like an id."""
    texts = ["GAPDH", text]
    genes = (
        pd.DataFrame(index=texts) if place == "index" else pd.DataFrame({place: texts}, index=["-1", "-2"])
    )
    mapping = mapped(genes)
    assert mapping.ids[1] == gene
    assert mapping.routes[1] == route
    assert mapping.keys[1] == (text.strip() if gene else None)


def test_each_gene_uses_the_column_that_serves_it() -> None:
    genes = pd.DataFrame(
        {
            "gene_ids": [CD3E, "", "ENSG00000000000", None, f"{ENSA}.4"],
            "feature_name": ["CD3E", "ACTB", "GAPDH", "nonsense", "wrong"],
        },
        index=["a", "b", "c", CD3D, "e"],
    )
    mapping = mapped(genes)
    # The third bears an Ensembl id that no model knows: its symbol may be another gene's by now.
    assert mapping.ids == [CD3E, ACTB, None, CD3D, ENSA]
    assert mapping.routes == ["ensembl", "symbol_table", "unmapped", "ensembl", "ensembl_version"]
    assert not mapping.collapse


def test_placeholders_that_spell_genes_are_not_genes() -> None:
    names = [f"g{i}" for i in range(200)]
    genes = pd.DataFrame({"feature_id": [CD3E, *[f"NOENS_{i}" for i in range(199)]]}, index=names)
    assert mapped(genes).num_mapped == 1
    assert mapped(pd.DataFrame(index=["cd3e", "actb", "gapdh"])).ids == [CD3E, ACTB, GAPDH]


def test_authors_symbols_go_before_the_package_table() -> None:
    mapping = mapped(pd.DataFrame(index=["ACTB", "GAPDH"]), V1, symbols={"ACTB": CD3D})
    assert mapping.ids == [CD3D, GAPDH]
    assert mapping.routes == ["authors_symbol", "symbol_table"]
    assert mapped(pd.DataFrame(index=["actb"]), V1, symbols={"ACTB": CD3D}).ids == [CD3D]


def test_ambiguous_symbols_are_named_not_guessed() -> None:
    symbol, candidates = next(
        (symbol, genes) for symbol, genes in sorted(human_symbols().items()) if len(genes) == 2
    )
    both = {*VOCABULARY, *candidates}
    genes = pd.DataFrame(index=[symbol, "GAPDH"])
    mapping = map_genes(genes, known={}, vocabulary=both)
    assert mapping.ids == [None, GAPDH]
    assert mapping.ambiguous == {symbol: sorted(candidates)}
    assert symbol not in mapping.missing
    one = map_genes(genes, known={}, vocabulary={GAPDH, candidates[1]})
    assert one.ids == [candidates[1], GAPDH]
    assert one.ambiguous == {}
    settled = pd.DataFrame({"symbol": [symbol, "GAPDH"], "gene_id": [candidates[0], ""]})
    assert map_genes(settled, known={}, vocabulary=both).ambiguous == {}


def test_different_names_of_one_gene_are_summed_and_exact_repeats_stay_apart() -> None:
    assert mapped(pd.DataFrame(index=["ACTB", OLD_ACTB])).collapse
    assert not mapped(pd.DataFrame(index=["ACTB", "ACTB"])).collapse
    assert not mapped(pd.DataFrame(index=["ACTB", "GAPDH"])).collapse


@pytest.mark.parametrize(
    "values",
    [
        pd.Categorical(["ACTB", "x", None]),
        pd.array(["ACTB", "x", None], dtype="string"),
        np.array([b"ACTB", b"x", b""]),
        np.array(["ACTB", "x", float("nan")], dtype=object),
        np.array(["ACTB", 3, None], dtype=object),
    ],
    ids=["categorical", "string", "bytes", "nan", "mixed"],
)
def test_columns_of_any_type(values: object) -> None:
    assert mapped(pd.DataFrame({"gene_symbols": values})).ids == [ACTB, None, None]


def test_columns_of_the_same_name() -> None:
    genes = pd.DataFrame([["ACTB", "x"], ["x", "GAPDH"]], columns=["symbol", "symbol"])
    assert mapped(genes).ids[0] == ACTB
    genes.columns = ["ensembl_id", "ensembl_id"]
    genes.iloc[0, 0] = ACTB
    assert mapped(genes).ids == [ACTB, None]


# --- mouse ---


@pytest.mark.parametrize("known", [V1, V2], ids=["V1", "V2"])
@pytest.mark.parametrize(
    "genes",
    [
        pd.DataFrame(index=["Cd3e", "Actb", "Gapdh", "Xkr4", "Gm1992"]),
        column("Cd3e", "Actb", "Xkr4", "Sox17"),
        pd.DataFrame(index=[CD3E_MOUSE, ACTB_MOUSE, "ENSMUSG00000051951.6"]),
        pd.DataFrame({"gene_id": [CD3E_MOUSE, ACTB_MOUSE]}, index=["Cd3e", "Actb"]),
    ],
    ids=["symbols", "symbols in ensembl_id", "ids", "both"],
)
def test_murine_genes_are_refused_by_name(genes: pd.DataFrame, known: dict[str, str]) -> None:
    """Upper-casing would have mapped most of them, wrongly in part."""
    with pytest.raises(GeneMappingError, match=r"murine.*species='mouse'"):
        mapped(genes, known)


def test_one_to_one_orthologues() -> None:
    genes = pd.DataFrame(
        {"gene_ids": [CD3E_MOUSE, "", f"{ACTB_MOUSE}.12", "", ""]},
        index=["x", "Cd3d", "y", "Cd8b1", "CD3D"],
    )
    mapping = mapped(genes, species="mouse")
    assert mapping.ids == [CD3E, CD3D, ACTB, None, None]
    assert mapping.routes == ["ortholog"] * 3 + ["unmapped"] * 2
    assert any("1 murine genes have several human orthologues" in note for note in mapping.notes)


def test_ortholog_table_is_one_to_one() -> None:
    table = mouse_orthologs()
    assert len(table.by_ensembl) > 15_000
    assert len(set(table.by_ensembl.values())) == len(table.by_ensembl)
    assert len(set(table.by_symbol.values())) == len(table.by_symbol)
    assert not table.several & table.by_symbol.keys()
    assert table.by_symbol["Cd3e"] == CD3E
    assert table.by_ensembl[CD3E_MOUSE] == CD3E
    # Upper-casing alone gets this one wrong.
    assert "Cd8b1" in table.by_symbol or "Cd8b1" in table.several


def test_human_genes_called_murine() -> None:
    with pytest.raises(GeneMappingError, match="human"):
        mapped(column(CD3E, ACTB), species="mouse")


# --- nothing maps ---


@pytest.mark.parametrize(
    ("genes", "words"),
    [
        (pd.DataFrame(index=map(str, range(9))), "only numbered"),
        (pd.DataFrame(index=["ENSRNOG00000000001", "ENSRNOG00000000007"]), "another species"),
        (pd.DataFrame(index=["ENST00000361763", "ENST00000335137"]), "transcripts"),
        (pd.DataFrame(index=["ab1", "cd2", "ef3", "gh4", "ij5", "kl6"]), "ab1, cd2, ef3, gh4, ij5\\)"),
        (column("", None), "only empty names|name0"),
        (pd.DataFrame(index=[]), "no genes"),
    ],
)
def test_no_gene_mapped(genes: pd.DataFrame, words: str) -> None:
    with pytest.raises(GeneMappingError, match=words):
        mapped(genes)


@pytest.mark.parametrize(
    "options", [{"species": "rat"}, {"rules": "some"}, {"species": "mouse", "rules": "authors"}]
)
def test_unknown_options(options: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError):
        mapped(column(CD3E), **options)


def test_genes_must_be_a_table() -> None:
    with pytest.raises(InvalidArgumentError, match="DataFrame"):
        mapped([CD3E])  # type: ignore[arg-type]


# --- the report ---


def test_coverage_report() -> None:
    mapping = mapped(pd.DataFrame(index=[CD3E, "ACTB", "GAPDH", "nonsense"]))
    report = mapping.coverage()
    assert "counts" not in str(report)
    assert report.share_of_counts is None
    report.add_counts(30, 40)
    report.add_counts(67.1, 60)
    assert str(report) == (
        "3 of 4 genes and 97.1 % of counts mapped (1 by Ensembl id, 2 by symbol (package table)); "
        "1 missing, e.g. nonsense"
    )
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["num_mapped"] == 3
    assert plain["share_of_genes"] == 0.75


def test_coverage_names_at_most_ten() -> None:
    report = CoverageReport(
        19_331,
        18_204,
        {"ensembl": 17_990, "authors_symbol": 214, "unmapped": 1_127},
        {f"A{i}": ["x", "y"] for i in range(14)},
        [f"M{i}" for i in range(1_113)],
    )
    text = str(report)
    assert text.startswith(
        "18,204 of 19,331 genes mapped (17,990 by Ensembl id, 214 by symbol); 14 ambiguous: A0"
    )
    assert "A9, ..." in text
    assert "A10" not in text
    assert "M10" not in text
    assert len(report.to_dict()["missing"]) == 10
    assert CoverageReport(0, 0, {}).share_of_genes == 0


# --- real dictionaries and real genes ---


def dictionaries(folder: Path, version: str) -> dict[str, object]:
    def table(name: str) -> dict[str, str]:
        with gzip.open(folder / f"{name}_{version}.tsv.gz", "rt") as file:
            return dict(line.rstrip("\n").split("\t")[:2] for line in file.read().splitlines()[1:])

    with gzip.open(folder / f"token_dictionary_{version}.json.gz", "rt") as file:
        vocabulary = {gene for gene in json.load(file) if not gene.startswith("<")}
    known = {key: gene for key, gene in table("ensembl_mapping").items() if gene in vocabulary}
    return {"known": known, "vocabulary": vocabulary, "symbols": table("gene_name_id")}


@pytest.fixture(scope="module", params=["gc104M", "gc30M"])
def real(request: pytest.FixtureRequest, goldens: Callable[[str], Path]) -> dict[str, object]:
    return dictionaries(goldens("geneformer/dict_safe"), request.param)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["real_f32", "edge", "collapse", "identical_dups", "nb_ties", "dense"])
def test_golden_files_follow_the_original(
    name: str, real: dict[str, object], goldens: Callable[[str], Path]
) -> None:
    genes = anndata.read_h5ad(goldens("geneformer/tokenizer") / f"{name}.h5ad").var
    expected, collapse = authors_oracle(genes["ensembl_id"].tolist(), real["known"])  # type: ignore[arg-type]
    mapping = map_genes(genes, **real)  # type: ignore[arg-type]
    assert mapping.ids == expected
    assert mapping.collapse == collapse
    assert {gene for gene in mapping.ids if gene} <= real["vocabulary"]  # type: ignore[operator]


@pytest.mark.golden
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "share"),
    [("pbmc3k_labeled", 0.9), ("pancreas_human_mouse_baron350", 0.9), ("pbmc_ifnb_stim_ctrl", 0.9)],
)
def test_real_data_keep_their_counts(
    name: str, share: float, real: dict[str, object], data_file: Callable[[str], Path]
) -> None:
    """By symbols alone nearly as many counts map as by the ids that the files bring along."""
    adata = anndata.read_h5ad(data_file(f"{name}.h5ad"))
    totals = np.asarray(adata.X.sum(0)).ravel()
    symbols = pd.DataFrame(index=adata.var["symbol"].astype(str))
    shares = []
    for genes in (adata.var, symbols):
        mapping = map_genes(genes, **real)  # type: ignore[arg-type]
        report = mapping.coverage()
        report.add_counts(totals[[gene is not None for gene in mapping.ids]].sum(), totals.sum())
        shares.append(report.share_of_counts)
    assert min(shares) > share
    assert abs(shares[0] - shares[1]) < 0.06


@pytest.mark.data
def test_real_murine_data_are_recognised(data_file: Callable[[str], Path]) -> None:
    genes = anndata.read_h5ad(data_file("spatial_osmfish_mouse_cortex.h5ad"), backed="r").var
    vocabulary = {gene for genes in human_symbols().values() for gene in genes}
    with pytest.raises(GeneMappingError, match="murine"):
        map_genes(genes, known={}, vocabulary=vocabulary)
    mapping = map_genes(genes, known={}, vocabulary=vocabulary, species="mouse")
    assert mapping.num_mapped >= 28


def test_celltypist_sample_by_the_package_table() -> None:
    """A sample that comes with celltypist, symbols of 2016, against the package's table alone.

    Most of what is missed are genes renamed since (ATP5E, TCEB2) and MTRNR2L copies, which GENCODE dropped;
    the authors' V2 mapping knows such aliases.
    """
    pytest.importorskip("celltypist")
    from importlib.resources import files

    path = files("celltypist").joinpath("data", "samples", "sample_cell_by_gene.csv")
    counts = pd.read_csv(str(path), index_col=0, skiprows=lambda line: line % 8 != 0)
    vocabulary = {gene for genes in human_symbols().values() for gene in genes}
    mapping = map_genes(pd.DataFrame(index=counts.columns), known={}, vocabulary=vocabulary)
    totals = counts.to_numpy().sum(0)
    found = np.array([gene is not None for gene in mapping.ids])
    assert totals[found].sum() >= 0.92 * totals.sum()


@pytest.mark.golden
def test_sixty_thousand_genes_take_no_time(goldens: Callable[[str], Path]) -> None:
    """The bound is loose for busy machines; the time is that of dictionary look-ups, not of loops over pandas."""
    real = dictionaries(goldens("geneformer/dict_safe"), "gc104M")
    ids = [*sorted(real["vocabulary"]), *(f"ENSG{90_000_000 + i:011d}" for i in range(40_000))]  # type: ignore[type-var]
    genes = pd.DataFrame({"ensembl_id": ids[:60_000]})
    map_genes(genes, **real)  # type: ignore[arg-type]
    start = time.process_time()
    map_genes(genes, **real)  # type: ignore[arg-type]
    assert time.process_time() - start < 1.0
