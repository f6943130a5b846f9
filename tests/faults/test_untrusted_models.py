"""No model file runs code, reaches outside its folder or loads wrongly (fault rows 1, 2, 7 to 12, 14, 15)."""

from __future__ import annotations

import argparse
import ast
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import scfm
from attacks.pickles import (
    GADGETS,
    Gadget,
    call,
    dictionary,
    malicious,
    other_ways,
    text,
    torch_legacy,
    torch_zip,
)
from attacks.safetensors_files import GOOD, HOSTILE, build, tensor
from scfm.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    IntegrityError,
    MissingFileError,
    ScfmWarning,
    UnsafeCheckpointError,
    VersionError,
)
from scfm.models.folder import FORMAT_VERSION, inspect_folder
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.load_report import fit_state
from scfm.models.weights import file_sha256, read_weights, write_safetensors

LIVE = Gadget("os", "system", ("touch '{canary}'",), live=True)


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


# Rows 1, 2: torch files in both layouts


@pytest.mark.parametrize("layout", [torch_zip, torch_legacy])
@pytest.mark.parametrize(
    "gadget", [g for g in GADGETS if g.called != "collections.Counter"], ids=lambda g: g.called
)
def test_a_torch_file_runs_nothing(gadget: Gadget, layout: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        path = written(tmp_path, name, layout(malicious(gadget, canary)))
        with pytest.raises(UnsafeCheckpointError, match=gadget.called.replace(".", r"\.")):
            read_weights(path)
    assert not canary.exists()


@pytest.mark.parametrize("layout", [torch_zip, torch_legacy])
def test_the_attack_is_live(layout: Any, tmp_path: Path) -> None:
    """The same file does run its command where torch is told to trust it (in a child)."""
    canary = tmp_path / "canary"
    path = written(tmp_path, "model.bin", layout(malicious(LIVE, canary)))
    code = "import torch, sys; torch.load(sys.argv[1], weights_only=False)"
    subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=120, check=False)
    assert canary.exists()


