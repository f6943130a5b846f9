"""Reading and writing weights, and the account that loading gives."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scfm.errors import CheckpointError, ConfigError, FormatError, InvalidArgumentError, MissingFileError
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.load_report import fit_state
from scfm.models.safetensors_header import read_header
from scfm.models.weights import file_sha256, read_weights, write_safetensors

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{dtype}".removeprefix("torch."): (torch.rand(3, 5, generator=generator) * 9).to(dtype)
        for dtype in DTYPES
    } | {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 4), "transposed": torch.rand(4, 6).T}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_and_a_safetensors_file_give_the_same(zipped: bool, tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt", "note": "é"})
    torch.save(tensors, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    for name in ("model.safetensors", "model.bin"):
        weights = read_weights(tmp_path / name)
        assert set(weights) == set(tensors) and len(weights) == len(tensors)
        assert weights.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        for key, tensor in tensors.items():
            assert weights[key].dtype == tensor.dtype
            assert torch.equal(weights[key], tensor)
        assert weights.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        with pytest.raises(KeyError):
            weights["nothing"]


def test_the_folder_order_is_safetensors_first(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path).format == "torch"
    write_safetensors(tmp_path / "part.safetensors", {"a": torch.ones(1)})
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    assert read_weights(tmp_path).source_file.name == "model.safetensors.index.json"
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.full((1,), 2.0)})
    assert float(read_weights(tmp_path)["a"]) == 2.0
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"model\.safetensors, .*pytorch_model\.bin"):
        read_weights(tmp_path / "empty")
    with pytest.raises(MissingFileError):
        read_weights(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_one_set_of_weights(ending: str, tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(4) for i in range(5)}
    weight_map = {}
    for number, names in enumerate((["layer.0", "layer.3"], ["layer.1", "layer.2", "layer.4"])):
        shard = f"model-{number}.{ending}"
        part = {name: tensors[name] for name in names}
        if ending == "bin":
            torch.save(part, tmp_path / shard)
        else:
            write_safetensors(tmp_path / shard, part)
        weight_map |= dict.fromkeys(names, shard)
    stem = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
    index = tmp_path / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 80}, "weight_map": weight_map}))
    weights = read_weights(tmp_path)
    assert {name: weights[name].tolist() for name in weights} == {n: t.tolist() for n, t in tensors.items()}
    lines = subprocess.run(
        ["sha256sum", *sorted(path.name for path in tmp_path.iterdir())],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    ).stdout
    by_name = b"".join(sorted(lines.splitlines(keepends=True), key=lambda line: line[66:]))
    assert weights.sha256 == hashlib.sha256(by_name).hexdigest()

    index.write_text(json.dumps({"weight_map": {**weight_map, "layer.9": f"model-0.{ending}"}}))
    with pytest.raises(CheckpointError, match=r"1 tensors missing \['layer.9'\]"):
        read_weights(tmp_path)
    del weight_map["layer.4"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"1 not expected \['layer.4'\]"):
        read_weights(tmp_path)
    (tmp_path / f"model-1.{ending}").unlink()
    with pytest.raises(MissingFileError, match="shard"):
        read_weights(tmp_path)
    for broken in (
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": "x", "a": "y"}}',
    ):
        index.write_text(broken)
        with pytest.raises(FormatError):
            read_weights(tmp_path)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_strict_header_accepts_all_that_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, layout: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("weights") / "m.safetensors"
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in layout.items()}
    write_safetensors(path, tensors)
    assert {name: list(entry.shape) for name, entry in read_header(path).items()} == {
        name: shape for name, (_, shape) in layout.items()
    }
    weights = read_weights(path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def no_space(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    for call in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, no_space if call == "replace" else lambda handle: no_space(handle, None))
            with pytest.raises(OSError, match="No space"):
                write_safetensors(path, {"a": torch.ones(3)})
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
    shared = torch.zeros(3)
    with pytest.raises(InvalidArgumentError, match="share memory"):
        write_safetensors(path, {"a": shared, "b": shared})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    write_safetensors(path, {"a": torch.ones(3)})
    assert torch.equal(read_weights(path)["a"], torch.ones(3))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """The library's own write fails at a file-size limit, in a child; nothing but the old file is left."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    code = (
        "import resource, signal, sys, torch\n"
        "from scfm.models.weights import write_safetensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_safetensors(sys.argv[1], {'a': torch.zeros(1_000_000)})\n"
        "except OSError: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused"
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "other").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_report_accounts_for_every_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "bert.a.weight": torch.ones(2, 3),
        "bert.position_ids": torch.arange(4),
        "cls.bias": torch.ones(2, dtype=torch.float16),
    }
    write_safetensors(path, tensors)
    state, report = fit_state(
        {"a.weight": (2, 3), "cls.bias": [2], "cls.decoder": (3,)},
        read_weights(path),
        rename=lambda name: name.removeprefix("bert."),
        ignore={"*.position_ids": "a constant buffer"},
        optional={"cls.decoder*": "tied to the embedding"},
        family="geneformer",
    )
    assert set(state) == {"a.weight", "cls.bias"}
    assert torch.equal(state["a.weight"], torch.ones(2, 3)) and state["cls.bias"].dtype == torch.float16
    told = report.to_dict()
    assert told["loaded"] == ["a.weight", "cls.bias"]
    assert told["renamed"] == {"bert.a.weight": "a.weight"}
    assert told["ignored"] == {"bert.position_ids": "a constant buffer"}
    assert told["missing"] == {"cls.decoder": "tied to the embedding"}
    assert told["unexpected"] == []
    assert told["sha256"] == {"model.safetensors": file_sha256(path)}
    assert report.weights_sha256 == file_sha256(path)
    for part in (
        "geneformer: 2 tensors",
        "bert.a.weight -> a.weight",
        "a constant buffer",
        "tied to the embedding",
    ):
        assert part in str(report)
    assert json.loads(json.dumps(told)) == told


