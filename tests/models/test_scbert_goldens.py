"""scBERT equals the authors' code on their own outputs: every file, cells alone and in the authors' batch reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.scbert_goldens import FP32, FP64, GRADIENT, genes_of, in_float64, largest, load, pack, panel
from scfm.models.scbert.annotate import UNASSIGNED, predict_cell_types
from scfm.models.scbert.attention_sums import attention_sums
from scfm.models.scbert.names import their_name
from scfm.train.objectives.scbert import (
    HiddenBins,
    annotation_loss,
    freeze,
    hidden_bin_loss,
)

pytestmark = pytest.mark.golden
VARIANTS = [
    "generalized",
    "no_projection",
    "no_g2v",
    "qkv_bias",
    "tie_embed",
    "glu",
    "scalenorm",
    "rezero",
    "ff_chunks",
    "nb_features",
    "dim_head",
    "reversible",
    "mid",
    "sharp",
]
SCOPES = {"cell": "b1", "batch": "batched"}


@pytest.fixture(scope="module")
def folder(goldens) -> Path:
    return goldens("scbert")


@pytest.fixture(scope="module")
def tiny(folder):
    expected = np.load(folder / "tiny_expected.npz")
    return load(folder / "tiny.pth", genes_of(folder, expected)), expected


@pytest.fixture(scope="module")
def fine_tuned(folder):
    expected = np.load(folder / "realdim_finetune_expected.npz")
    return load(folder / "realdim_finetuned_best.pth", genes_of(folder, expected)), expected


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {
        their_name(name): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def check_gradients(model, expected) -> None:
    found = gradients_of(model)
    full = [key.removeprefix("grad/") for key in expected.files if key.startswith("grad/")]
    norms = [key.removeprefix("gradnorm/") for key in expected.files if key.startswith("gradnorm/")]
    assert set(found) == {*full, *norms}
    for name in full:
        wanted = torch.from_numpy(expected[f"grad/{name}"])
        assert largest(found[name], wanted) <= GRADIENT * float(wanted.abs().max()), name
    for name in norms:
        assert float(found[name].norm()) == pytest.approx(float(expected[f"gradnorm/{name}"]), rel=GRADIENT)


@pytest.mark.parametrize("scope", SCOPES)
def test_tiny(tiny, scope: str) -> None:
    model, expected = tiny
    with torch.inference_mode():
        out = model.forward(pack(expected["tokens"]), kmax_scope=scope)
        assert largest(out.hidden, expected[f"{SCOPES[scope]}/enc"]) <= FP32
        assert largest(out.logits, expected[f"{SCOPES[scope]}/logits"]) <= FP32


def test_scopes_differ(tiny) -> None:
    model, expected = tiny
    with torch.inference_mode():
        found = model.forward(pack(expected["tokens"])).hidden
    assert largest(found, expected["batched/enc"]) > 1e-2


def test_tiny_layer_by_layer(tiny) -> None:
    model, expected = tiny
    with torch.inference_mode():
        states = model.forward(pack(expected["tokens"]), output_hidden_states=True).hidden_states
    assert largest(states[0], expected["b1/emb"]) == 0.0
    for number in range(2):
        branches = torch.from_numpy(
            expected[f"b1/layer{number}.attn_out"] + expected[f"b1/layer{number}.ff_out"]
        )
        found = states[number + 1] - states[number]
        assert largest(found, branches) <= FP32


@pytest.mark.parametrize("scope", SCOPES)
def test_tiny_in_float64(folder, scope: str) -> None:
    expected = np.load(folder / "tiny_expected.npz")
    model = in_float64(load(folder / "tiny.pth", genes_of(folder, expected)))
    with torch.inference_mode():
        out = model.forward(pack(expected["tokens"]), kmax_scope=scope)
    assert largest(out.hidden, expected[f"{SCOPES[scope]}_f64/enc"]) <= FP64
    assert largest(out.logits, expected[f"{SCOPES[scope]}_f64/logits"]) <= FP64


def test_attention_of_one_head(tiny) -> None:
    model, expected = tiny
    block = model.performer.blocks()[0]
    cell = pack(expected["tokens"][1:2])
    with torch.inference_mode():
        states = model.forward(cell, output_hidden_states=True).hidden_states
        offsets = torch.tensor([0, len(states[0])], dtype=torch.int32)
        qkv = block.attention.qkv(block.normed(states[0]))
        out = block.attention.attend(*qkv, offsets)
    assert largest(out[:, :64], expected["favor/out_h0"]) <= FP32


def test_attention_sums(tiny) -> None:
    model, expected = tiny
    tokens = expected["tokens"][: len(expected["attn/attn_sum_per_token"])]
    found = attention_sums(model, pack(tokens))
    wanted = torch.from_numpy(expected["attn/attn_sum_per_token"])
    assert largest(found, wanted) <= 1e-5 * float(wanted.max())
    maps = torch.from_numpy(expected["attn/map_f32_b1"])[:, 0].double().mean(dim=1)
    assert largest(found, maps / maps.sum(dim=1, keepdim=True)) <= 1e-5 * float(wanted.max())


def test_pretraining(folder) -> None:
    expected = np.load(folder / "tiny_pretrain.npz")
    model = load(folder / "tiny.pth", genes_of(folder, np.load(folder / "tiny_expected.npz")))
    labels = torch.from_numpy(expected["labels"]).flatten()
    rows = (labels != model.config.mask_bin).nonzero().flatten()
    cells = HiddenBins(pack(expected["masked_input"]), rows, labels[rows])
    loss = hidden_bin_loss(model, cells, kmax_scope="batch")
    assert float(loss.detach()) == pytest.approx(float(expected["loss"]), rel=1e-5)
    loss.backward()
    check_gradients(model, expected)
    with torch.inference_mode():
        logits = model.forward(cells.packed, kmax_scope="batch").logits
    guesses = logits[:, 1:-1].argmax(dim=1) + 1
    wanted = torch.from_numpy(expected["pred"]).flatten()
    assert torch.equal(guesses[rows], wanted[rows])


def test_fine_tuned(fine_tuned) -> None:
    model, expected = fine_tuned
    with torch.inference_mode():
        out = model.forward(pack(expected["tokens"]))
        assert largest(out.hidden, expected["b1/enc"]) <= FP32
        assert largest(out.cls, expected["logits_b1"]) <= 5e-6
        batched = model.forward(pack(expected["tokens"]), kmax_scope="batch").cls
        assert largest(batched, expected["logits_batched"]) <= 5e-6


def test_fine_tuned_bin_scores(fine_tuned, folder) -> None:
    model, expected = fine_tuned
    head = np.load(folder / "realdim_lm_head.npz")
    with torch.inference_mode():
        hidden = model.forward(pack(expected["tokens"])).hidden
    found = F.linear(hidden, torch.from_numpy(head["weight"]), torch.from_numpy(head["bias"]))
    assert largest(found, expected["b1/lm_logits"]) <= FP32


def test_fine_tuned_in_float64(folder) -> None:
    expected = np.load(folder / "realdim_finetune_expected.npz")
    model = in_float64(load(folder / "realdim_finetuned_best.pth", genes_of(folder, expected)))
    with torch.inference_mode():
        out = model.forward(pack(expected["tokens"]))
    assert largest(out.hidden, expected["b1_f64/enc"]) <= FP64
    assert largest(out.cls, expected["logits_b1_f64"]) <= FP64


def test_predicted_cell_types(fine_tuned) -> None:
    model, expected = fine_tuned
    threshold = float(expected["unassign_thres"])
    found = predict_cell_types(model, pack(expected["tokens"]), unassigned_below=threshold)
    assert largest(found.probabilities, expected["prob"]) <= 5e-6
    wanted = np.where(expected["unassigned"], UNASSIGNED, expected["pred"].astype(str))
    assert found.labels.tolist() == wanted.tolist()
    assert predict_cell_types(model, pack(expected["tokens"])).labels.tolist() == [
        str(number) for number in expected["pred"]
    ]


def test_fine_tuning_loss_and_gradients(folder) -> None:
    expected = np.load(folder / "realdim_finetune_expected.npz")
    model = load(folder / "realdim_finetuned_best.pth", genes_of(folder, expected))
    trained = freeze(model, "authors")
    assert {their_name(name) for name in trained} == set(expected["trainable"].tolist())
    loss = annotation_loss(
        model, pack(expected["tokens"]), torch.from_numpy(expected["labels"]), kmax_scope="batch"
    )
    assert float(loss.detach()) == pytest.approx(float(expected["loss_batched"]), rel=1e-5)
    loss.backward()
    check_gradients(model, expected)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(folder, tmp_path, variant: str, precision: str) -> None:
    expected = np.load(folder / "variants_expected.npz")
    entry = torch.load(folder / "variants.pth", weights_only=True)[variant]
    torch.save(entry["model_state_dict"], tmp_path / "variant.pth")
    genes = [f"GENE{number}" for number in range(expected["tokens"].shape[1] - 1)]
    model = load(tmp_path / "variant.pth", genes, options=entry["kwargs"])
    cells = pack(expected["tokens"])
    with torch.inference_mode():
        if precision == "float64":
            assert largest(in_float64(model).forward(cells).hidden, expected[f"{variant}/enc_f64"]) <= FP64
            return
        out = model.forward(cells)
        assert largest(out.hidden, expected[f"{variant}/enc"]) <= FP32
        assert largest(out.logits, expected[f"{variant}/logits"]) <= FP32
        batched = model.forward(cells, kmax_scope="batch").hidden
        assert largest(batched, expected[f"{variant}/enc_batched"]) <= FP32


class TestFullPanel:
    """16,906 genes and the slot, real cells; layer 0 from the expressed genes."""

    @pytest.fixture(scope="class")
    def full(self, folder):
        return load(folder / "full16907.pth", panel(folder)), np.load(folder / "full16907_expected.npz")

    def test_alone(self, full) -> None:
        model, expected = full
        with torch.inference_mode():
            out = model.forward(pack(expected["tokens"]))
        assert largest(out.hidden, expected["b1/enc"]) <= FP32
        every = out.by_cell[:, ::97]
        assert largest(every, expected["b1_f64/enc_every97"]) <= FP32
        assert largest(model.bin_scores(every.flatten(0, 1)), expected["b1/logits_every97"]) <= FP32
        assert model._zero_genes._kept is not None, "layer 0 was computed in the ordinary way"

    def test_batched(self, full) -> None:
        model, expected = full
        with torch.inference_mode():
            out = model.forward(pack(expected["tokens"]), kmax_scope="batch")
        assert largest(out.by_cell[:, ::97], expected["batched/enc_every97"]) <= FP32

    def test_embeddings(self, full) -> None:
        model, expected = full
        cells = pack(expected["tokens"])
        assert largest(model.embed(cells, pooling="mean"), expected["b1/enc_mean"]) <= FP32
        genes = torch.from_numpy(expected["b1/enc"])[:, :-1].double().mean(dim=1)
        assert largest(model.embed(cells), genes) <= FP32
        assert largest(model.embed(cells, pooling="last"), expected["b1/enc"][:, -1]) <= FP32

    def test_float64(self, folder) -> None:
        expected = np.load(folder / "full16907_expected.npz")
        model = in_float64(load(folder / "full16907.pth", panel(folder)))
        with torch.inference_mode():
            out = model.forward(pack(expected["tokens"]))
        assert largest(out.by_cell[:, ::97], expected["b1_f64/enc_every97"]) <= FP64
        assert largest(out.by_cell.mean(dim=1), expected["b1_f64/enc_mean"]) <= FP64
