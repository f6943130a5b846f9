"""scGPT folders: three key layouts, args of any age; nothing is random in silence, contradicted or executed."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import scfm
from attacks.pickles import GADGETS, malicious, torch_legacy, torch_zip
from models import scgpt_cells
from models.scgpt_cells import CLS, PARTS, beside, cells
from scfm.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    InvalidArgumentError,
    MissingFileError,
    ScfmError,
    UnsafeCheckpointError,
)
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from scfm.models.scgpt.names import our_name, plain_name, their_name
from scfm.models.scgpt.original import ARGS as ARGS_NAMES
from scfm.models.scgpt.original import Source, config_of

ARGS = {
    "embsize": 32,
    "nheads": 2,
    "d_hid": 48,
    "nlayers": 2,
    "n_layers_cls": 3,
    "dropout": 0.2,
    "pad_token": "<pad>",
    "pad_value": -2,
    "mask_value": -1,
    "n_bins": 51,
    "max_seq_len": 100,
    "input_style": "binned",
    "input_emb_style": "continuous",
    "MVC": True,
    "USE_CLS": False,
    "save_dir": "/somewhere/else",
}
Edit = Callable[[dict], object]


def released(model: Scgpt, folder: Path, *, args: dict | None = None, rename=lambda name: name) -> Path:
    """The model as its authors would have released it."""
    folder.mkdir(exist_ok=True)
    state = {rename(their_name(name)): tensor for name, tensor in model.state_dict().items()}
    torch.save(OrderedDict(state), folder / "best_model.pt")
    (folder / "args.json").write_text(json.dumps(ARGS if args is None else args))
    tokens = list(model.vocab.token.items())
    (folder / "vocab.json").write_text(json.dumps(dict(reversed(tokens))))
    return folder


def edited(folder: Path, edit: Edit) -> Path:
    state = torch.load(folder / "best_model.pt", weights_only=True)
    edit(state)
    torch.save(state, folder / "best_model.pt")
    return folder


@pytest.fixture
def model() -> Scgpt:
    return scgpt_cells.model()


@pytest.fixture
def folder(model: Scgpt, tmp_path: Path) -> Path:
    return released(model, tmp_path / "released")


LAYOUTS = {
    "torch": lambda name: name,
    "flash": lambda name: name.replace("in_proj_", "Wqkv."),
    "wrapped": lambda name: name.replace("self_attn.", "self_attn._impl.").replace("in_proj_", "Wqkv."),
    "distributed": lambda name: f"module.{name}",
    "distributed flash": lambda name: "module.module." + name.replace("in_proj_", "Wqkv."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(model, tmp_path: Path, layout: str) -> None:
    folder = released(model, tmp_path / "model", rename=LAYOUTS[layout])
    again = scfm.load(folder, dtype="float32")
    assert again.family == "scgpt" and not again.training and again.source == str(folder)
    assert again.config == model.config and again.vocab.token == model.vocab.token
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    report = again.load_report
    assert len(report.loaded) == len(model.state_dict()) and not report.ignored and not report.missing
    assert len(report.renamed) == {"torch": 0, "flash": 4, "wrapped": 8}.get(layout, len(report.loaded))
    assert report.weights_sha256 and json.dumps(report.to_dict())
    np.testing.assert_array_equal(again.embed(cells(5)), model.embed(cells(5)))


@pytest.mark.parametrize("name", PARTS)
def test_a_saved_folder_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = scgpt_cells.model(name)
    folder = model.save(tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.json",
    ]
    again = scfm.load(folder, dtype="float32")
    assert again.config == model.config and again.vocab.token == model.vocab.token
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    packed = cells(5, cls_value=model.config.pad_value)
    with torch.inference_mode():
        one, two = (m.forward(packed, **beside(m, packed)) for m in (model, again))
        assert torch.equal(one.hidden, two.hidden) and torch.equal(one.expression, two.expression)
    assert set(again.load_report.loaded) == set(load_file(folder / "model.safetensors"))
    with pytest.raises(InvalidArgumentError, match="options"):
        scfm.load(folder, options={"nhead": 2})
    with pytest.raises(InvalidArgumentError, match="not an empty folder"):
        model.save(folder)
    assert scfm.load(folder / "model.safetensors", dtype="float32").config == model.config


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_seen_in_the_weights(name: str, tmp_path: Path) -> None:
    """What the weights do not show is said by the constructor's arguments, in a file or in the call."""
    model = scgpt_cells.model(name)
    config = model.config
    folder = released(model, tmp_path / "model", args={"embsize": 32, "nheads": 2, "nlayers": 2})
    unseen = {
        "cell_emb_style": config.cell_style,
        "pad_value": config.pad_value,
        "decoder_activation": config.decoder_activation,
        "decoder_adaptive_bias": config.adaptive_bias,
        "pert_pad_id": config.pert_pad_id,
        "pre_norm": config.pre_norm,
        "max_seq_len": config.max_tokens,
        "use_fast_transformer": True,
    }
    if config.mvc_style is not None:
        unseen["mvc_decoder_style"] = config.mvc_style
    said = scfm.load(folder, options=unseen, dtype="float32")
    (folder / "model_kwargs.json").write_text(json.dumps(unseen))
    written = scfm.load(folder, dtype="float32")
    assert said.config == written.config == config
    packed = cells(5, cls_value=config.pad_value)
    with torch.inference_mode():
        one, two = (m.forward(packed, **beside(m, packed)) for m in (model, written))
        assert torch.equal(one.expression, two.expression)
        assert torch.equal(one.cell_embeddings, two.cell_embeddings)


