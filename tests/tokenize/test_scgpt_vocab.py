"""scGPT's vocabulary: what it takes, what it appends, and how it names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import scfm
from scfm.errors import ConfigError, FormatError, InvalidArgumentError, MissingFileError
from scfm.tokenize.scgpt_values import value_codes
from scfm.tokenize.scgpt_vocab import ScgptVocab


def test_specials_are_appended_behind_the_last_id_in_the_authors_order() -> None:
    vocab = ScgptVocab.from_dict({"B": 1, "<cls>": 2, "A": 0})
    assert vocab.token == {"A": 0, "B": 1, "<cls>": 2, "<pad>": 3, "<eoc>": 4}
    assert (vocab.size, vocab.pad_id, vocab.cls_id, vocab.eoc_id) == (5, 3, 2, 4)
    assert vocab.genes == ["A", "B"] and vocab.names == ["A", "B", "<cls>", "<pad>", "<eoc>"]
    assert vocab.appended == ("<pad>", "<eoc>")
    again = ScgptVocab.from_dict(vocab.token)
    assert again.token == vocab.token and again.appended == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"A": 0, "B": 2}, "'B' has id 2; 2 tokens have the ids 0 to 1"),
        ({"A": 0, "B": -1}, "'B' has id -1"),
        ({"A": 1, "B": 1}, "'A' and 'B' share the id 1"),
        ({"A": 0, "B": 1.0}, "'B' has 1.0, expected a whole number"),
        ({"A": 0, "B": True}, "'B' has True"),
        ({"A": 0, "B": "1"}, "'B' has '1'"),
        ({"A": 0, "B": None}, "'B' has None"),
        ({"A": 0, "": 1}, "'' with id 1 is no name"),
        ({"<pad>": 0, "<cls>": 1}, "it has no genes"),
        ({}, "0 tokens"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=words) as caught:
        ScgptVocab.from_file(path)
    assert caught.value.path == str(path)
    with pytest.raises(FormatError, match=words):
        ScgptVocab.from_dict(content)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"A": 0, "A": 1}', "'A' stands twice"),
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ("", "empty"),
    ],
)
def test_files_that_are_no_vocabulary(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=words):
        scfm.ScgptTokenizer.from_vocab(path)
    with pytest.raises(MissingFileError):
        scfm.ScgptTokenizer.from_vocab(tmp_path / "none.json")


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "size", "known"),
    [
        (
            "vocab_whole_human",
            60_697,
            {"A1BG": 0, "GAPDH": 9833, "CD3D": 4377, "<pad>": 60_694, "<cls>": 60_695},
        ),
        ("default_census_vocab", 60_697, {"<pad>": 60_694, "<cls>": 60_695, "<eoc>": 60_696}),
        ("default_cellxgene_vocab", 36_574, {"<pad>": 36_571}),
        ("default_gene_vocab", 48_295, {"<pad>": 48_292}),
    ],
)
def test_released_vocabularies(goldens: Any, name: str, size: int, known: dict[str, int]) -> None:
    vocab = ScgptVocab.from_file(goldens("scgpt/vocab") / f"{name}.json")
    assert vocab.size == size and known.items() <= vocab.token.items()


def test_codes_of_values() -> None:
    assert vars(value_codes("continuous")) == {"pad_value": -2.0, "mask_value": -1.0, "num_value_ids": None}
    assert vars(value_codes("category")) == {"pad_value": 51.0, "mask_value": 52.0, "num_value_ids": 53}
    assert value_codes("scaling", "log1p").pad_value == -2.0
    for styles, words in (
        (("category", "log1p"), "gives continuous values"),
        (("category", "normed_raw"), "gives continuous values"),
        (("scaling", "binned"), "no amounts to scale by"),
        (("other", "binned"), "value_style"),
        (("continuous", "other"), "input_style"),
    ):
        with pytest.raises(ConfigError, match=words):
            value_codes(*styles)


def test_a_tokenizer_wants_a_vocabulary() -> None:
    with pytest.raises(InvalidArgumentError, match="from_vocab"):
        scfm.ScgptTokenizer("vocab.json")  # type: ignore[arg-type]
