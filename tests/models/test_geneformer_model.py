"""Forward, embeddings, gene and state embeddings, loss and gradients equal the authors' on random weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import scfm
from scfm.models.geneformer.names import to_authors
from scfm.train.objectives import MaskedCells, masked_gene_loss

pytestmark = pytest.mark.golden
HIDDEN, LOGITS = 2e-5, 1e-4
MODELS = [("v1", "hf_safetensors"), ("v1", "hf_bin"), ("v2", "hf_safetensors")]


def load(goldens, version: str, layout: str = "hf_safetensors"):
    folder = goldens(f"geneformer/model/{version}")
    return scfm.load(
        folder / layout, dictionaries=folder.parent / f"token_dictionary_{version}.json", dtype="float32"
    )


def cells(folder: Path) -> scfm.PackedCells:
    stored = np.load(folder / "cells.npz")
    bounds = stored["offsets"]
    return scfm.PackedCells.from_lists(
        [stored["input_ids"][a:b].tolist() for a, b in itertools.pairwise(bounds)]
    )


def batch(tensors: dict[str, torch.Tensor]) -> tuple[scfm.PackedCells, torch.Tensor]:
    """The golden's padded batch as a pack, and the flat positions of its real tokens."""
    mask = tensors["attention_mask"].bool()
    rows = [row[keep].tolist() for row, keep in zip(tensors["input_ids"], mask, strict=True)]
    return scfm.PackedCells.from_lists(rows), mask


@pytest.mark.parametrize(("version", "layout"), MODELS)
def test_forward(goldens, version: str, layout: str) -> None:
    model = load(goldens, version, layout)
    want = load_file(goldens(f"geneformer/model/{version}") / "forward.safetensors")
    packed, mask = batch(want)
    with torch.inference_mode():
        out = model.forward(packed, output_hidden_states=True)
    torch.testing.assert_close(out.hidden, want["last_hidden_all"][mask], atol=HIDDEN, rtol=0)
    first_four = int(packed.cu_seqlens[4])
    assert len(out.hidden_states) == model.config.num_layers + 1
    for i, hidden in enumerate(out.hidden_states):
        torch.testing.assert_close(
            hidden[:first_four], want[f"hidden_states.{i}"][mask[:4]], atol=HIDDEN, rtol=0
        )
    first_two = int(packed.cu_seqlens[2])
    torch.testing.assert_close(out.logits[:first_two], want["logits_first2"][mask[:2]], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_attention(goldens, version: str) -> None:
    model = load(goldens, version)
    want = load_file(goldens(f"geneformer/model/{version}") / "forward.safetensors")
    packed, mask = batch(want)
    length = int(mask[0].sum())
    first = model.attentions(packed.select([0]))[0]
    torch.testing.assert_close(
        first, want["attention_last_first1"][0, :, :length, :length], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_cell_embeddings_in_the_inputs_order(goldens, version: str, layer: int, pooling: str) -> None:
    folder = goldens(f"geneformer/model/{version}")
    stored = np.load(folder / "embeddings.npz")
    key = f"{'cls' if pooling == 'cls' else 'cell'}.{layer}"
    model = load(goldens, version)
    if key not in stored:
        with pytest.raises(scfm.ScfmError, match="<cls>"):
            model.embed(cells(folder), layer=layer, pooling=pooling)
        return
    ours = model.embed(cells(folder), layer=layer, pooling=pooling)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[stored["row_order"]], stored[key], atol=HIDDEN, rtol=0)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_defaults_are_the_authors(goldens, version: str) -> None:
    folder = goldens(f"geneformer/model/{version}")
    stored = np.load(folder / "embeddings.npz")
    default = "cell.-1" if version == "v1" else "cls.-1"
    ours = load(goldens, version).embed(cells(folder))
    np.testing.assert_allclose(ours[stored["row_order"]], stored[default], atol=HIDDEN, rtol=0)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("layer", [0, -1])
def test_gene_embeddings_over_cells(goldens, version: str, layer: int) -> None:
    folder = goldens(f"geneformer/model/{version}")
    stored = np.load(folder / "embeddings.npz")
    names, ours = load(goldens, version).gene_embeddings(
        cells(folder), layer=layer, specials=True, token_budget=200
    )
    want = dict(zip(stored[f"gene.{layer}.index"].tolist(), stored[f"gene.{layer}"], strict=True))
    assert set(names) == set(want)
    np.testing.assert_allclose(ours, np.stack([want[name] for name in names]), atol=HIDDEN, rtol=0)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_state_embeddings(goldens, version: str, statistic: str) -> None:
    """The fixture's states were taken at the last layer, with each version's default pooling."""
    folder = goldens(f"geneformer/model/{version}")
    stored = np.load(folder / "embeddings.npz")
    states = np.load(folder / "cells.npz")["disease"]
    adata = ad.AnnData(obs={"disease": states})
    adata.obsm["X_geneformer"] = load(goldens, version).embed(cells(folder), layer=0)
    ours = scfm.tl.state_embeddings(adata, "disease", statistic=statistic)
    assert set(ours) == set(states)
    for state, vector in ours.items():
        np.testing.assert_allclose(vector, stored[f"state.exact_{statistic}.{state}"], atol=HIDDEN, rtol=0)


@pytest.mark.parametrize(("version", "layout"), MODELS)
def test_masked_gene_loss_and_every_gradient(goldens, version: str, layout: str) -> None:
    model = load(goldens, version, layout)
    want = load_file(goldens(f"geneformer/model/{version}") / "mlm_grad.safetensors")
    packed, mask = batch(want)
    labels = want["labels"][mask]
    positions = (labels != -100).nonzero().flatten()
    loss = masked_gene_loss(model, MaskedCells(packed, positions, labels[positions])) / len(positions)
    loss.backward()
    assert loss.item() == pytest.approx(float(want["loss"]), rel=1e-5)
    ours = to_authors({name: p.grad for name, p in model.named_parameters()})
    golden = {k.removeprefix("grad."): g for k, g in want.items() if k.startswith("grad.")}
    assert set(ours) == set(golden)
    for name, gradient in golden.items():
        # A key bias shifts all scores of a query alike: its gradient is zero but for rounding, hence the floor.
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_the_head_multiplies_as_the_layers_do(tiny_model) -> None:
    """In bfloat16 as near to float32 as inputs of 8 bits allow; losses and the table's gradient are float32."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, tiny_model.config.hidden_size, generator=generator)
    targets = torch.randint(0, tiny_model.config.vocab_size, (50,), generator=generator)
    found = {}
    for dtype in ("bfloat16", "float32"):
        tiny_model.set_compute_dtype(dtype).zero_grad(set_to_none=True)
        losses = tiny_model.masked_gene_losses(hidden, targets)
        losses.sum().backward()
        assert losses.dtype == tiny_model.gene_table.grad.dtype == torch.float32
        found[dtype] = losses.detach(), tiny_model.gene_table.grad.clone()
    tiny_model.zero_grad(set_to_none=True)
    for rounded, exact in zip(found["bfloat16"], found["float32"], strict=True):
        assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.02
