"""scBERT's files in every form its authors and others left them in; nothing random, contradicted or executed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import scfm
from attacks.pickles import GADGETS, malicious, torch_legacy, torch_zip
from models.scbert_goldens import pack
from scfm.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    InvalidArgumentError,
    MissingFileError,
    UnsafeCheckpointError,
)
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from scfm.models.scbert.names import COUNTER, our_name, their_name

GENES = [f"GENE{number}" for number in range(30)]
SHAPE = {
    "num_genes": 30,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 3,
    "head_dim": 8,
    "num_features": 11,
}
State = dict[str, Tensor]


def make(**changes: object) -> Scbert:
    return Scbert.from_config(ScbertConfig(**(SHAPE | changes)), seed=1)


def state_of(model: Scbert) -> State:
    """As the authors' class names and types it: gene2vec in float64."""
    state = {their_name(name): tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if "pos_emb.emb.weight" in state:
        state["pos_emb.emb.weight"] = state["pos_emb.emb.weight"].double()
    return state


def pretraining_file(path: Path, state: State) -> Path:
    """What pretrain.py saves."""
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    content = {
        "epoch": 7,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "scheduler_state_dict": {"cycle": 0, "max_lr": 1e-4},
        "losses": 0.31,
    }
    torch.save(content, path)
    return path


def load(path: Path, **options: object) -> Scbert:
    options = {"genes": GENES, "dtype": "float32"} | options
    model = scfm.load(path, **options)
    assert isinstance(model, Scbert)
    return model


def hidden(model: Scbert) -> Tensor:
    tokens = np.random.default_rng(0).integers(0, 6, (3, model.config.num_positions))
    with torch.inference_mode():
        return model.forward(pack(tokens)).hidden


def with_prefix(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def with_float32_positions(state: State) -> State:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def as_nano(state: State) -> State:
    """nano-scBERT's layout: one projection, one fn fewer in the feed-forward."""
    nano: State = {}
    for name, tensor in state.items():
        if ".to_q." in name:
            parts = [state[name.replace(".to_q.", f".to_{letter}.")] for letter in "qkv"]
            nano[name.replace(".to_q.", ".to_qkv.")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            nano[name.replace(".fn.fn.", ".fn.")] = tensor
    return nano


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize(
    "layout", [dict, with_prefix, with_float32_positions, as_nano], ids=lambda layout: layout.__name__
)
@pytest.mark.parametrize("bias", [True, False])
def test_layouts(tmp_path, layout: Callable[[State], State], bare: bool, bias: bool) -> None:
    made = make(qkv_bias=bias)
    path, state = tmp_path / "panglao_pretrain.pth", layout(state_of(made))
    if bare:
        torch.save(state, path)
    else:
        pretraining_file(path, state)
    model = load(path)
    assert model.config == made.config
    assert torch.equal(hidden(model), hidden(made))
    assert model.pos_emb.dtype == (torch.float32 if layout is with_float32_positions else torch.float64)
    report = model.load_report
    assert set(report.loaded) == set(state_of(made))
    assert not report.unexpected
    assert not report.missing
    if layout is as_nano:
        assert any(name.endswith("fn.w1.weight") for name in report.renamed)


def test_fine_tuned_files_and_their_classes(tmp_path) -> None:
    made = make(num_classes=3, has_bin_head=False, head_sizes=(9, 5))
    path = pretraining_file(tmp_path / "zheng_best.pth", state_of(made))
    model = load(path, family="scbert")
    assert model.config == made.config
    assert model.class_names == ["0", "1", "2"]
    model.class_names = ["B", "NK", "T"]
    assert model.class_names == ["B", "NK", "T"]
    with pytest.raises(InvalidArgumentError, match="3 classes"):
        model.class_names = ["B", "NK"]
    assert load(path, options={"class_names": ["B", "NK", "T"]}).class_names == ["B", "NK", "T"]
    with pytest.raises(ConfigError, match="class_names"):
        load(path, options={"class_names": ["B", "NK"]})
    with pytest.raises(AttributeError, match="head"):
        _ = model.forward(pack(np.zeros((1, 31)))).logits


def test_without_gene2vec(tmp_path) -> None:
    made = make(gene2vec=False)
    path = pretraining_file(tmp_path / "model.pth", state_of(made))
    model = load(path)
    assert model.config == made.config
    assert "pos_emb.emb.weight" in model.load_report.missing
    assert torch.equal(hidden(model), hidden(made))
    with pytest.raises(CheckpointError, match="how many genes"):
        load(path, genes=None)
    with pytest.raises(InvalidArgumentError, match="gene2vec"):
        model.gene_embeddings()


@pytest.mark.parametrize(
    ("option", "kind"), [("generalized_attention", "generalized"), ("no_projection", "unprojected")]
)
def test_what_weights_do_not_tell(tmp_path, option: str, kind: str) -> None:
    made = make(attention=kind)
    path = pretraining_file(tmp_path / "model.pth", state_of(made))
    assert load(path).config.attention == "favor"
    model = load(path, options={option: True, "ff_chunks": 4, "depth": 2})
    assert model.config == made.config
    assert torch.equal(hidden(model), hidden(made))


@pytest.mark.parametrize(
    "variant",
    [{"norm": "scale"}, {"norm": "rezero"}, {"glu": True}, {"reversible": True}, {"tied_head": True}],
    ids=str,
)
def test_variants_are_seen_in_the_weights(tmp_path, variant: dict[str, object]) -> None:
    made = make(**variant)
    state = {
        their_name(name, reversible=made.config.reversible): tensor
        for name, tensor in made.state_dict().items()
    }
    model = load(pretraining_file(tmp_path / "model.pth", state))
    assert model.config == made.config
    assert torch.equal(hidden(model), hidden(made))


def test_recognised_by_content_or_name(tmp_path) -> None:
    path = pretraining_file(tmp_path / "anything.pth", state_of(make()))
    assert load(path).family == "scbert"
    assert load(tmp_path, family="scbert").family == "scbert"
    with pytest.raises(MissingFileError, match="no model in this folder"):
        load(tmp_path)
    pretraining_file(tmp_path / "another.pth", state_of(make()))
    with pytest.raises(InvalidArgumentError, match="2 checkpoints"):
        load(tmp_path, family="scbert")
    pretraining_file(tmp_path / "panglao_pretrain.pth", state_of(make()))
    assert load(tmp_path).load_report.source.source_file.name == "panglao_pretrain.pth"
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(MissingFileError):
        load(tmp_path / "other.pt")


def test_genes_beside_or_said_which(tmp_path) -> None:
    path = pretraining_file(tmp_path / "panglao_pretrain.pth", state_of(make()))
    with pytest.raises(MissingFileError, match=r"panglao_human.h5ad.*genes=") as raised:
        load(path, genes=None)
    assert raised.value.where == "genes"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "panglao_gene_order_16906.txt").write_text("\n".join(GENES), encoding="utf-8")
    assert load(path, genes=None).vocab.genes == GENES
    with pytest.raises(CheckpointError, match=r"29 genes; the weights in panglao_pretrain\.pth have 30"):
        load(path, genes=GENES[:-1])
    with pytest.raises(InvalidArgumentError, match="variant"):
        load(path, variant="cell")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "rezero", "glu": True, "qkv_bias": True},
        {"norm": "scale", "reversible": True},
        {"attention": "generalized", "tied_head": True, "gene2vec": False},
        {"num_classes": 2, "has_bin_head": False, "class_names": ("A", "B"), "head_sizes": (4, 3)},
    ],
    ids=str,
)
def test_saved_and_loaded_bit_for_bit(tmp_path, changes: dict[str, object]) -> None:
    made = make(**changes)
    path = pretraining_file(
        tmp_path / "model.pth",
        {
            their_name(name, reversible=made.config.reversible): tensor.double()
            if name == "pos_emb"
            else tensor
            for name, tensor in made.state_dict().items()
        },
    )
    options = {"generalized_attention": made.config.attention == "generalized"}
    model = load(path, options=options)
    model.performer.calls_since_last_redraw.fill_(137)
    if model.config.num_classes:
        model.class_names = ["A", "B"]
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved", genes=None)
    assert again.config == model.config
    assert again.vocab.genes == GENES
    assert all(
        torch.equal(tensor, again.state_dict()[name]) and tensor.dtype == again.state_dict()[name].dtype
        for name, tensor in model.state_dict().items()
    )
    assert torch.equal(hidden(again), hidden(model))
    with pytest.raises(InvalidArgumentError, match="options"):
        load(tmp_path / "saved", options=options)
    with pytest.raises(InvalidArgumentError):
        model.save(tmp_path / "saved")


