"""The authors' file and our folder: nothing random, nothing executed, every contradiction named."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import scfm
from attacks.pickles import GADGETS, Gadget, malicious, torch_legacy, torch_zip
from models import scfoundation_cells
from models.scfoundation_cells import GENES, authors_config, authors_entry, counts, released
from scfm.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    InvalidArgumentError,
    MissingFileError,
    ScfmError,
    UnsafeCheckpointError,
)
from scfm.models.scfoundation.names import COUNTER, our_name, plain_name, their_name
from scfm.models.weights import read_weights
from scfm.tokenize.scfoundation_genes import GENES_FILE

Edit = Callable[[dict], object]


@pytest.fixture(scope="module")
def models():
    return {
        name: scfoundation_cells.model(seed=i, variant=name) for i, name in enumerate(("cell", "rde", "gene"))
    }


@pytest.fixture
def file(models, tmp_path: Path) -> Path:
    return released(tmp_path / "released", **models)


def load(path: Path, **options):
    return scfm.load(path, dtype="float32", **options)


def edited(file: Path, edit: Edit) -> Path:
    content = torch.load(file, weights_only=True)
    edit(content["cell"])
    torch.save(content, file)
    return file


@pytest.mark.parametrize("variant", ["cell", "rde", "gene", None])
def test_every_variant(file: Path, models, variant) -> None:
    want = models[variant or "cell"]
    for path, family in ((file, "scfoundation"), (file, None), (file.parent, None)):
        found = load(path, variant=variant, family=family)
        assert found.family == "scfoundation" and not found.training and found.config == want.config
        for name, tensor in want.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
    report = found.load_report
    assert len(report.loaded) == len(want.state_dict()) - 1 and not report.missing
    assert list(report.ignored) == [f"model.{COUNTER}"] and json.dumps(report.to_dict())
    np.testing.assert_array_equal(found.embed(counts(3)), want.embed(counts(3)))


def test_a_saved_folder_comes_back_bit_for_bit(models, tmp_path: Path) -> None:
    model = scfoundation_cells.model(seed=5, variant="rde")
    model.decoder.performer.calls_since_last_redraw.fill_(17)
    folder = model.save(tmp_path / "saved")
    assert sorted(p.name for p in folder.iterdir()) == [GENES_FILE, "config.json", "model.safetensors"]
    again = load(folder)
    assert again.config == model.config and again.vocab.token == model.vocab.token
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert load(folder, variant="rde").config.variant == "rde"
    with pytest.raises(InvalidArgumentError, match="'rde'"):
        load(folder, variant="cell")
    assert (again.save(tmp_path / "twice") / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    with pytest.raises(InvalidArgumentError):
        model.save(folder)


def test_names_in_both_directions(models) -> None:
    for name in models["cell"].state_dict():
        assert our_name(plain_name(f"module.model.{their_name(name)}")) == name


def test_one_model_alone_under_any_name(models, tmp_path: Path) -> None:
    torch.save(authors_entry(models["gene"]), tmp_path / "mine.pth")
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    found = load(tmp_path / "mine.pth", family="scfoundation", genes=tmp_path / "genes.txt", variant="gene")
    assert found.config.variant == "gene"
    assert load(tmp_path / "mine.pth", family="scfoundation", genes=GENES).config.variant == ""


def test_arguments_that_do_not_fit(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="cell, gene, rde"):
        load(file, variant="ce")
    with pytest.raises(InvalidArgumentError, match="not used by scfoundation"):
        load(file, options={"x": 1})
    with pytest.raises(CheckpointError, match="89 genes"):
        load(file, genes=GENES[:-1])
    (file.parent / GENES_FILE).unlink()
    with pytest.raises(MissingFileError, match=GENES_FILE):
        load(file)


# ---- configurations ---------------------------------------------------------------------------------------------


def inner(entry: dict) -> dict:
    return entry["config"]["model_config"]["mae_autobin"]


def omegaconf_like(config) -> object:
    """The configuration as OmegaConf's objects, by classes of the same names and the same state."""
    module = {
        name: types.ModuleType(name)
        for name in (
            "omegaconf",
            "omegaconf.dictconfig",
            "omegaconf.listconfig",
            "omegaconf.nodes",
            "omegaconf.base",
        )
    }
    made = {}
    for home, name in (
        ("dictconfig", "DictConfig"),
        ("listconfig", "ListConfig"),
        ("nodes", "AnyNode"),
        ("base", "ContainerMetadata"),
        ("base", "Metadata"),
    ):
        cls = type(name, (), {"__module__": f"omegaconf.{home}"})
        cls.__qualname__ = name
        setattr(module[f"omegaconf.{home}"], name, cls)
        made[name] = cls
    sys.modules.update(module)

    def node(cls: str, **state):
        new = made[cls]()
        new.__dict__.update(state)
        return new

    def convert(value, parent):
        if isinstance(value, dict):
            kept = {"ref_type": dict, "object_type": dict, "key_type": str, "optional": True}
            out = node(
                "DictConfig", _metadata=node("ContainerMetadata", **kept), _parent=parent, _flags_cache=None
            )
            out._content = {key: convert(item, out) for key, item in value.items()}
            return out
        if isinstance(value, list):
            out = node("ListConfig", _metadata=node("ContainerMetadata", element_type=int), _parent=parent)
            out._content = [convert(item, out) for item in value]
            return out
        return node("AnyNode", _metadata=node("Metadata", ref_type=object), _parent=parent, _val=value)

    return convert(config, None)


