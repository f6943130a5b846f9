"""Finding, choosing, reading and keeping Geneformer's dictionaries."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.errors import (
    ConfigError,
    FormatError,
    InvalidArgumentError,
    MissingFileError,
    ScfmWarning,
    VersionError,
)
from scfm.tokenize.dictionaries import GeneformerDictionaries

GENES = [f"ENSG{i:011d}" for i in (3, 5, 419, 457)]


def tokens(version: str, genes: list[str] = GENES) -> dict[str, int]:
    specials = ["<pad>", "<mask>"] + (["<cls>", "<eos>"] if version == "V2" else [])
    return {name: token_id for token_id, name in enumerate([*specials, *genes])}


def write_set(
    folder: Path, suffix: str, version: str, *, ending: str = "pkl", genes: list[str] = GENES
) -> Path:
    """One set of four files, as the authors write them: numpy values in the pickles."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, dict[str, Any]] = {
        "token_dictionary": {name: np.int16(token_id) for name, token_id in tokens(version, genes).items()},
        "gene_median_dictionary": {gene: np.float64(1.5 + i / 3) for i, gene in enumerate([*genes, "ENSG9"])},
        "ensembl_mapping_dict": {gene: gene for gene in [*genes, "ENSG9"]}
        | {"TSPAN6": genes[0], "GONE": "ENSG9"},
        "gene_name_id_dict": {"TSPAN6": genes[0], "C1orf9": "ENSG9"},
    }
    for stem, values in content.items():
        path = folder / f"{stem}{suffix}.{ending}"
        if ending == "pkl":
            path.write_bytes(pickle.dumps(values))
        else:
            path.write_text(json.dumps(values, default=lambda number: number.item()))
    return folder / f"token_dictionary{suffix}.{ending}"


@pytest.mark.parametrize("version", ["V1", "V2"])
@pytest.mark.parametrize("suffix", ["", "_gc30M", "_v2", "-my own (1)", ".3"])
@pytest.mark.parametrize("ending", ["pkl", "json"])
def test_a_set_is_read_whole(version: str, suffix: str, ending: str, tmp_path: Path) -> None:
    token_file = write_set(tmp_path, suffix, version, ending=ending)
    for path in (tmp_path, token_file):
        found = GeneformerDictionaries.from_files(path)
        assert found.token == tokens(version)
        assert {type(value) for value in found.token.values()} == {int}
        assert found.median == {gene: 1.5 + i / 3 for i, gene in enumerate(GENES)}
        assert found.mapping == {gene: gene for gene in GENES} | {"TSPAN6": GENES[0]}
        assert found.names == {"TSPAN6": GENES[0], "C1orf9": "ENSG9"}
        assert (found.version, found.source) == (version, str(token_file))
        assert found.vocab_size == len(found.token) and found.genes == GENES
        assert found.genes_without_median == []
        assert found == GeneformerDictionaries.from_files(path, version)


def test_the_version_is_read_never_taken_on_trust(tmp_path: Path) -> None:
    v1, v2 = write_set(tmp_path / "1", "", "V1"), write_set(tmp_path / "2", "", "V2")
    for path, wrong in ((v1, "V2"), (v2, "V1"), (v1.parent, "V2")):
        with pytest.raises(ConfigError, match=f"version='{wrong}'"):
            GeneformerDictionaries.from_files(path, wrong)
    for unknown in ("v1", "V3", ""):
        with pytest.raises(ConfigError, match="'V1' and 'V2'"):
            GeneformerDictionaries.from_files(v1, unknown)


def test_of_several_sets_only_what_is_said_chooses(tmp_path: Path) -> None:
    write_set(tmp_path, "_gc30M", "V1")
    write_set(tmp_path, "_gc104M", "V2")
    with pytest.raises(
        ConfigError, match=r"token_dictionary_gc104M\.pkl \(V2.*token_dictionary_gc30M\.pkl \(V1"
    ):
        GeneformerDictionaries.from_files(tmp_path)
    assert GeneformerDictionaries.from_files(tmp_path, "V1").source.endswith("_gc30M.pkl")
    assert GeneformerDictionaries.from_files(tmp_path, "V2").source.endswith("_gc104M.pkl")
    assert GeneformerDictionaries.from_files(tmp_path, vocab_size=6).version == "V1"
    write_set(tmp_path, "_other", "V2", genes=GENES[:2])
    with pytest.raises(ConfigError, match="several"):
        GeneformerDictionaries.from_files(tmp_path, "V2")
    assert GeneformerDictionaries.from_files(tmp_path, "V2", vocab_size=6).source.endswith("_other.pkl")
    assert GeneformerDictionaries.from_files(tmp_path / "token_dictionary_other.pkl").genes == GENES[:2]