def test_args_of_older_releases_are_filled_in(model, tmp_path: Path) -> None:
    old = {key: ARGS[key] for key in ("embsize", "nheads", "nlayers", "d_hid", "dropout", "pad_token")}
    config = scfm.load(released(model, tmp_path / "model", args=old)).config
    assert (config.max_tokens, config.num_bins, config.pad_value, config.mask_value) == (1200, 51, -2.0, -1.0)
    assert config.mvc_style == "inner product" and config.has_flags


def test_announced_heads_that_the_file_lacks_are_reported_and_never_random(model, tmp_path: Path) -> None:
    folder = released(model, tmp_path / "model", args={**ARGS, "USE_CLS": True})
    edited(folder, lambda state: [state.pop(name) for name in list(state) if name.startswith("mvc_decoder.")])
    again = scfm.load(folder, dtype="float32")
    assert set(again.load_report.missing) == {"cls_decoder.*", "mvc_decoder.*"}
    assert again.mvc_decoder is None and "mvc_decoder" in str(again.load_report)
    with pytest.raises(InvalidArgumentError, match="load_report"):
        again.forward(cells(2)).mvc  # noqa: B018
    np.testing.assert_array_equal(again.embed(cells(5)), model.embed(cells(5)))


def test_modules_of_no_scgpt_are_named_and_left_out(folder, model) -> None:
    edited(
        folder,
        lambda state: state.update({"module.sim[0].weight": torch.ones(2), "tissue.out": torch.ones(1)}),
    )
    with pytest.warns(scfm.ScfmWarning, match=r"of sim\[0\], tissue: part of no released scGPT"):
        again = scfm.load(folder, dtype="float32")
    assert set(again.load_report.ignored) == {"module.sim[0].weight", "tissue.out"}
    np.testing.assert_array_equal(again.embed(cells(5)), model.embed(cells(5)))