@pytest.mark.parametrize("way", sorted(other_ways(Path("canary"))))
@pytest.mark.parametrize("layout", [torch_zip, torch_legacy])
def test_no_other_opcode_in_a_torch_file(way: str, layout: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises((CheckpointError, FormatError)) as caught:
        read_weights(written(tmp_path, "model.bin", layout(other_ways(canary)[way])))
    assert not canary.exists()
    # What torch may build of an OrderedDict or a text is inert, and is then no tensor.
    inert = {"BUILD", "object dtype", "before the dict"}
    assert way in inert or isinstance(caught.value, UnsafeCheckpointError)


def test_a_dictionary_with_attributes_in_the_place_of_methods_is_read_as_a_dictionary(tmp_path: Path) -> None:
    """BUILD gives an OrderedDict attributes; "items" among them must not stand in for the method."""
    torch.save(OrderedDict(a=torch.ones(3)), tmp_path / "good.bin")
    state = b"}" + b"".join(text(name) + b"Ns" for name in ("items", "keys", "values", "__iter__")) + b"b."
    with (
        zipfile.ZipFile(tmp_path / "good.bin") as good,
        zipfile.ZipFile(tmp_path / "model.bin", "w") as changed,
    ):
        for entry in good.infolist():
            content = good.read(entry)
            changed.writestr(
                entry.filename, content[:-1] + state if entry.filename.endswith(".pkl") else content
            )
    assert torch.load(tmp_path / "model.bin", weights_only=True).items is None
    assert torch.equal(read_weights(tmp_path / "model.bin")["a"], torch.ones(3))


def test_a_bare_pickle_named_like_weights_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(UnsafeCheckpointError, match=r"os\.system"):
        read_weights(written(tmp_path, "model.pth", malicious(LIVE, canary)))
    with pytest.raises(UnsafeCheckpointError, match=r"os\.system"):
        read_weights(written(tmp_path, "b.pth", b"\x80\x02" + call(LIVE, canary) + b"."))
    with pytest.raises(FormatError, match="not a torch file"):
        read_weights(written(tmp_path, "c.pth", dictionary(b"K\x01")))
    assert not canary.exists()


# Row 7: no fallback


def test_a_harmless_but_unknown_class_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(2), "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"argparse\.Namespace.*trust_pickle"):
        read_weights(path)
    torch.save({"weight": torch.nn.Linear(2, 2)}, path)
    with (
        pytest.warns(ScfmWarning, match="trust_pickle"),
        pytest.raises(CheckpointError, match="not named tensors"),
    ):
        read_weights(path, trust_pickle=True)


def test_trust_loads_what_the_safe_way_refuses(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": Tagged(torch.ones(2))}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"_rebuild_from_type_v2"):
        read_weights(path)
    with pytest.warns(ScfmWarning, match="trust_pickle"):
        assert torch.equal(torch.Tensor(read_weights(path, trust_pickle=True)["weight"]), torch.ones(2))


class Tagged(torch.Tensor):
    """A tensor class of someone else's."""


# Row 8 and the house rule behind rows 1 to 8: nothing else in the package unpickles or evaluates


def test_the_package_never_unpickles_or_evaluates() -> None:
    forbidden = {
        ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("joblib", "load"),
        ("pandas", "read_pickle"), ("pd", "read_pickle"), ("marshal", "loads"), ("shelve", "open"),
        ("yaml", "load"), ("os", "system"), ("dill", "load"), ("cloudpickle", "load"),
    }  # fmt: skip
    found = []
    for file in Path(scfm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = node.func, {keyword.arg: keyword.value for keyword in node.keywords}
            place = f"{file.name}:{node.lineno}"
            if isinstance(name, ast.Name) and name.id in ("eval", "exec", "compile"):
                found.append(f"{place} {name.id}")
            if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):
                called = (name.value.id, name.attr)
                if called in forbidden or (called == ("torch", "load") and file.name != "torch_file.py"):
                    found.append(f"{place} {'.'.join(called)}")
            for keyword in ("allow_pickle", "trust_remote_code", "shell"):
                value = keywords.get(keyword)
                if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"{place} {keyword}=")
    assert found == []


# Row 9: safetensors


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_lying_safetensors_file_is_named(lie: str, tmp_path: Path) -> None:
    content, says = HOSTILE[lie]
    with pytest.raises(FormatError, match=says):
        read_weights(written(tmp_path, "model.safetensors", content))


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(FormatError):
            read_weights(written(tmp_path, f"{length}.safetensors", GOOD[:length]))
    assert read_weights(written(tmp_path, "good.safetensors", GOOD)).shapes == {"a": (2,), "b": (1,)}


def test_a_truncated_torch_file_is_a_format_error(tmp_path: Path) -> None:
    whole = tmp_path / "whole.bin"
    for zipped in (True, False):
        torch.save({"a": torch.arange(300.0)}, whole, _use_new_zipfile_serialization=zipped)
        content = whole.read_bytes()
        for length in range(0, len(content), 29):
            with pytest.raises(FormatError):
                read_weights(written(tmp_path, "cut.bin", content[:length]))


def test_stand_ins_and_wrong_archives(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    with pytest.raises(FormatError, match="git lfs pull"):
        read_weights(written(tmp_path, "pytorch_model.bin", pointer))
    with pytest.raises(FormatError, match="web page"):
        read_weights(written(tmp_path, "pytorch_model.bin", b"<html><body>Not found"))
    with pytest.raises(FormatError, match="no torch file"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("../../evil", "x")
        read_weights(written(tmp_path, "evil.bin", stream.getvalue()))
    with pytest.raises(FormatError, match="compressed"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        read_weights(written(tmp_path, "bomb.bin", stream.getvalue()))
    with pytest.raises(FormatError, match=r"must be \.safetensors"):
        read_weights(written(tmp_path, "model.npz", b"PK"))


@pytest.mark.parametrize("claimed", [10**6, 10**12])
def test_a_torch_tensor_larger_than_its_data_is_refused(claimed: int, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.zeros(1).expand(claimed)}, path)  # strides of 0: nothing stored, all claimed
    with pytest.raises(FormatError, match="tensor 'a'"):
        read_weights(path)


def test_sparse_and_quantized_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    with pytest.raises((FormatError, UnsafeCheckpointError)):
        read_weights(path)


# Row 10: what does not fit


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_nan_and_infinity_are_named(bad: float, dtype: torch.dtype, ending: str, tmp_path: Path) -> None:
    tensors = {
        "good": torch.full((2000,), torch.finfo(dtype).max, dtype=dtype),
        "bad": torch.zeros(7, dtype=dtype),
    }
    tensors["bad"][3] = bad
    path = tmp_path / f"model.{ending}"
    if ending == "bin":
        torch.save(tensors, path)
    else:
        write_safetensors(path, tensors)
    weights = read_weights(path)
    assert torch.equal(weights["good"], tensors["good"])  # its sum overflows, its numbers do not
    with pytest.raises(CheckpointError, match=r"tensor 'bad'.*1 of 7"):
        weights["bad"]


def test_opposite_infinities_do_not_cancel(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": torch.tensor([float("inf"), float("-inf"), 1.0])})
    with pytest.raises(CheckpointError, match="2 of 3"):
        read_weights(tmp_path / "m.safetensors")["a"]


def test_every_difference_is_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": torch.zeros(2, 3), "b": torch.zeros(4), "left.over": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        fit_state({"a": (3, 2), "b": (4,), "c": (5,)}, read_weights(path), family="geneformer")
    message = str(caught.value)
    for part in (
        "missing (1)",
        "c [5]",
        "unexpected (1)",
        "left.over [1]",
        "a: found [2, 3], expected [3, 2]",
    ):
        assert part in message, part
    assert str(path) in message


def test_a_vocabulary_of_another_size_and_integers_for_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"embeddings": torch.zeros(10, 4)})
    with pytest.raises(CheckpointError, match=r"found \[10, 4\], expected \[12, 4\]"):
        fit_state({"embeddings": (12, 4)}, read_weights(path), family="geneformer")
    write_safetensors(path, {"embeddings": torch.zeros(12, 4, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match="wrong dtype"):
        fit_state({"embeddings": (12, 4)}, read_weights(path), family="geneformer")


# Row 11: config.json

GOOD_CONFIG = GeneformerConfig.preset("V1-10M").to_hf()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 6.0}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"intermediate_size": [512]}, "intermediate_size"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"max_position_embeddings": 10**7}, "max_position_embeddings"),
        ({"type_vocab_size": 10**9}, "type_vocab_size"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"pad_token_id": 10**6}, "pad_token_id"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob"),
        ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob"),
        ({"attention_probs_dropout_prob": "0.1"}, "attention_probs_dropout_prob"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps"),
        ({"initializer_range": -1}, "initializer_range"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"hidden_act": ["relu"]}, "hidden_act"),
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"hidden_size": 16384, "num_hidden_layers": 200, "intermediate_size": 131072}, "parameters"),
    ],
)
def test_a_hostile_config_is_refused_before_anything_is_allocated(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        GeneformerConfig.from_hf({**GOOD_CONFIG, **change}, path="config.json")
    assert str(caught.value).startswith("config.json")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"])
def test_a_missing_size_is_named(key: str) -> None:
    config = {name: value for name, value in GOOD_CONFIG.items() if name != key}
    with pytest.raises(ConfigError, match=f"{key}: is missing"):
        GeneformerConfig.from_hf(config)


def test_a_path_in_the_config_is_never_followed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "modeling_evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    config = {
        **GOOD_CONFIG,
        "_name_or_path": str(trap),
        "tokenizer_class": "evil.Tokenizer",
        "architectures": [str(trap)],
    }
    assert GeneformerConfig.from_hf(config) == GeneformerConfig.preset("V1-10M")
    assert not (tmp_path / "canary").exists()