def test_a_json_twin_is_read_instead_of_the_pickle(tmp_path: Path) -> None:
    write_set(tmp_path, "_a", "V1", genes=GENES[:1])
    write_set(tmp_path, "_a", "V1", ending="json")
    assert GeneformerDictionaries.from_files(tmp_path).genes == GENES


def test_a_token_dictionary_alone_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "token_dictionary_v2.json"
    path.write_text(json.dumps(tokens("V2")))
    found = GeneformerDictionaries.from_files(path)
    assert (found.median, found.names) == ({}, {})
    assert found.mapping == {gene: gene for gene in GENES}
    assert found.genes_without_median == GENES
    other = tmp_path / "anything.json"
    other.write_text(json.dumps(tokens("V1")))
    assert GeneformerDictionaries.from_files(other).version == "V1"


def test_siblings_have_the_same_suffix_unless_there_is_only_one_set(tmp_path: Path) -> None:
    write_set(tmp_path, "_a", "V1")
    (tmp_path / "gene_median_dictionary_a.pkl").rename(tmp_path / "gene_median_dictionary.pkl")
    assert len(GeneformerDictionaries.from_files(tmp_path).median) == 4
    write_set(tmp_path, "_b", "V2")
    (tmp_path / "gene_median_dictionary_b.pkl").unlink()
    assert GeneformerDictionaries.from_files(tmp_path, "V2").median == {}


def test_genes_without_a_usable_median_are_counted(tmp_path: Path) -> None:
    (tmp_path / "token_dictionary.json").write_text(json.dumps(tokens("V1")))
    (tmp_path / "gene_median_dictionary.json").write_text(
        json.dumps({GENES[0]: 0.0, GENES[1]: 2, GENES[2]: 1e-7})
    )
    found = GeneformerDictionaries.from_files(tmp_path)
    assert found.median == {GENES[1]: 2.0, GENES[2]: 1e-7}
    assert found.genes_without_median == [GENES[0], GENES[3]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"<pad>": 1, "<mask>": 0}, "<pad> must be 0"),
        ({"<pad>": None}, "<pad> must be 0"),
        ({"<mask>": None}, "<mask> present"),
        ({"<cls>": None}, "both <cls> and <eos>"),
        ({"<eos>": None}, "both <cls> and <eos>"),
        ({GENES[0]: -1}, r"ids are not in 0\.\.9,999,999.*" + GENES[0]),
        ({GENES[0]: 10_000_000}, "ids are not in"),
        ({GENES[0]: 5}, f"2 names share an id.*{GENES[0]}"),
        ({GENES[0]: "4"}, "values must be int"),
        ({GENES[0]: 4.0}, "values must be int"),
        (dict.fromkeys(GENES), "no genes"),
    ],
)
def test_a_malformed_token_dictionary_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    content = {name: value for name, value in {**tokens("V2"), **change}.items() if value is not None}
    path = tmp_path / "token_dictionary.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=says):
        GeneformerDictionaries.from_files(path)


@pytest.mark.parametrize("median", [-1.0, -0.001, float("nan"), float("inf")])
def test_impossible_medians_are_refused(median: float, tmp_path: Path) -> None:
    (tmp_path / "token_dictionary.json").write_text(json.dumps(tokens("V1")))
    (tmp_path / "gene_median_dictionary.pkl").write_bytes(pickle.dumps({GENES[0]: median}))
    with pytest.raises(FormatError, match=GENES[0]):
        GeneformerDictionaries.from_files(tmp_path)


def test_a_mapping_key_may_not_lead_to_two_genes(tmp_path: Path) -> None:
    (tmp_path / "token_dictionary.json").write_text(json.dumps(tokens("V1")))
    mapping = {"Tspan6": GENES[0], "TSPAN6": GENES[1]}
    (tmp_path / "ensembl_mapping_dict.json").write_text(json.dumps(mapping))
    with pytest.raises(FormatError, match="TSPAN6"):
        GeneformerDictionaries.from_files(tmp_path)
    mapping["TSPAN6"] = GENES[0]
    (tmp_path / "ensembl_mapping_dict.json").write_text(json.dumps(mapping))
    assert GeneformerDictionaries.from_files(tmp_path).mapping == {"TSPAN6": GENES[0]}


def test_what_was_looked_for_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"token_dictionary\*"):
        GeneformerDictionaries.from_files(tmp_path)
    with pytest.raises(MissingFileError):
        GeneformerDictionaries.from_files(tmp_path / "nowhere")


# Searching beside a model