def test_counts_of_training_batches_are_accounted_for(tmp_path: Path) -> None:
    folder = released(scgpt_cells.model("batches"), tmp_path / "model")
    edited(folder, lambda state: state.update({"dsbn.bns.0.num_batches_tracked": torch.tensor(7)}))
    assert set(scfm.load(folder).load_report.ignored) == {"dsbn.bns.0.num_batches_tracked"}


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (
            lambda s: s.pop("transformer_encoder.layers.1.self_attn.in_proj_bias"),
            r"layers\.1\.self_attn\.in_proj_bias",
        ),
        (lambda s: s.pop("transformer_encoder.layers.0.norm1.weight"), "norm1"),
        (lambda s: s.pop("value_encoder.linear2.weight"), r"value_encoder\.linear2\.weight"),
        (lambda s: s.pop("mvc_decoder.W.weight"), r"mvc_decoder\.W\.weight"),
        (lambda s: s.pop("encoder.embedding.weight"), r"encoder\.embedding\.weight"),
        (lambda s: s.update({"decoder.fc.6.weight": torch.ones(2, 2)}), r"unexpected[\s\S]*decoder\.fc\.6"),
        (
            lambda s: s.update({"decoder.fc.0.bias": torch.ones(5)}),
            r"wrong shape[\s\S]*found \[5\], expected \[32\]",
        ),
        (lambda s: s.update({"decoder.fc.0.bias": torch.full((32,), torch.nan)}), "NaN"),
        (lambda s: s.update({"decoder.fc.0.bias": torch.ones(32, dtype=torch.int64)}), "int64"),
        (
            lambda s: s.update({"transformer_encoder.layers.0.self_attn.Wqkv.bias": torch.ones(96)}),
            "two tensors for one name",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, edit: Edit, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        scfm.load(edited(folder, edit))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"embsize": 64},
            r"args\.json says embsize = 64; the weights have 32 \(encoder\.embedding\.weight\)",
        ),
        ({"nlayers": 12}, r"nlayers = 12; the weights have 2"),
        ({"d_hid": 512}, "d_hid = 512"),
        ({"input_emb_style": "category"}, r"input_emb_style = 'category'.*'continuous'.*value_encoder"),
        ({"nlayers": "two"}, "nlayers"),
    ],
)
def test_args_that_contradict_the_weights_are_named(model, tmp_path: Path, change: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        scfm.load(released(model, tmp_path / "model", args={**ARGS, **change}))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"do_dab": True}, "do_dab = True"),
        ({"do_mvc": False}, "do_mvc = False"),
        ({"use_batch_labels": True}, "use_batch_labels = True"),
        ({"domain_spec_batchnorm": "batchnorm"}, "domain_spec_batchnorm = 'plain'"),
        ({"explicit_zero_prob": True}, "explicit_zero_prob"),
        ({"ntoken": 60697}, "ntoken = 60697"),
        ({"mvc_decoder_style": "sum query"}, "mvc_decoder_style"),
        ({"use_mod": True}, "use_mod"),
    ],
)
def test_options_that_contradict_the_weights_are_named(folder, options: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        scfm.load(folder, options=options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cell_emb": "cls"}, "cell_emb.*Known are"),
        ({"cell_emb_style": "max"}, "cell_emb_style"),
        ({"nhead": 5}, "nhead"),
        ({"dropout": 1.5}, "dropout"),
        ({"fast_transformer_backend": "linear"}, "fast_transformer_backend"),
        ({"pad_token": "<nothing>"}, "pad_token"),
    ],
)
def test_impossible_options_are_named(folder, options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        scfm.load(folder, options=options)


def test_binning_on_the_way_into_the_generator_is_refused(tmp_path: Path) -> None:
    folder = released(scgpt_cells.model("generator"), tmp_path / "model", args={**ARGS, "MVC": False})
    assert scfm.load(folder, options={"n_input_bins": 0}).config.perturbation
    with pytest.raises(ConfigError, match="n_input_bins"):
        scfm.load(folder, options={"n_input_bins": 51})


@pytest.mark.parametrize(
    ("vocabulary", "named"),
    [
        ({"A": 0, "<pad>": 1, "<cls>": 2, "<eoc>": 3}, r"4 tokens; the gene table .* has 123 rows"),
        ({"A": 0, "B": 1}, r"5 tokens \(<pad>, <cls>, <eoc> appended\)"),
        ({"A": 0, "B": 0}, "share the id 0"),
        ({"A": 0, "B": 7}, "'B' has id 7"),
        ({"A": 0, "B": "1"}, "'B'"),
        (["A"], "object"),
    ],
)
def test_vocabularies_of_another_model_are_named(folder, vocabulary, named: str) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ScfmError, match=named):
        scfm.load(folder)


def test_without_a_vocabulary_it_runs_on_ids(folder, model) -> None:
    (folder / "vocab.json").rename(folder.parent / "genes.json")
    bare = scfm.load(folder, dtype="float32")
    np.testing.assert_array_equal(bare.embed(cells(5)), model.embed(cells(5)))
    with pytest.raises(InvalidArgumentError, match=r"vocab\.json"):
        bare.tokenizer  # noqa: B018
    with pytest.raises(InvalidArgumentError, match="pad"):
        bare.forward(cells(2), padding="plain")
    assert scfm.load(folder, genes=folder.parent / "genes.json").vocab.token == model.vocab.token
    assert scfm.load(folder, genes=model.vocab).vocab == model.vocab
    with pytest.raises(InvalidArgumentError, match="genes"):
        scfm.load(folder, genes=["A"])


def test_a_weights_file_alone_needs_its_family_and_its_heads(folder, model, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "best_model.pt", alone / "epoch3.pt")
    with pytest.raises(MissingFileError, match=r"args\.json"):
        scfm.load(alone / "epoch3.pt")
    with pytest.raises(ConfigError, match="attention heads"):
        scfm.load(alone / "epoch3.pt", family="scgpt")
    with pytest.raises(MissingFileError, match=r"best_model\.pt"):
        scfm.load(alone, family="scgpt")
    again = scfm.load(alone / "epoch3.pt", family="scgpt", options={"nhead": 2}, dtype="float32")
    np.testing.assert_array_equal(again.embed(cells(5)), model.embed(cells(5)))
    with pytest.raises(MissingFileError):
        scfm.load(folder, family="geneformer")