def test_two_tensors_may_not_take_one_name(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": torch.zeros(1), "module.a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="two tensors for one name"):
        fit_state(
            {"a": (1,)},
            read_weights(tmp_path / "m.safetensors"),
            rename=lambda name: name.removeprefix("module."),
            family="geneformer",
        )


@pytest.mark.golden
def test_the_authors_layouts_hold_the_same_tensors(goldens: Callable[[str], Path]) -> None:
    folder = goldens("geneformer/model/v1")
    safe, old = read_weights(folder / "hf_safetensors"), read_weights(folder / "hf_bin")
    assert (safe.format, old.format) == ("safetensors", "torch")
    assert set(old) - set(safe) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert all(torch.equal(safe[name], old[name]) for name in safe)


@pytest.mark.golden
def test_the_authors_configs_describe_the_weights(goldens: Callable[[str], Path]) -> None:
    for version in ("v1", "v2"):
        folder = goldens(f"geneformer/model/{version}") / "hf_safetensors"
        config = GeneformerConfig.from_hf(json.loads((folder / "config.json").read_text()))
        weights = read_weights(folder)
        numbers = sum(weights[name].numel() for name in weights if weights[name].is_floating_point())
        assert config.num_parameters() == numbers


@pytest.mark.parametrize(
    ("preset", "parameters"), [("V1-10M", 10_288_722), ("V2-104M", 104_386_867), ("V2-316M", 316_354_867)]
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    config = GeneformerConfig.preset(preset)
    assert config.num_parameters() == parameters
    assert config.head_dim == 64
    assert GeneformerConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert GeneformerConfig(**config.to_dict()) == config
    smaller = GeneformerConfig.preset(preset, vocab_size=1000)
    assert smaller.num_parameters() == parameters - (config.vocab_size - 1000) * (config.hidden_size + 1)


def test_a_silent_config_takes_the_defaults_of_bert_and_an_unknown_preset_is_refused() -> None:
    config = GeneformerConfig.from_hf(
        {
            "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
            "intermediate_size": 16, "max_position_embeddings": 32, "vocab_size": 50,
        }
    )  # fmt: skip
    assert (config.activation, config.hidden_dropout, config.layer_norm_eps) == ("gelu", 0.1, 1e-12)
    with pytest.raises(ConfigError, match="V9"):
        GeneformerConfig.preset("V9")