@pytest.mark.parametrize(
    "place",
    [
        "model", "model/geneformer", "model/geneformer/gene_dictionaries_30m", "model/gene_dictionaries_30m",
        "geneformer", "geneformer/gene_dictionaries_30m", "gene_dictionaries_30m",
    ],
)  # fmt: skip
def test_each_place_is_searched(place: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert GeneformerDictionaries.find(model) is None
    token_file = write_set(tmp_path / place, "_x", "V1")
    found = GeneformerDictionaries.find(model, vocab_size=6)
    assert found is not None and found.source == str(token_file)


def test_the_authors_repository_gives_each_model_its_own(tmp_path: Path) -> None:
    """V2's dictionaries lie in ../geneformer, V1's one deeper: the model's vocabulary tells them apart."""
    write_set(tmp_path / "geneformer", "_gc104M", "V2")
    write_set(tmp_path / "geneformer" / "gene_dictionaries_30m", "_gc30M", "V1")
    model = tmp_path / "model"
    model.mkdir()
    for version, size in (("V1", 6), ("V2", 8)):
        for options in ({"version": version}, {"vocab_size": size}, {"version": version, "vocab_size": size}):
            found = GeneformerDictionaries.find(model, **options)  # type: ignore[arg-type]
            assert found is not None and found.version == version
    with pytest.warns(ScfmWarning, match="passed over.*token ids only"):
        assert GeneformerDictionaries.find(model, vocab_size=99) is None
    with pytest.warns(ScfmWarning, match="passed over"):
        assert GeneformerDictionaries.find(model, version="V1", vocab_size=8) is None


def test_a_version_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    write_set(tmp_path / "geneformer", "_gc104M", "V2")
    with pytest.raises(ConfigError, match=r"version='V1'.*V2"):
        GeneformerDictionaries.find(tmp_path / "model", version="V1")


def test_what_is_given_comes_first_and_must_fit(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_set(model, "", "V1")
    given_file = write_set(tmp_path / "mine", "_mine", "V2")
    found = GeneformerDictionaries.find(model, given_file.parent)
    assert found is not None and found.version == "V2"
    assert GeneformerDictionaries.find(model, found, vocab_size=8) is found
    assert GeneformerDictionaries.find(model, given_file, vocab_size=16) == found  # a padded embedding
    for given_ in (given_file, found):
        with pytest.raises(ConfigError, match="another model"):
            GeneformerDictionaries.find(model, given_, vocab_size=7)
        with pytest.raises(ConfigError, match="V1"):
            GeneformerDictionaries.find(model, given_, version="V1")
    with pytest.raises(MissingFileError):
        GeneformerDictionaries.find(model, tmp_path / "nowhere")


# Fresh ones, and scfm's own file


def test_a_fresh_vocabulary_keeps_the_order_given() -> None:
    genes = GENES[::-1]
    symbols = {"Tspan6": GENES[0], "TNMD": GENES[1], "A": GENES[2], "a": GENES[3], "X": "ENSG_unknown"}
    for version, first in (("V1", 2), ("V2", 4)):
        found = GeneformerDictionaries.from_vocabulary(
            genes, {GENES[0]: 2, GENES[1]: 0.5, "ENSG9": 1.0}, version, symbols
        )
        assert [found.token[gene] for gene in genes] == list(range(first, first + 4))
        assert found.genes == genes and found.version == version
        assert found.median == {GENES[0]: 2.0, GENES[1]: 0.5}
        assert found.genes_without_median == [GENES[3], GENES[2]]
        assert found.mapping == {gene: gene for gene in GENES} | {"TSPAN6": GENES[0], "TNMD": GENES[1]}
        assert set(found.special_tokens.values()) == set(range(first))


@pytest.mark.parametrize(
    ("genes", "medians", "error"),
    [
        ([], {}, InvalidArgumentError),
        ([GENES[0], GENES[0]], {}, InvalidArgumentError),
        (["<cls>", GENES[0]], {}, InvalidArgumentError),
        (GENES, {GENES[0]: 0.0}, InvalidArgumentError),
        (GENES, {GENES[0]: float("nan")}, InvalidArgumentError),
        (GENES, {GENES[0]: -1.0}, InvalidArgumentError),
    ],
)
def test_a_fresh_vocabulary_is_checked(
    genes: list[str], medians: dict[str, float], error: type[Exception]
) -> None:
    with pytest.raises(error):
        GeneformerDictionaries.from_vocabulary(genes, medians, "V2")
    with pytest.raises(ConfigError):
        GeneformerDictionaries.from_vocabulary(GENES, {}, "V3")


GENE_NAMES = st.text(st.characters(exclude_categories=["Cs", "Lu", "Ll", "Lt"]), min_size=1).filter(
    lambda gene: gene[0] != "<"
)


@given(
    st.lists(GENE_NAMES, min_size=1, max_size=20, unique=True),
    st.lists(st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False), min_size=20, max_size=20),
    st.sampled_from(["V1", "V2"]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_vocab_json_keeps_every_bit(genes: list[str], medians: list[float], version: str) -> None:
    made = GeneformerDictionaries.from_vocabulary(genes, dict(zip(genes, medians, strict=False)), version)
    again = GeneformerDictionaries.from_json(made.to_json(), source=made.source)
    assert again == made
    assert [math.frexp(again.median[gene]) for gene in genes] == [
        math.frexp(made.median[gene]) for gene in genes
    ]


def test_a_saved_folder_is_read_by_itself(tmp_path: Path) -> None:
    made = GeneformerDictionaries.from_vocabulary(
        GENES, dict.fromkeys(GENES, 0.1), "V2", {"TSPAN6": GENES[0]}
    )
    (tmp_path / "vocab.json").write_text(made.to_json(), encoding="utf-8")
    for found in (
        GeneformerDictionaries.find(tmp_path, vocab_size=8),
        GeneformerDictionaries.from_files(tmp_path),
        GeneformerDictionaries.from_files(tmp_path / "vocab.json", "V2"),
    ):
        assert found is not None
        assert (found.token, found.median, found.mapping, found.names) == (
            made.token, made.median, made.mapping, made.names,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="V2"):
        GeneformerDictionaries.find(tmp_path, version="V1")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"format_version": 2}, VersionError, "Upgrade"),
        ({"format": "other"}, FormatError, "not a vocabulary"),
        ({"version": "V1"}, FormatError, "its tokens are V2"),
        ({"token": None}, FormatError, "token"),
        ({"token": {"<pad>": 0}}, FormatError, "<mask>"),
        ({"median": {GENES[0]: "1"}}, FormatError, "median"),
        ({"median": {GENES[0]: -1.0}}, FormatError, "negative"),
        ({"mapping": {"A": 1}}, FormatError, "mapping"),
        ({"names": []}, FormatError, "names"),
    ],
)
def test_a_changed_vocab_json_is_refused(change: dict[str, Any], error: type[Exception], says: str) -> None:
    made = GeneformerDictionaries.from_vocabulary(GENES, dict.fromkeys(GENES, 0.1), "V2")
    content = {**json.loads(made.to_json()), **change}
    with pytest.raises(error, match=says):
        GeneformerDictionaries.from_json(json.dumps(content))