def test_arguments_of_other_families_are_refused(folder, tiny_model, tmp_path: Path) -> None:
    for name, value in (("dictionaries", folder), ("version", "V2"), ("variant", "cell")):
        with pytest.raises(InvalidArgumentError, match=f"{name}.*scgpt"):
            scfm.load(folder, **{name: value})
    with pytest.raises(InvalidArgumentError, match=r"options.*geneformer"):
        scfm.load(tiny_model.save(tmp_path / "geneformer"), options={"nhead": 2})


@pytest.mark.parametrize("layout", [torch_zip, torch_legacy])
@pytest.mark.parametrize("gadget", [g for g in GADGETS if g.live], ids=lambda g: g.called)
def test_no_weights_file_runs_anything(folder, tmp_path: Path, gadget, layout) -> None:
    canary = tmp_path / "canary"
    (folder / "best_model.pt").write_bytes(layout(malicious(gadget, canary)))
    with pytest.raises(UnsafeCheckpointError, match=gadget.called.replace(".", r"\.")):
        scfm.load(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.json", b"{"),
        ("args.json", b"[1]"),
        ("args.json", b'{"embsize": 32, "nheads": 2, "nlayers": 2, "embsize": 64}'),
        ("args.json", b'{"embsize": 32, "nheads": 2, "nlayers": 2, "dropout": NaN}'),
        ("vocab.json", b'{"A": 0, "A": 1}'),
        ("model_kwargs.json", b"nothing"),
        ("best_model.pt", b""),
        ("best_model.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    ],
)
def test_malformed_files_are_named(folder, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        scfm.load(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": "red"}, "colour"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 64}, "wrong shape"),
        ({"num_classes": 3}, r"missing[\s\S]*cls_decoder"),
        ({"mvc_style": None}, r"unexpected[\s\S]*mvc_decoder"),
        ({"vocab_size": 5}, "123 tokens"),
    ],
)
def test_a_saved_folder_that_was_changed_is_refused(model, tmp_path: Path, change: dict, named: str) -> None:
    folder = model.save(tmp_path / "saved")
    content = json.loads((folder / "config.json").read_text())
    content["scfm"]["config"] |= change
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises((CheckpointError, ConfigError), match=named):
        scfm.load(folder)
    del content["scfm"]["config"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"scfm\.config"):
        scfm.load(folder)


@pytest.mark.golden
def test_the_released_whole_human_model_has_its_size(goldens) -> None:
    """args.json is the real one; its weights, of which no number is needed, are those of a published file's size."""
    args = json.loads((goldens("scgpt/vocab") / "args_whole_human.json").read_text())
    config = ScgptConfig(vocab_size=60_697, mvc_style="inner product", has_flags=True)
    with torch.device("meta"):
        model = Scgpt(config)
    assert model.num_parameters() == 51_330_049
    shapes = {their_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, absent = config_of(
        shapes, Path("best_model.pt"), args=Source("args.json", args, ARGS_NAMES), kwargs=[]
    )
    assert found == config and not absent


def test_layers_without_end_are_refused_before_anything_is_allocated(folder) -> None:
    edited(folder, lambda s: s.update({"transformer_encoder.layers.99998.norm1.weight": torch.ones(32)}))
    (folder / "args.json").write_text(json.dumps({**ARGS, "nlayers": 99_999}))
    with pytest.raises(ConfigError, match="nlayers"):
        scfm.load(folder)


def test_names_go_both_ways() -> None:
    for parts in PARTS:
        for name in scgpt_cells.model(parts).state_dict():
            theirs = their_name(name)
            assert our_name(theirs) == name and plain_name(theirs) == theirs


def test_half_precision_files_become_float32(folder, model) -> None:
    edited(folder, lambda s: s.update({name: tensor.half() for name, tensor in s.items()}))
    again = scfm.load(folder, dtype="float32")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert (again.embed(cells(5)) * model.embed(cells(5))).sum(1).min() > 0.9999


def test_the_files_may_vanish_after_loading(folder, model) -> None:
    again = scfm.load(folder, dtype="float32")
    shutil.rmtree(folder)
    np.testing.assert_array_equal(again.embed(cells(5)), model.embed(cells(5)))
    assert int(cells(1).token_ids[0]) == CLS
