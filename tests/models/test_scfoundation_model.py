"""A cell has the same bits in any company, the decoder computes what it should, wrong input is named."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import scfm
from models import scfoundation_cells
from models.scfoundation_cells import GENES, NUM_GENES, counts
from scfm.errors import BadCellError, InvalidArgumentError, ResourceError
from scfm.models.scfoundation.pooling import pool_cells

pytestmark = pytest.mark.filterwarnings("ignore::scfm.ScfmWarning")


@pytest.fixture(scope="module")
def model():
    return scfoundation_cells.model(variant="gene")


@pytest.fixture(scope="module")
def packed(model):
    return model.tokenize(counts(14))


def plain_decoder(model, packed, late=None) -> torch.Tensor:
    """The decoder as its formula says, on whole dense rows, in float64."""
    model = scfoundation_cells.model(variant="gene").double().set_compute_dtype(torch.float64)
    size = model.config.vocab_size
    rows = []
    with torch.inference_mode():
        hidden = model.forward(packed).hidden
        for cell in range(packed.num_cells):
            values = torch.zeros(size, dtype=torch.float64)
            if late is not None:
                span = slice(*late.cu_seqlens[cell : cell + 2].tolist())
                values[late.token_ids[span].long()] = late.values[span].double()
            row = model.token_emb(values)
            span = slice(*packed.cu_seqlens[cell : cell + 2].tolist())
            row[packed.token_ids[span].long()] = hidden[span]
            x = model.decoder.embed(row + model.pos_emb.weight[:size])
            x = model.decoder.performer(x, torch.tensor([0, size], dtype=torch.int32))
            x = model.decoder.norm(model.decoder.performer_norm(x))
            rows.append(model.decoder.to_final(x)[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_order_and_budget_change_no_bit(packed, dtype: str) -> None:
    model = scfoundation_cells.model(variant="gene").set_compute_dtype(dtype)
    whole = model.embed(packed)
    order = np.random.default_rng(0).permutation(packed.num_cells)
    np.testing.assert_array_equal(model.embed(packed.select(order)), whole[order])
    for budget in (1, 50, 1000):
        np.testing.assert_array_equal(model.embed(packed, token_budget=budget), whole)
    with torch.inference_mode():
        prediction = model.forward(packed).prediction
        for cell in (0, 6, 13):
            one = packed.select([cell])
            assert torch.equal(model.forward(one).prediction[0], prediction[cell])
            np.testing.assert_array_equal(model.embed(one)[0], whole[cell])
        two = model.forward(packed.select([13, 0])).prediction
    assert torch.equal(two, prediction[[13, 0]])


def test_the_batch_reading_depends_on_the_batch(model, packed) -> None:
    with torch.inference_mode():
        together = model.forward(packed, kmax_scope="batch").prediction
        alone = [model.forward(packed.select([c]), kmax_scope="batch").prediction for c in range(14)]
        cell = model.forward(packed).prediction
    torch.testing.assert_close(torch.cat(alone), cell, rtol=0, atol=2e-6)
    assert (together - cell).abs().max() > 1e-4


def test_the_decoder_equals_its_formula(model, packed) -> None:
    two = packed.select([3, 12])
    with torch.inference_mode():
        found = model.forward(two).prediction
    torch.testing.assert_close(found.double(), plain_decoder(model, two), rtol=0, atol=2e-5)


def test_genes_that_enter_late(model, packed) -> None:
    two = packed.select([3, 12])
    free = [sorted(set(range(NUM_GENES)) - set(tokens))[:7] for tokens in two.to_lists()]
    mask = model.config.mask_value
    late = scfm.PackedCells.from_lists(free, [[mask, 0.0, 1.5, mask, 3.0, 0.0, mask]] * 2)
    with torch.inference_mode():
        found = model.forward(two, late=late).prediction
        nothing = scfm.PackedCells.from_lists([[], []], [[], []])
        assert torch.equal(model.forward(two, late=nothing).prediction, model.forward(two).prediction)
    want = plain_decoder(model, two, late)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=2e-5)
    assert (want - plain_decoder(model, two)).abs().max() > 1e-3


def test_mask_and_padding_values_have_rows_of_their_own(model) -> None:
    values = torch.tensor([model.config.mask_value, 1.0, model.config.pad_value, 0.0])
    with torch.inference_mode():
        rows = model.token_emb(values)
        assert torch.equal(rows[0], model.token_emb.emb_mask.weight[0])
        assert torch.equal(rows[2], model.token_emb.emb_pad.weight[0])
        assert torch.equal(rows[3], model.token_emb.of_zero())


def test_what_is_kept_follows_the_weights(packed) -> None:
    model = scfoundation_cells.model(variant="gene")
    two = packed.select([0, 1])
    with torch.inference_mode():
        before = model.forward(two).prediction
    with torch.no_grad():
        model.token_emb.emb.weight.mul_(1.5)
    fresh = scfoundation_cells.model(variant="gene")
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        after = model.forward(two).prediction
        assert torch.equal(after, fresh.forward(two).prediction) and not torch.equal(after, before)


def test_pooling_by_hand(model, packed) -> None:
    with torch.inference_mode():
        hidden = model.forward(packed).hidden
    for cell, (start, stop) in enumerate(
        zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True)
    ):
        h = hidden[start:stop]
        genes = h[:-2]
        want = torch.cat([h[-1], h[-2], genes.amax(0), genes.mean(0)])
        torch.testing.assert_close(torch.tensor(model.embed(packed)[cell]), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(model.embed(packed, pooling="max")[cell], h.amax(0).numpy())
    short = pool_cells(torch.ones(2, 3), torch.tensor([0, 0, 2], dtype=torch.int32), "all")
    assert short.shape == (2, 12) and short.isnan().all()


def test_layers_and_widths(model, packed) -> None:
    assert model.embed(packed).shape == (14, 128) and model.embed(packed, pooling="max").shape == (14, 32)
    assert model.embedding_size("all") == 128
    with torch.inference_mode():
        states = model.forward(packed, output_hidden_states=True)
        for layer in (0, -1, -2):
            found = model.hidden_at(packed, layer)
            assert torch.equal(found, states.hidden if layer == 0 else states.hidden_states[layer - 1])
    for wrong in (1, -3, True, "counts"):
        with pytest.raises(InvalidArgumentError, match="layer"):
            model.embed(packed, layer=wrong)
    with pytest.raises(InvalidArgumentError, match="pooling"):
        model.embed(packed, pooling="cls")


def test_gene_embeddings(model) -> None:
    adata = counts(5)
    genes, table = model.gene_embeddings()
    assert genes == GENES and table.shape == (NUM_GENES, 32)
    genes, whole = model.gene_embeddings(adata, per_cell=True)
    assert genes == GENES and whole.shape == (5, NUM_GENES, 24)
    _, mean = model.gene_embeddings(adata)
    np.testing.assert_allclose(mean, whole.mean(0), atol=1e-6)
    with pytest.raises(ResourceError, match="per_cell"):
        model._expect_room(10**9)


def test_another_input_shares_the_weights(model) -> None:
    view = model.with_input(target="a5")
    assert view.tokenizer.options.target == "a5" and model.tokenizer.options.target == "t4"
    assert view.pos_emb.weight is model.pos_emb.weight
    adata = counts(4)
    np.testing.assert_array_equal(view.embed(adata), model.embed(view.tokenizer(adata)))
    assert not np.array_equal(view.embed(adata), model.embed(adata))
    scfm.tl.embed(adata, view)
    assert adata.obsm["X_scfoundation"].shape == (4, 128)
    assert adata.uns["scfm"]["X_scfoundation"]["tokenization"]["target"] == "a5"
    with pytest.raises(InvalidArgumentError, match="other genes"):
        model.tokenizer = scfm.ScfoundationTokenizer(["A", "B"])
    with pytest.raises(InvalidArgumentError, match="target"):
        model.with_input(target="x")


def test_cells_without_a_depth(model) -> None:
    adata = counts(4)
    x = adata.X.toarray()
    x[1], x[2] = 0, 0
    x[2, 5] = 1
    adata.X = x
    with pytest.raises(BadCellError, match="rows 1, 2"):
        model.embed(adata)
    found = model.embed(adata, on_bad_cell="nan")
    assert np.isnan(found).any(axis=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("tokens", "values"),
    [
        ([[0, 5, 5]], [[1.0, 1.0, 1.0]]),
        ([[0, 5, 3]], [[1.0, 1.0, 1.0]]),
        ([[0, 5], [-1, 3]], [[1.0, 1.0], [1.0, 1.0]]),
        ([[0, NUM_GENES + 2]], [[1.0, 1.0]]),
        ([[0, 5], [1, 2]], [[1.0, 1.0], [float("nan"), 1.0]]),
    ],
)
def test_wrong_packs_name_their_cell(model, tokens, values) -> None:
    with pytest.raises(InvalidArgumentError, match=f"cell {len(tokens) - 1} of the pack"):
        model.forward(scfm.PackedCells.from_lists(tokens, values))


def test_other_wrong_input(model, packed) -> None:
    with pytest.raises(InvalidArgumentError, match="no values"):
        model.forward(scfm.PackedCells.from_lists([[0, 1]]))
    two = packed.select([0, 1])
    for late, message in [
        (scfm.PackedCells.from_lists([[0]], [[1.0]]), "1 cells beside 2"),
        (scfm.PackedCells.from_lists([[], [int(two.to_lists()[1][0])]], [[], [1.0]]), "stands in packed too"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            model.forward(two, late=late)
    with pytest.raises(InvalidArgumentError, match="kmax_scope"):
        _ = model.forward(two, kmax_scope="world").prediction
    with pytest.raises(AttributeError):
        _ = model.forward(two).logits


def test_empty_packs(model) -> None:
    nothing = scfm.PackedCells.from_lists([], [])
    assert model.embed(nothing).shape == (0, 128)
    with torch.inference_mode():
        assert model.forward(scfm.PackedCells.from_lists([[]], [[]])).hidden.shape == (0, 32)


def test_training_reaches_every_weight(packed) -> None:
    model = scfoundation_cells.model(variant="gene").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward(packed.select([0, 1])).prediction.square().mean().backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {"token_emb.emb_mask.weight", "token_emb.emb_pad.weight"}
    assert int(model.decoder.performer.calls_since_last_redraw) == 2


def test_a_folder_of_shards_is_as_wide_as_the_pooling(model, tmp_path) -> None:
    from scfm.embed.run import embed_to_folder
    from scfm.embed.store import EmbeddingStore

    adata = counts(7)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    summary = embed_to_folder([tmp_path / "cells.h5ad"], model, tmp_path / "out", shard_size=3)
    assert summary.complete and summary.hidden_size == 128
    store = EmbeddingStore(tmp_path / "out")
    np.testing.assert_array_equal(store.read(), model.embed(adata))