def test_only_the_trainable_is_trainable(tmp_path) -> None:
    model = load(pretraining_file(tmp_path / "model.pth", state_of(make())))
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["pos_emb"]
    assert not model.training


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("norm.weight"), "missing"),
        (lambda state: state.update({"surprise.weight": torch.zeros(2)}), "unexpected"),
        (lambda state: state.update({"norm.weight": torch.zeros(17)}), "wrong shape"),
        (lambda state: state["norm.weight"].fill_(torch.nan), "NaN"),
        (lambda state: state.update({"norm.weight": torch.zeros(16, dtype=torch.int64)}), "wrong dtype"),
        (lambda state: state.pop("token_emb.weight"), "token_emb.weight is missing"),
        (
            lambda state: state.update({"performer.net.layers.0.0.fn.to_q.weight": torch.zeros(23, 16)}),
            "to_q has 23 rows",
        ),
        (lambda state: state.pop("performer.net.layers.1.1.fn.fn.w1.weight"), "missing"),
        (lambda state: state.update({"module.norm.weight": torch.zeros(16)}), "two tensors for one name"),
    ],
)
def test_damaged_states(tmp_path, damage: Callable[[State], object], message: str) -> None:
    state = state_of(make())
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        load(pretraining_file(tmp_path / "model.pth", state), family="scbert")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True}, "only False"),
        ({"attn_dropout": 0.1}, "only 0.0"),
        ({"depth": 3}, "the weights say 2"),
        ({"nonsense": 1}, "unknown arguments"),
        ({"class_names": ["A"]}, "no annotation head"),
        ({"num_tokens": 9}, "the weights say 7"),
    ],
)
def test_options_that_contradict(tmp_path, options: dict[str, object], message: str) -> None:
    path = pretraining_file(tmp_path / "model.pth", state_of(make()))
    with pytest.raises(ConfigError, match=message):
        load(path, options=options)


