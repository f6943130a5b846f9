"""What scGPT computes for a cell depends on that cell alone; wrong input is named; what is kept follows the weights."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

import scfm
from models import scgpt_cells
from models.scgpt_cells import CLS, NUM_GENES, PAD, PARTS, beside, cells
from scfm.errors import ConfigError, InvalidArgumentError
from scfm.models.scgpt.perturbation import perturbation_flags, predict_perturbation
from scfm.models.scgpt.spatial import impute_from_neighbors, nearest_neighbors

OF_TOKENS = ("hidden", "expression", "zero_probabilities", "mvc", "mvc_zero_probabilities")
OF_CELLS = ("cell_embeddings", "cls", "batch_logits")


def everything(model, packed, **options) -> dict[str, torch.Tensor]:
    """Every head that the model has, of every token or cell."""
    with torch.inference_mode():
        out = model.forward(packed, **{**beside(model, packed), **options})
        found = {}
        for name in (*OF_TOKENS, *OF_CELLS):
            try:
                found[name] = getattr(out, name)
            except InvalidArgumentError as error:
                assert "this model has no" in str(error), name
    return found


def cell_values(model) -> float:
    return model.config.pad_value


@pytest.mark.parametrize("name", PARTS)
def test_any_company_gives_a_cell_the_same_bits(name: str) -> None:
    model = scgpt_cells.model(name)
    packed = cells(17, cls_value=cell_values(model))
    whole = everything(model, packed)
    assert len(whole) >= 3 and all(x.isfinite().all() for x in whole.values())
    bounds = packed.cu_seqlens.tolist()
    order = np.random.default_rng(1).permutation(17)
    for chosen in (order[:5], order[5:], order[:1], [0]):
        part = packed.select(chosen)
        places = np.concatenate([np.arange(bounds[c], bounds[c + 1]) for c in chosen])
        for head, found in everything(model, part).items():
            want = whole[head][torch.as_tensor(places if head in OF_TOKENS else np.asarray(chosen))]
            assert torch.equal(found, want), head


@pytest.mark.parametrize("pooling", ["cls", "mean", "avg-pool", "w-pool"])
@pytest.mark.parametrize("layer", [0, -1, -2])
def test_any_batching_gives_an_embedding_the_same_bits(pooling: str, layer: int) -> None:
    model = scgpt_cells.model()
    packed = cells(23)
    whole = model.embed(packed, pooling=pooling, layer=layer, on_bad_cell="nan")
    good = slice(1, None) if pooling == "mean" else slice(None)  # the first cell has no gene to average
    np.testing.assert_allclose(np.linalg.norm(whole[good], axis=1), 1, rtol=1e-6)
    order = np.random.default_rng(1).permutation(23)
    for budget in (1, 97, 10**6):
        again = model.embed(
            packed.select(order), pooling=pooling, layer=layer, token_budget=budget, on_bad_cell="nan"
        )
        np.testing.assert_array_equal(again, whole[order])


def test_values_that_are_no_bins_change_nothing_for_their_neighbours() -> None:
    model = scgpt_cells.model()
    packed = cells(6)
    strange = packed.values.clone()
    strange[-3:] = torch.tensor([0.37, 1e4, -5.5])
    mixed = scfm.PackedCells(packed.token_ids, strange, packed.cu_seqlens, packed.cell_ids)
    np.testing.assert_array_equal(model.embed(mixed)[:-1], model.embed(packed)[:-1])
    for values in (packed.values, strange):
        with torch.no_grad():
            table, rows = model.value_encoder.look_up(values)
            torch.testing.assert_close(table[rows], model.value_encoder(values), rtol=0, atol=1e-6)


def test_with_and_without_gradients_it_is_the_same_function() -> None:
    for name in PARTS:
        model = scgpt_cells.model(name)
        packed = cells(7, cls_value=cell_values(model))
        if name == "scaling":  # bins as factors saturate the attention: a last bit becomes the fourth digit
            packed.values.div_(50)
        without = everything(model, packed)
        out = model.forward(packed, **beside(model, packed))
        for head, want in without.items():
            torch.testing.assert_close(
                getattr(out, head).detach(), want, rtol=1e-5, atol=2e-6, msg=f"{name} {head}"
            )
            assert getattr(out, head).requires_grad


def test_the_pooling_is_the_plain_definition() -> None:
    packed = cells(9)
    for style in ("cls", "avg-pool", "w-pool"):
        model = scgpt_cells.model(cell_style=style)
        found = everything(model, packed)
        hidden, values = found["hidden"], packed.values
        for cell, (a, b) in enumerate(itertools.pairwise(packed.cu_seqlens.tolist())):
            weighted = (hidden[a:b] * values[a:b, None]).sum(0)
            want = {"cls": hidden[a], "avg-pool": hidden[a:b].mean(0), "w-pool": weighted / weighted.norm()}
            torch.testing.assert_close(found["cell_embeddings"][cell], want[style], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reading", ["plain", "nested", "flash"])
def test_padding_is_counted_in_the_original_readings_only(reading: str) -> None:
    model = scgpt_cells.model("plain norm")
    packed = cells(5)
    longest = int(packed.lengths.max())
    with torch.inference_mode():
        free = model.forward(packed).cell_embeddings
        short = model.forward(packed, padding=reading).cell_embeddings
        long = model.forward(packed, padding=reading, padded_length=longest + 9).cell_embeddings
    whole = int(packed.lengths.argmax())
    torch.testing.assert_close(short[whole], free[whole], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(long, short, atol=1e-3)
    with pytest.raises(InvalidArgumentError, match="longest cell"):
        model.forward(packed, padding=reading, padded_length=3)


def test_generation_leaves_the_known_tokens_alone() -> None:
    """Unknown genes see the known ones and not each other; the values they came with are not read."""
    for name in ("released", "sum query"):
        model = scgpt_cells.model(name)
        packed = cells(6)
        known = (packed.lengths + 1) // 2
        found = everything(model, packed, num_known=known)["hidden"]
        starts = packed.cu_seqlens[:-1]
        unknown = torch.arange(packed.num_tokens) >= torch.repeat_interleave(
            starts + known, packed.lengths.long()
        )
        values = torch.where(unknown, 33.0, packed.values)
        other = scfm.PackedCells(packed.token_ids, values, packed.cu_seqlens, packed.cell_ids)
        assert torch.equal(everything(model, other, num_known=known)["hidden"], found)
        rows, ids = packed.to_lists(), packed.values.split(packed.lengths.tolist())
        alone = scfm.PackedCells.from_lists(
            [row[:n] for row, n in zip(rows, known.tolist(), strict=True)],
            [v[:n].tolist() for v, n in zip(ids, known.tolist(), strict=True)],
        )
        torch.testing.assert_close(found[~unknown], everything(model, alone)["hidden"], rtol=1e-5, atol=2e-6)
        one_less = scfm.PackedCells.from_lists([r[:-1] for r in rows[1:]], [v[:-1].tolist() for v in ids[1:]])
        fewer = everything(model, one_less, num_known=torch.minimum(known[1:], one_less.lengths))["hidden"]
        still_there = torch.ones(packed.num_tokens, dtype=torch.bool)
        still_there[packed.cu_seqlens[1:].long() - 1] = False
        keep = (known[1:] <= one_less.lengths).repeat_interleave(one_less.lengths.long())
        torch.testing.assert_close(fewer[keep], found[still_there][keep], rtol=1e-5, atol=2e-6)


def test_sampling_follows_the_probabilities_and_the_key() -> None:
    model = scgpt_cells.model("batches")
    packed = cells(40)
    out = model.forward(packed, **beside(model, packed))
    drawn = torch.stack([out.sampled_expression(seed=seed) != 0 for seed in range(300)]).float().mean(0)
    deviation = (out.zero_probabilities * (1 - out.zero_probabilities) / 300).sqrt()
    assert ((drawn - out.zero_probabilities).abs() <= 5 * deviation + 1e-3).all()
    order = [7, 3]
    part = model.forward(packed.select(order), **beside(model, packed.select(order)))
    a, b = packed.cu_seqlens[7:9].tolist()
    kept = out.sampled_expression(seed=3)[a:b] != 0
    assert torch.equal(part.sampled_expression(seed=3)[: b - a] != 0, kept)
    assert part.sampled_mvc(seed=1).shape == part.mvc.shape


def test_no_cells_at_all() -> None:
    nothing = scfm.PackedCells.from_lists([], [])
    for name in PARTS:
        model = scgpt_cells.model(name)
        for rows in everything(model, nothing).values():
            assert len(rows) == 0
        if name != "batches":
            assert model.embed(nothing).shape == (0, 32)


def test_what_is_kept_follows_the_weights() -> None:
    model = scgpt_cells.model().set_compute_dtype("bfloat16")
    packed = cells(4)
    before = model.embed(packed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.encoder.embedding.weight[5:60] += 0.5
    after = model.embed(packed)
    assert not np.array_equal(after, before)
    with torch.no_grad():
        model.value_encoder.linear1.bias += 1
    assert not np.array_equal(model.embed(packed), after)
    np.testing.assert_array_equal(twin.embed(packed), before)
    state = {name: tensor * 1.5 for name, tensor in twin.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    assert not np.array_equal(twin.embed(packed), before)
    loss = model.forward(packed).expression.sum()  # what was kept in inference mode enters no graph
    loss.backward()


def test_frozen_layers_take_part_in_training_after_inference() -> None:
    model = scgpt_cells.model().set_compute_dtype("bfloat16")
    model.embed(cells(3))
    for parameter in model.layers.parameters():
        parameter.requires_grad_(False)
    model.forward(cells(3)).expression.sum().backward()
    assert model.encoder.embedding.weight.grad.any() and model.layers[0].qkv.weight.grad is None


def test_bfloat16_stays_close() -> None:
    model = scgpt_cells.model()
    packed = cells(12)
    exact = model.embed(packed)
    close = model.set_compute_dtype("bfloat16").embed(packed)
    assert (exact * close).sum(1).min() > 0.999 and not np.array_equal(exact, close)


def test_frozen_rows_get_no_gradient() -> None:
    model = scgpt_cells.model("generator")
    packed = scfm.PackedCells.from_lists([[PAD, 3, 4, 5]], [[1.0, 2.0, 0.5, 0.0]])
    model.forward(packed, pert_flags=[0, 1, 0, 1]).expression.sum().backward()
    assert not model.encoder.embedding.weight.grad[PAD].any() and model.encoder.embedding.weight.grad[3].any()
    assert not model.pert_encoder.weight.grad[0].any() and model.pert_encoder.weight.grad[1].any()


def test_training_drops_and_evaluation_does_not() -> None:
    model = scgpt_cells.model()
    packed = cells(4)
    quiet = model.forward(packed).hidden
    torch.manual_seed(0)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            loud = model.train().forward(packed, True, num_known=packed.lengths).hidden_states
        assert not torch.allclose(loud[0], model.eval().forward(packed, True).hidden_states[0], atol=1e-2)
        assert not torch.allclose(loud[-1], quiet, atol=1e-2)
    torch.testing.assert_close(model.eval().forward(packed).hidden, quiet)


def test_generating_from_a_cell_needs_what_the_decoder_needs() -> None:
    packed = cells(2)
    cell = torch.zeros(2, 32)
    with pytest.raises(InvalidArgumentError, match="cell_embeddings"):
        scgpt_cells.model().generate(packed, cell[:1])
    with pytest.raises(InvalidArgumentError, match="values"):
        scgpt_cells.model("generator").generate(packed, cell, use_values=False)
    for name in ("batches", "released"):
        model = scgpt_cells.model(name)
        labels = {"batch_labels": [0, 1]} if name == "batches" else {}
        made = model.generate(packed, cell, **labels)
        assert made.prediction.shape == (packed.num_tokens,)
        assert (made.zero_probability is not None) == model.config.explicit_zeros


def test_batch_statistics_are_of_each_label_alone() -> None:
    model = scgpt_cells.model("batches").train()
    packed = cells(12)
    kept = {i: norm.running_mean.clone() for i, norm in enumerate(model.dsbn.bns)}
    model.forward(packed, batch_labels=[0] * 6 + [2] * 6)
    moved = [not torch.equal(norm.running_mean, kept[i]) for i, norm in enumerate(model.dsbn.bns)]
    assert moved == [True, False, True]


@pytest.mark.parametrize(
    ("name", "rows", "options", "named"),
    [
        ("released", [[CLS, 500]], {}, r"token_ids.*run from 121 to 500.*cell 0"),
        ("released", [[CLS, -1]], {}, "token_ids"),
        ("released", [[CLS, 1], []], {}, "cell 1 has no token"),
        ("released", [[CLS, 1]], {"values": None}, "values"),
        ("released", [[CLS, 1], [CLS, 2]], {"values": [[0, 1], [0, float("nan")]]}, "nan in cell 1"),
        ("category", [[CLS, 1]], {"values": [[51, 2.5]]}, r"2\.5 in cell 0.*category"),
        ("category", [[CLS, 1]], {"values": [[51, 53]]}, "53 in cell 0"),
        (
            "batches",
            [[CLS, 1], [CLS, 2]],
            {"batch_labels": [0, 3]},
            r"batch_labels: 3 in cell 1.*rows 0 to 2",
        ),
        ("batches", [[CLS, 1]], {"batch_labels": [0.5]}, "batch_labels"),
        ("batches", [[CLS, 1]], {"batch_labels": [0, 1]}, "batch_labels"),
        ("batches", [[CLS, 1]], {}, "batch label"),
        ("released", [[CLS, 1]], {"batch_labels": [0]}, "no such input"),
        ("multi-omic", [[CLS, 1]], {"batch_labels": [0], "modalities": [0, 5]}, "modalities: 5 in cell 0"),
        ("generator", [[CLS, 1]], {"pert_flags": [0, 3]}, "pert_flags"),
        ("generator", [[CLS, 1]], {}, "pert_flags"),
        ("released", [[CLS, 1]], {"num_known": [0]}, "num_known"),
        ("released", [[CLS, 1]], {"num_known": [3]}, "num_known"),
        ("category", [[CLS, 1]], {"num_known": [1], "values": [[51, 1]]}, "flag_encoder"),
        ("released", [[CLS, 1]], {"first_states": torch.zeros(2, 32)}, "first_states"),
        ("released", [[CLS, 1]], {"padding": "some"}, "padding"),
        ("released", [[CLS, 1]], {"padding": "plain", "num_known": [1]}, "padding"),
    ],
)
def test_wrong_input_is_named(name: str, rows: list, options: dict, named: str) -> None:
    model = scgpt_cells.model(name)
    values = options.pop("values", [[1.0] * len(row) for row in rows])
    packed = scfm.PackedCells.from_lists(rows, values)
    with pytest.raises(InvalidArgumentError, match=named):
        model.forward(packed, **options).expression  # noqa: B018


def test_heads_that_are_not_there_say_so() -> None:
    out = scgpt_cells.model("category").forward(cells(2, cls_value=51.0))
    for head, named in (("mvc", "mvc_decoder"), ("cls", "cls_decoder"), ("batch_logits", "discriminator")):
        with pytest.raises(InvalidArgumentError, match=named):
            getattr(out, head)
    with pytest.raises(InvalidArgumentError, match="zero"):
        out.zero_probabilities  # noqa: B018
    with pytest.raises(AttributeError, match="expression"):
        out.logits  # noqa: B018


def test_embedding_options_are_named() -> None:
    model = scgpt_cells.model()
    for options in ({"layer": 1}, {"layer": -3}, {"layer": "counts"}, {"pooling": "max"}):
        with pytest.raises(InvalidArgumentError, match=next(iter(options))):
            model.embed(cells(2), **options)


def test_models_with_a_norm_for_each_batch_ask_for_labels() -> None:
    model = scgpt_cells.model("batches")
    packed = cells(9)
    with pytest.raises(InvalidArgumentError, match="batch_labels"):
        model.embed(packed)
    with pytest.raises(InvalidArgumentError, match="batch_labels"):
        model.embed(packed, batch_labels=[0, 1])
    with pytest.raises(InvalidArgumentError, match="3 in cell"):
        model.embed(packed, batch_labels=[3] * 9)
    with pytest.raises(InvalidArgumentError, match=r"cat\.codes"):
        model.embed(packed, batch_labels=["a"] * 9)
    labels = np.arange(9) % 3
    whole = model.embed(packed, batch_labels=labels, token_budget=100)
    assert not np.allclose(whole, model.embed(packed, batch_labels=np.zeros(9, dtype=int)))
    want = everything(model, packed)["cell_embeddings"]
    np.testing.assert_allclose(whole, want / want.norm(dim=1, keepdim=True), atol=1e-6)


def test_perturbations_by_name() -> None:
    genes = scgpt_cells.GENES
    flags = perturbation_flags(["ctrl", "GENE3+ctrl", "GENE3+GENE7"], genes)
    assert flags.sum(1).tolist() == [0, 1, 2] and flags[2].nonzero().flatten().tolist() == [3, 7]
    with pytest.raises(InvalidArgumentError, match=r"'GENE3\+GENE_7' perturbs 'GENE_7'.*GENE7"):
        perturbation_flags(["GENE3+GENE_7"], genes)
    model = scgpt_cells.model("generator")
    expression = np.random.default_rng(0).poisson(0.7, size=(3, NUM_GENES)).astype(np.float32)
    ids = np.arange(NUM_GENES)
    whole = predict_perturbation(model, expression, flags, ids)
    assert whole.shape == expression.shape
    np.testing.assert_array_equal(predict_perturbation(model, expression, flags, ids, token_budget=1), whole)
    sampled = predict_perturbation(model, expression, flags, ids, sample=True)
    assert set(np.unique(np.isclose(sampled, whole) | (sampled == 0))) == {True} and (sampled == 0).any()
    some = predict_perturbation(model, expression[:1], flags[:1], ids, genes="batch-wise")
    assert not some[0, expression[0] == 0].any()
    nothing = predict_perturbation(
        model, np.zeros((1, 4)), np.zeros((1, 4), dtype=int), ids[:4], genes="batch-wise"
    )
    assert not nothing.any()
    for wrong in (
        (expression, flags, ids[:5]),
        (expression, flags.float(), ids),
        (expression[0], flags, ids),
    ):
        with pytest.raises(InvalidArgumentError, match="predict_perturbation"):
            predict_perturbation(model, *wrong)
    with pytest.raises(InvalidArgumentError, match="generator"):
        predict_perturbation(scgpt_cells.model(), expression, flags, ids)


def test_neighbours_are_the_nearest_others() -> None:
    places = np.random.default_rng(0).normal(size=(50, 2))
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(nearest_neighbors(places, 50, 4), np.argsort(distances, axis=1)[:, :4])
    for wrong, count in ((places[:3], 4), (places * np.nan, 4), (places, 50), (places, 0)):
        with pytest.raises(InvalidArgumentError):
            nearest_neighbors(wrong, 50, count)
    model = scgpt_cells.model("spatial")
    packed = cells(6)
    with torch.inference_mode():
        embeddings = model.forward(packed).cell_embeddings
        found = impute_from_neighbors(model, packed, embeddings, places[:6], num_neighbors=2)
    assert found.shape == (packed.num_tokens,)
    with pytest.raises(InvalidArgumentError, match="neighbourhood"):
        impute_from_neighbors(scgpt_cells.model(), packed, embeddings, places[:6])


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"dropout": "much"}, "dropout"),
        ({"num_layers": 10**6}, "num_layers"),
        ({"hidden_size": True}, "hidden_size"),
        ({"explicit_zeros": 1}, "explicit_zeros"),
        ({"cell_style": "max"}, "cell_style"),
        ({"value_style": "category", "num_value_ids": 53, "input_style": "log1p"}, "value_style"),
        ({"value_style": "category"}, "num_value_ids"),
        ({"adversary": True}, "num_batch_labels"),
        ({"num_experts": 1}, "experts_per_token"),
        ({"decoder_activation": "Embedding"}, "decoder_activation"),
        ({"vocab_size": 10_000_000, "hidden_size": 16_384, "num_heads": 1}, "parameters"),
    ],
)
def test_impossible_configurations_are_named(parts: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        scgpt_cells.ScgptConfig(**{"vocab_size": 10, **parts})