def test_omegaconf_is_read_without_its_code(models, tmp_path: Path) -> None:
    before = set(sys.modules)
    entry = authors_entry(models["rde"])
    config = {**authors_config(models["rde"].config), "mask_ignore_token_ids": [0]}
    entry["config"] = omegaconf_like(config)
    try:
        torch.save({"rde": entry}, tmp_path / "models.ckpt")
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]
    found = load(tmp_path, genes=GENES)
    assert found.config == models["rde"].config
    assert not any(name.startswith("omegaconf") for name in sys.modules)


BAD_CONFIGS: dict[str, Edit] = {
    "another model": lambda e: e["config"].update(model="mae"),
    "no model section": lambda e: e["config"].update(model_config={}),
    "no encoder": lambda e: inner(e).pop("encoder"),
    "encoder of another kind": lambda e: inner(e)["encoder"].update(module_type="performer"),
    "decoder of another kind": lambda e: inner(e)["decoder"].update(module_type="transformer"),
    "norms first": lambda e: inner(e)["encoder"].update(norm_first=True),
    "no length": lambda e: inner(e).pop("seq_len"),
    "length as text": lambda e: inner(e).update(seq_len="92"),
    "negative length": lambda e: inner(e).update(seq_len=-4),
    "huge": lambda e: inner(e)["encoder"].update(hidden_dim=10**12),
    "heads that do not divide": lambda e: inner(e)["encoder"].update(heads=5),
    "no bins": lambda e: e["config"]["dataset_config"]["rnaseq"].update(bin_num=0),
    "infinite": lambda e: inner(e).update(bin_alpha=float("inf")),
    "same ids": lambda e: inner(e).update(mask_token_id=103),
    "ratio": lambda e: e["config"]["dataset_config"]["rnaseq"].update(value_mask_prob=2.0),
    "a list": lambda e: e.update(config=[1, 2]),
    "text": lambda e: e.update(config="mae_autobin"),
    "a tensor": lambda e: inner(e).update(encoder=torch.zeros(3)),
    "a number as key": lambda e: e["config"].update({3: 4}),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configurations_that_cannot_be(file: Path, name: str) -> None:
    with pytest.raises((ConfigError, FormatError), match=r"models\.ckpt"):
        load(edited(file, BAD_CONFIGS[name]))


def test_a_configuration_nested_without_end(file: Path) -> None:
    def deepen(entry: dict) -> None:
        nested: dict = {}
        for _ in range(200):
            nested = {"a": nested}
        entry["config"]["more"] = nested

    with pytest.raises(ConfigError, match="nested too deeply"):
        load(edited(file, deepen))


# ---- weights ----------------------------------------------------------------------------------------------------

BAD_WEIGHTS: dict[str, Edit] = {
    "missing": lambda s: s.pop("model.norm.weight"),
    "left over": lambda s: s.update({"model.extra": torch.zeros(1)}),
    "wrong shape": lambda s: s.update({"model.to_final.weight": torch.zeros(2, 24)}),
    "other positions": lambda s: s.update({"model.pos_emb.weight": torch.zeros(50, 32)}),
    "whole numbers": lambda s: s.update({"model.norm.weight": torch.zeros(24, dtype=torch.int64)}),
    "NaN": lambda s: s["model.norm.weight"].fill_(float("nan")),
    "no tensor": lambda s: s.update({"model.norm.weight": 3}),
    "no features": lambda s: [s.pop(name) for name in list(s) if "projection_matrix" in name],
    "counter of two": lambda s: s.update({f"model.{COUNTER}": torch.zeros(2, dtype=torch.int64)}),
    "counter below zero": lambda s: s.update({f"model.{COUNTER}": torch.tensor(-1)}),
    "twice": lambda s: s.update({"module.model.norm.weight": torch.zeros(24)}),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit(file: Path, name: str) -> None:
    with pytest.raises((CheckpointError, FormatError), match=r"models\.ckpt"):
        load(edited(file, lambda entry: BAD_WEIGHTS[name](entry["state_dict"])))


@pytest.mark.parametrize("content", [[1], {"cell": 3}, {"model": {"x": torch.zeros(1)}}, {}])
def test_files_that_hold_no_models(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "models.ckpt")
    with pytest.raises(FormatError, match=r"models\.ckpt"):
        load(tmp_path, genes=GENES)


# ---- hostile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch_zip, torch_legacy])
@pytest.mark.parametrize("gadget", GADGETS, ids=lambda gadget: gadget.called)
def test_nothing_in_a_file_is_run(tmp_path: Path, gadget: Gadget, layout) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "models.ckpt"
    path.write_bytes(layout(malicious(gadget, canary)))
    with pytest.raises(UnsafeCheckpointError, match=gadget.name):
        load(path, genes=GENES)
    assert not canary.exists()


STATEMENTS = {
    "a class of OmegaConf that is not stood in for": b"comegaconf.omegaconf\nOmegaConf\n)\x81.",
    "its resolver": b"comegaconf.omegaconf\nregister_resolver\n(X\x01\x00\x00\x00atR.",
    "an attribute below a stand-in": b"comegaconf.dictconfig\nDictConfig.__init__.__globals__\n)\x81.",
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_only_the_stand_ins_are_taken(tmp_path: Path, name: str) -> None:
    path = tmp_path / "models.ckpt"
    path.write_bytes(torch_zip(b"\x80\x02" + STATEMENTS[name]))
    with pytest.raises(UnsafeCheckpointError):
        load(path, genes=GENES)


def test_stand_ins_hold_for_this_family_only(tmp_path: Path) -> None:
    """Another family's file with OmegaConf in it stays refused, also after ours was read."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(
        torch_zip(b"\x80\x02comegaconf.dictconfig\nDictConfig\n)\x81}X\x01\x00\x00\x00aK\x01sb.")
    )
    with pytest.raises(UnsafeCheckpointError, match="omegaconf"):
        read_weights(path)


def test_cut_and_flipped_files(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "models.ckpt"
    for size in rng.integers(0, len(whole), size=12).tolist():
        path.write_bytes(whole[:size])
        with pytest.raises(ScfmError):
            load(path, genes=GENES)
    for place in rng.integers(0, 4000, size=40).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(ScfmError):
            load(path, genes=GENES)
