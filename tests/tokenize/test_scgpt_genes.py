"""Genes to symbols: the authors' rule, what goes beyond it, murine genes, and what is said where nothing maps."""

from __future__ import annotations

import pandas as pd
import pytest

from scfm.errors import GeneMappingError, InvalidArgumentError
from scfm.tokenize.symbol_genes import map_symbols

VOCABULARY = {"CD3E": 0, "CD4": 1, "GAPDH": 2, "ACTB": 3, "TBCE_ENSG00000284770": 4, "MS4A1": 5, "<pad>": 6}
CD3E, CD4, GAPDH, ACTB = "ENSG00000198851", "ENSG00000010610", "ENSG00000111640", "ENSG00000075624"


def table(index: list[str], **columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame(columns, index=index)


def test_symbols_exactly_as_the_vocabulary_writes_them() -> None:
    mapping = map_symbols(table(["CD3E", "cd4", "CD3E", "Gapdh", "<pad>", "ACTB"]), VOCABULARY)
    assert mapping.ids == ["CD3E", None, "CD3E", None, None, "ACTB"]
    assert not mapping.collapse and mapping.missing == ["cd4", "Gapdh", "<pad>"]
    assert mapping.coverage().num_mapped == 3


def test_the_column_that_maps_most_is_the_authors() -> None:
    genes = table([CD3E, CD4, GAPDH], feature_name=["CD3E", "CD4", "X"], gene=["ACTB", "no", "no"])
    mapping = map_symbols(genes, VOCABULARY)
    assert mapping.ids == ["CD3E", "CD4", None]
    assert mapping.notes == [
        "1 genes more map by Ensembl id or another column than by symbol, as the original does it; "
        "gene_rules='all' takes them."
    ]
    everything = map_symbols(genes, VOCABULARY, rules="all")
    assert everything.ids == ["CD3E", "CD4", "GAPDH"]
    assert everything.routes == ["authors_symbol", "authors_symbol", "ensembl"]


def test_ensembl_ids_where_there_are_no_symbols() -> None:
    mapping = map_symbols(table([f"{CD3E}.12", CD4, "ENSG00000284770", "ENSG99999999999"]), VOCABULARY)
    assert mapping.ids == ["CD3E", "CD4", "TBCE_ENSG00000284770", None]
    assert mapping.routes == ["ensembl_version", "ensembl", "ensembl", "unmapped"]
    assert mapping.notes == []


def test_an_id_takes_no_token_that_a_symbol_has() -> None:
    genes = table(["CD3E", "OLD"], ensembl_id=["", CD3E])
    assert map_symbols(genes, VOCABULARY, rules="all").ids == ["CD3E", None]


def test_a_named_column_is_the_only_one() -> None:
    genes = table(["CD3E", "CD4"], feature_name=["ACTB", "none"], ensembl_id=[CD3E, CD4])
    assert map_symbols(genes, VOCABULARY, gene_column="feature_name").ids == ["ACTB", None]
    assert map_symbols(genes, VOCABULARY, gene_column="index").ids == ["CD3E", "CD4"]
    assert map_symbols(genes, VOCABULARY, rules="authors").ids == ["ACTB", None]
    with pytest.raises(GeneMappingError, match=r"no column 'symbol'.*index, feature_name, ensembl_id"):
        map_symbols(genes, VOCABULARY, gene_column="symbol")
    with pytest.raises(GeneMappingError, match="2 columns of genes are named"):
        map_symbols(pd.concat([genes, genes], axis=1), VOCABULARY, gene_column="feature_name")


def test_murine_genes_through_orthologues_then_upper_cased() -> None:
    genes = table(["Cd3e", "ENSMUSG00000023274", "Gapdh", "Mt-nothing", "Tbce_ensg00000284770"])
    mapping = map_symbols(genes, VOCABULARY, species="mouse")
    assert mapping.ids == ["CD3E", "CD4", "GAPDH", None, "TBCE_ENSG00000284770"]
    assert mapping.routes[:2] == ["ortholog", "ortholog"] and mapping.routes[4] == "upper_cased"
    assert "by upper-cased symbol" in str(mapping.coverage())


def test_murine_genes_are_not_taken_for_human_ones() -> None:
    genes = table(["Cd3e", "Cd4", "Gapdh", "Actb", "Ms4a1", "Foxp3", "Il2", "Ifng", "Cd8a", "Ptprc"])
    with pytest.raises(GeneMappingError, match="look murine") as caught:
        map_symbols(genes, VOCABULARY)
    assert "species='mouse'" in str(caught.value)


@pytest.mark.parametrize(
    ("genes", "options", "words"),
    [
        (
            table(["X1", "X2"]),
            {},
            "none of the 2 genes is in the vocabulary of 7 tokens .*X1, X2.*feature_name",
        ),
        (table(["1", "2"]), {}, "only numbered"),
        (table([]), {}, "has no genes"),
        (table(["CD3E"], feature_name=["X"]), {"gene_column": "feature_name"}, "Leave gene_column"),
        (table(["QQQ"]), {"species": "mouse"}, "Give murine symbols"),
    ],
)
def test_nothing_mapped_says_what_to_do(genes: pd.DataFrame, options: dict[str, str], words: str) -> None:
    with pytest.raises(GeneMappingError, match=words):
        map_symbols(genes, VOCABULARY, **options)


def test_unknown_options_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="species: is 'rat'"):
        map_symbols(table(["CD4"]), VOCABULARY, species="rat")
    with pytest.raises(InvalidArgumentError, match="gene_rules: is 'some'"):
        map_symbols(table(["CD4"]), VOCABULARY, rules="some")