# The authors' own files


@pytest.mark.golden
@pytest.mark.parametrize(
    ("version", "suffix", "num_tokens", "num_keys", "num_names"),
    [("V1", "gc30M", 25_426, 25_424, 40_248), ("V2", "gc104M", 20_275, 91_753, 63_675)],
)
def test_the_authors_files(
    version: str, suffix: str, num_tokens: int, num_keys: int, num_names: int, goldens: Callable[[str], Path]
) -> None:
    """Equal, bit for bit, to what Python's own unpickler reads; quick; and whole after a round trip."""
    folder = goldens("geneformer/dict_pkl")
    start = time.process_time()
    found = GeneformerDictionaries.from_files(folder, version)
    assert time.process_time() - start < 4
    raw = {
        stem: pickle.loads((folder / f"{stem}_{suffix}.pkl").read_bytes())
        for stem in (
            "token_dictionary",
            "gene_median_dictionary",
            "ensembl_mapping_dict",
            "gene_name_id_dict",
        )
    }
    assert found.version == version and found.vocab_size == num_tokens
    assert found.token == raw["token_dictionary"] and len(found.token) == num_tokens
    assert found.median == {
        gene: median for gene, median in raw["gene_median_dictionary"].items() if gene in found.token
    }
    assert found.mapping == {
        key: gene for key, gene in raw["ensembl_mapping_dict"].items() if gene in found.token
    }
    assert found.names == raw["gene_name_id_dict"]
    assert (len(found.mapping), len(found.names), found.genes_without_median) == (num_keys, num_names, [])
    assert GeneformerDictionaries.from_json(found.to_json(), source=found.source) == found


@pytest.mark.golden
def test_the_pickle_free_twins_say_the_same(goldens: Callable[[str], Path]) -> None:
    for suffix in ("gc30M", "gc104M"):
        safe = GeneformerDictionaries.from_files(
            goldens("geneformer/dict_safe") / f"token_dictionary_{suffix}.json.gz"
        )
        whole = GeneformerDictionaries.from_files(
            goldens("geneformer/dict_pkl") / f"token_dictionary_{suffix}.pkl"
        )
        assert safe.token == whole.token
