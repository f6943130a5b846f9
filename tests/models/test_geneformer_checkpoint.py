"""Loading and saving Geneformer folders: every key accounted for, nothing random, nothing guessed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import scfm
from scfm.errors import CheckpointError, ConfigError, InvalidArgumentError, MissingFileError


@pytest.fixture
def folder(tiny_model, tmp_path):
    return tiny_model.save(tmp_path / "model")


def change(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_saved_folder_comes_back_bit_for_bit(folder, tiny_model, tiny_adata) -> None:
    again = scfm.load(folder, dtype="float32")
    assert again.vocab == tiny_model.vocab.__class__.from_files(folder / "vocab.json")
    assert again.config == tiny_model.config and again.version == "V2"
    for name, parameter in tiny_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name
    np.testing.assert_array_equal(again.embed(tiny_adata), tiny_model.embed(tiny_adata))
    assert not again.training and again.load_report.unexpected == () and not again.load_report.missing
    assert len(again.load_report.loaded) == len(load_file(folder / "model.safetensors"))
    assert again.load_report.weights_sha256 and str(again.load_report)


def test_a_weights_file_loads_like_its_folder(folder, tiny_adata) -> None:
    one, two = (scfm.load(p, dtype="float32") for p in (folder, folder / "model.safetensors"))
    np.testing.assert_array_equal(one.embed(tiny_adata), two.embed(tiny_adata))


def test_the_file_may_vanish_after_loading(folder, tiny_adata, tiny_model) -> None:
    model = scfm.load(folder, dtype="float32")
    shutil.rmtree(folder)
    np.testing.assert_array_equal(model.embed(tiny_adata), tiny_model.embed(tiny_adata))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop("bert.encoder.layer.1.output.dense.weight"), r"layer\.1\.output\.dense\.weight"),
        (lambda t: t.update({"bert.extra": torch.zeros(2)}), r"bert\.extra"),
        (lambda t: t.update({"cls.predictions.bias": torch.zeros(3)}), r"cls\.predictions\.bias"),
        (lambda t: t.pop("cls.predictions.transform.dense.bias"), r"transform\.dense\.bias"),
        (lambda t: t.update({"cls.predictions.decoder.bias": torch.ones(124)}), "ties"),
    ],
    ids=["missing", "extra", "shape", "half a head", "untied"],
)
def test_what_does_not_fit_is_named(folder, edit, named: str) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError, match=named):
        scfm.load(folder)


def test_old_buffers_and_tied_copies_are_accounted_for(folder) -> None:
    def edit(tensors) -> None:
        tensors["bert.embeddings.position_ids"] = torch.arange(96)[None]
        table = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.weight"] = table.clone()

    change(folder, edit)
    report = scfm.load(folder).load_report
    assert set(report.ignored) == {"bert.embeddings.position_ids", "cls.predictions.decoder.weight"}


def test_an_encoder_without_a_head_embeds_and_says_it_has_no_logits(folder, tiny_adata, tiny_model) -> None:
    def edit(tensors) -> None:
        for name in [n for n in tensors if n.startswith("cls.")]:
            tensors.pop(name)
        for name in list(tensors):
            tensors[name.removeprefix("bert.")] = tensors.pop(name)

    change(folder, edit)
    model = scfm.load(folder, dtype="float32")
    assert len(model.load_report.missing) == 5
    np.testing.assert_array_equal(model.embed(tiny_adata), tiny_model.embed(tiny_adata))
    with pytest.raises(InvalidArgumentError, match="head"):
        model.masked_gene_logits(torch.zeros(2, 32))
    again = scfm.load(model.save(folder.parent / "again"), dtype="float32")
    np.testing.assert_array_equal(again.embed(tiny_adata), model.embed(tiny_adata))


def test_without_dictionaries_the_version_is_asked_for_never_guessed(folder, tiny_adata) -> None:
    (folder / "vocab.json").unlink()
    assert scfm.load(folder).version == "V2"  # scfm's own folder remembers it; the authors' cannot
    config = json.loads((folder / "config.json").read_text())
    del config["scfm"]
    (folder / "config.json").write_text(json.dumps(config))
    packed = scfm.PackedCells.from_lists([[2, 9, 8, 3]])
    model = scfm.load(folder)
    assert model.forward(packed).hidden.shape == (4, 32)
    with pytest.raises(InvalidArgumentError, match="V1"):
        model.embed(packed)
    with pytest.raises(InvalidArgumentError, match="dictionaries"):
        model.embed(tiny_adata)
    assert scfm.load(folder, version="V1").default_pooling == "mean"
    assert scfm.load(folder, version="V2").default_pooling == "cls"
    with pytest.raises(ConfigError, match="V3"):
        scfm.load(folder, version="V3")


@pytest.mark.golden
def test_dictionaries_of_another_vocabulary_are_refused(goldens) -> None:
    folder = goldens("geneformer/model")
    for version, other in (("v1", "v2"), ("v2", "v1")):
        with pytest.raises(ConfigError, match="tokens"):
            scfm.load(
                folder / version / "hf_safetensors", dictionaries=folder / f"token_dictionary_{other}.json"
            )


def test_dtype_is_of_products_and_weights_stay_exact(folder) -> None:
    model = scfm.load(folder, dtype="bfloat16")
    assert model.compute_dtype == torch.bfloat16 and model.gene_table.dtype == torch.float32
    exact = scfm.load(folder, dtype="float32")
    for one, two in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(InvalidArgumentError, match="dtype"):
        scfm.load(folder, dtype="float8")


def test_other_wrong_arguments_are_named(folder, tmp_path, tiny_model) -> None:
    with pytest.raises(MissingFileError, match="nowhere"):
        scfm.load(tmp_path / "nowhere")
    with pytest.raises(InvalidArgumentError, match="variant"):
        scfm.load(folder, variant="cell")
    with pytest.raises(InvalidArgumentError, match="device"):
        scfm.load(folder, device="abacus")
    with pytest.raises(InvalidArgumentError, match="not an empty folder"):
        tiny_model.save(folder)


def test_the_folder_opens_in_transformers_too(folder, tiny_model) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is a bench extra")
    peer = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = torch.randint(0, 124, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = peer(input_ids=tokens).logits[0]
        ours = tiny_model.forward(scfm.PackedCells.from_lists(tokens.tolist())).logits
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("layout", ["hf_cellclassifier", "hf_geneclassifier"])
def test_released_classifiers_load_as_encoders(goldens, version: str, layout: str) -> None:
    folder = goldens(f"geneformer/model/{version}")
    model = scfm.load(
        folder / layout, dictionaries=folder.parent / f"token_dictionary_{version}.json", dtype="float32"
    )
    assert any("classifier" in key for key in model.load_report.ignored)
    assert model.head is None and json.dumps(model.load_report.to_dict())