# Row 12: outside the folder


@pytest.mark.parametrize(
    "shard",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "c:x",
        "x\0y",
        5,
        None,
        ["a"],
    ],
)
def test_an_index_may_only_name_files_beside_it(shard: Any, tmp_path: Path) -> None:
    index = {"weight_map": {"a": shard}}
    written(tmp_path, "model.safetensors.index.json", json.dumps(index).encode())
    with pytest.raises(UnsafeCheckpointError, match="bare file name"):
        read_weights(tmp_path)


def test_a_shard_that_links_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    outside, model = tmp_path / "secret.safetensors", tmp_path / "model"
    model.mkdir()
    outside.write_bytes(build({"a": tensor([1], 0, 4)}, bytes(4)))
    (model / "part.safetensors").symlink_to(outside)
    written(
        model, "model.safetensors.index.json", json.dumps({"weight_map": {"a": "part.safetensors"}}).encode()
    )
    with pytest.raises(UnsafeCheckpointError, match="outside its folder"):
        read_weights(model)
    (model / "part.safetensors").unlink()
    (model / "real.safetensors").write_bytes(outside.read_bytes())
    (model / "part.safetensors").symlink_to("real.safetensors")
    assert list(read_weights(model)) == ["a"]


@pytest.mark.parametrize("name", ["model.zip", "model.tar", "model.tar.gz", "model.tgz", "model.7z"])
def test_an_archive_is_never_unpacked(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="Unpack it yourself"):
        inspect_folder(written(tmp_path, name, b"PK\x03\x04"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


# Rows 14, 15: versions and checksums


def model_folder(tmp_path: Path, config: dict[str, Any]) -> Path:
    written(tmp_path, "config.json", json.dumps(config).encode())
    written(tmp_path, "model.safetensors", GOOD)
    return tmp_path


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"family": "geneformer", "format_version": FORMAT_VERSION + 1}, "newer scfm.*pip install -U"),
        ({"family": "geneformer", "format_version": 10**9}, "newer scfm"),
        ({"family": "cellgpt9", "format_version": 1}, "cellgpt9.*pip install -U"),
        ({"family": None, "format_version": 1}, "not known here"),
        ({"family": ["x"], "format_version": 1}, "not known here"),
    ],
)
def test_newer_formats_and_unknown_families_ask_for_an_upgrade(
    section: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(VersionError, match=says):
        inspect_folder(model_folder(tmp_path, {**GOOD_CONFIG, "scfm": section}))


@pytest.mark.parametrize(
    "section", [5, [], "1", {}, {"format_version": "1"}, {"format_version": True}, {"format_version": 0}]
)
def test_a_malformed_scfm_section_is_a_format_error(section: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="scfm"):
        inspect_folder(model_folder(tmp_path, {**GOOD_CONFIG, "scfm": section}))


def test_what_folders_are_recognised(tmp_path: Path) -> None:
    kind = inspect_folder(model_folder(tmp_path, GOOD_CONFIG))
    assert (kind.layout, kind.family, kind.format_version) == ("authors", "geneformer", None)
    section = {"family": "geneformer", "format_version": FORMAT_VERSION}
    kind = inspect_folder(model_folder(tmp_path, {**GOOD_CONFIG, "scfm": section}) / "model.safetensors")
    assert (kind.layout, kind.weights.name, kind.format_version) == (
        "scfm",
        "model.safetensors",
        FORMAT_VERSION,
    )
    with pytest.raises(VersionError, match="llama"):
        inspect_folder(model_folder(tmp_path, {"model_type": "llama"}))
    with pytest.raises(VersionError, match="family"):
        inspect_folder(model_folder(tmp_path, GOOD_CONFIG), family="cellgpt9")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"looked for model\.safetensors"):
        inspect_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"looked for config\.json"):
        inspect_folder(tmp_path)
    with pytest.raises(MissingFileError):
        inspect_folder(tmp_path / "nowhere")


def test_a_pinned_checksum_must_match(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, GOOD_CONFIG)
    digest = file_sha256(folder / "model.safetensors")
    assert inspect_folder(folder, sha256=digest.upper()).weights.name == "model.safetensors"
    assert inspect_folder(folder, sha256={"model.safetensors": digest}).family == "geneformer"
    content = bytearray(GOOD)
    content[-1] ^= 1
    written(folder, "model.safetensors", bytes(content))
    with pytest.raises(IntegrityError, match=digest):
        inspect_folder(folder, sha256=digest)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        inspect_folder(folder, sha256={"config.json": digest})


def test_weights_changed_after_reading_have_no_checksum(tmp_path: Path) -> None:
    path = written(tmp_path, "model.safetensors", GOOD)
    weights = read_weights(path)
    path.unlink()
    with pytest.raises(IntegrityError, match="changed or removed"):
        _ = weights.sha256