@pytest.mark.parametrize("wrap", [torch_zip, torch_legacy])
@pytest.mark.parametrize("gadget", GADGETS, ids=lambda gadget: str(gadget)[:40])
def test_code_is_never_run(tmp_path, gadget, wrap) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "panglao_pretrain.pth"
    path.write_bytes(wrap(malicious(gadget, canary)))
    for options in ({}, {"family": "scbert"}):
        with pytest.raises(UnsafeCheckpointError):
            load(path, **options)
    assert not canary.exists()


def test_other_files(tmp_path) -> None:
    path = pretraining_file(tmp_path / "model.pth", state_of(make()))
    (tmp_path / "half.pth").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FormatError):
        load(tmp_path / "half.pth", family="scbert")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FormatError, match="dict"):
        load(tmp_path / "list.pth", family="scbert")
    torch.save({"model_state_dict": 3}, tmp_path / "number.pth")
    with pytest.raises(FormatError):
        load(tmp_path / "number.pth", family="scbert")


def test_configurations_that_cannot_be(tmp_path) -> None:
    model = load(pretraining_file(tmp_path / "model.pth", state_of(make())))
    model.save(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "config.json").read_text())
    for field, value in [("num_layers", 0), ("norm", "batch"), ("glu", 1), ("head_dim", 10**9), ("new", 1)]:
        changed = json.loads(json.dumps(content))
        changed["scfm"]["config"][field] = value
        (tmp_path / "saved" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=field):
            load(tmp_path / "saved", genes=None)


def test_names_there_and_back() -> None:
    for variant in ({}, {"reversible": True}, {"norm": "rezero"}):
        model = make(**variant)
        for name in model.state_dict():
            theirs = their_name(name, reversible=model.config.reversible)
            assert our_name(theirs) == our_name(f"module.{theirs}") == name
    assert COUNTER in make().state_dict()
