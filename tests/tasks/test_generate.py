"""Generation: one iteration is one pass, more go by confidence, cells never meet, and wrong genes are named."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scfm
from scfm.data.packed import PackedCells
from scfm.errors import BadCellError, GeneMappingError, InvalidArgumentError, ScfmWarning
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from scfm.tasks.confidence_order import resolve_confidence
from scfm.tokenize.scgpt_vocab import ScgptVocab

GENES = [f"GENE{i}" for i in range(60)]
ASKED = [f"GENE{i}" for i in (41, 3, 17, 58, 22, 9, 30)]


def scgpt_of(**changes) -> Scgpt:
    vocab = ScgptVocab.from_dict({gene: i for i, gene in enumerate(GENES)})
    shape = {
        "vocab_size": 63,
        "hidden_size": 16,
        "num_heads": 2,
        "ffn_size": 32,
        "num_layers": 2,
        "dropout": 0.0,
    }
    heads = {"has_flags": True, "mvc_style": "inner product"}
    model = Scgpt.from_config(ScgptConfig(**{**shape, **heads, **changes}), vocab, seed=5)
    with torch.no_grad():  # predictions that spread over the bins
        last = model.decoder.fc[4]
        last.weight.mul_(60)
        last.bias.fill_(20.0)
    return model


@pytest.fixture
def model() -> Scgpt:
    return scgpt_of()


def some_cells(num_cells: int = 6) -> ad.AnnData:
    draw = np.random.default_rng(2)
    counts = draw.poisson(1.0, size=(num_cells, len(GENES))).astype(np.float32)
    obs = pd.DataFrame(
        {"kind": ["a", "b", "c", "d", "e", "f"][:num_cells]}, index=[f"cell{i}" for i in range(num_cells)]
    )
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))


def one_pass(model: Scgpt, packed: PackedCells, asked: list[str], cells: torch.Tensor | None = None):
    """The generative forward over <cls>, the known genes, then the asked ones: (C, asked) each."""
    ids = [model.vocab.token[gene] for gene in asked]
    tokens, values, num_known = [], [], []
    for cell in range(packed.num_cells):
        here = slice(int(packed.cu_seqlens[cell]), int(packed.cu_seqlens[cell + 1]))
        pairs = zip(packed.token_ids[here].tolist(), packed.values[here].tolist(), strict=True)
        known = [(token, value) for token, value in pairs if token not in ids]
        tokens.append([token for token, _ in known] + ids)
        values.append([value for _, value in known] + [0.0] * len(ids))
        num_known.append(len(known))
    with torch.no_grad():
        out = model.forward(
            PackedCells.from_lists(tokens, values), num_known=torch.tensor(num_known), first_states=cells
        )
    unknown = torch.cat([torch.arange(len(t)) >= n for t, n in zip(tokens, num_known, strict=True)])
    shape = (packed.num_cells, len(ids))
    return tuple(x[unknown].reshape(shape).numpy() for x in (out.expression, out.mvc))


def test_one_iteration_is_one_pass_of_the_model(model) -> None:
    adata = some_cells()
    found = scfm.tl.generate(model, adata, genes=ASKED)
    expression, _ = one_pass(model, model.tokenize(adata), ASKED)
    np.testing.assert_array_equal(found.X, expression)
    mean = np.clip(expression, 0, 50)
    np.testing.assert_array_equal(found.layers["confidence"], -(50 - mean) * mean)
    np.testing.assert_array_equal(found.layers["values"], np.clip(np.rint(expression), 0, 50))
    assert (found.layers["iteration"] == 1).all()
    assert list(found.var_names) == ASKED and list(found.obs_names) == list(adata.obs_names)
    assert list(found.obs["kind"]) == list(adata.obs["kind"])
    facts = found.uns["scfm"]["generate"]
    assert (facts["confidence"], facts["num_iterations"], facts["family"]) == ("bounded", 1, "scgpt")


def test_each_iteration_takes_its_share_by_confidence(model) -> None:
    """Written out as the paper says it: predict all, keep the most confident, go on with these as known."""
    packed = model.tokenize(some_cells(4))
    found = scfm.tl.generate(model, packed, genes=ASKED, num_iterations=3, confidence="agreement")
    assert [(found.layers["iteration"] == i).sum(1).tolist() for i in (1, 2, 3)] == [
        [2] * 4,
        [2] * 4,
        [3] * 4,
    ]
    cls_id, ids = model.vocab.cls_id, model.vocab.token
    for cell in range(4):
        alone = packed.select([cell])
        known = [
            (int(token), float(value))
            for token, value in zip(alone.token_ids, alone.values, strict=True)
            if int(token) not in [ids[gene] for gene in ASKED]
        ]
        assert known[0][0] == cls_id
        left = list(ASKED)
        for number, count in enumerate((2, 2, 3), start=1):
            here = PackedCells.from_lists([[t for t, _ in known]], [[v for _, v in known]])
            expression, mvc = one_pass(model, here, left)
            order = np.argsort(np.abs(expression - mvc)[0], kind="stable")[:count]
            taken = []
            for gene in sorted((left[i] for i in order), key=ASKED.index):
                column = ASKED.index(gene)
                value = expression[0, left.index(gene)]
                assert found.layers["iteration"][cell, column] == number
                assert found.X[cell, column] == value
                taken.append((ids[gene], float(np.clip(np.rint(value), 0, 50))))
            known += taken
            left = [gene for gene in left if ids[gene] not in [token for token, _ in taken]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"explicit_zeros": True}, {"input_style": "log1p"}])
def test_a_cell_depends_on_itself_alone(changes, dtype: str) -> None:
    model = scgpt_of(**changes).set_compute_dtype(dtype)
    packed = model.tokenize(some_cells())
    together = scfm.tl.generate(model, packed, genes=ASKED, num_iterations=4)
    one_by_one = scfm.tl.generate(model, packed, genes=ASKED, num_iterations=4, token_budget=1)
    turned = scfm.tl.generate(model, packed.select([5, 3, 1]), genes=ASKED, num_iterations=4)
    for layer in [None, *together.layers]:
        get = lambda adata, layer=layer: adata.X if layer is None else adata.layers[layer]  # noqa: E731
        np.testing.assert_array_equal(get(together), get(one_by_one))
        np.testing.assert_array_equal(get(together)[[5, 3, 1]], get(turned))


def test_cells_that_express_nothing(model) -> None:
    adata = some_cells()
    adata.X[2] = 0
    with pytest.raises(BadCellError, match="rows 2"):
        scfm.tl.generate(model, adata, genes=ASKED)
    with pytest.raises(BadCellError, match=r"6 cells .* rows 0, 1, 2, 3, 4 \.\.\."):
        scfm.tl.generate(model, adata, genes=GENES)
    cells = torch.arange(6 * 16).reshape(6, 16).float()
    found = scfm.tl.generate(model, adata, genes=ASKED, cell_embedding=cells)
    alone = scfm.tl.generate(model, genes=ASKED, cell_embedding=cells[2])
    np.testing.assert_array_equal(found.X[2], alone.X[0])
    assert list(found.obs_names) == list(adata.obs_names)


def test_more_iterations_than_genes(model) -> None:
    adata = some_cells()
    many = scfm.tl.generate(model, adata, genes=ASKED, num_iterations=1000)
    same = scfm.tl.generate(model, adata, genes=ASKED, num_iterations=len(ASKED))
    np.testing.assert_array_equal(many.X, same.X)
    assert np.array_equal(np.sort(many.layers["iteration"], axis=1), np.tile(np.arange(1, 8), (6, 1)))
    assert np.isfinite(many.X).all()
    one_gene = scfm.tl.generate(model, adata, genes=ASKED[:1], num_iterations=3)
    np.testing.assert_array_equal(one_gene.X, scfm.tl.generate(model, adata, genes=ASKED[:1]).X)


def test_from_a_cell_embedding_alone(model) -> None:
    packed = model.tokenize(some_cells(3))
    with torch.no_grad():
        cells = model.forward(packed).cell_embeddings
    found = scfm.tl.generate(model, genes=ASKED, cell_embedding=cells)
    nothing = PackedCells.from_lists([[model.vocab.cls_id]] * 3, [[model.config.pad_value]] * 3)
    expression, _ = one_pass(model, nothing, ASKED, cells)
    np.testing.assert_array_equal(found.X, expression)
    assert not np.array_equal(found.X[0], found.X[1])
    one = scfm.tl.generate(model, genes=ASKED, cell_embedding=cells[0].numpy())
    np.testing.assert_array_equal(one.X, found.X[:1])
    both = scfm.tl.generate(model, packed, genes=ASKED, cell_embedding=cells)
    np.testing.assert_array_equal(both.X, one_pass(model, packed, ASKED, cells)[0])
    with pytest.warns(ScfmWarning, match="one long"):
        scfm.tl.generate(model, genes=ASKED, cell_embedding=model.embed(packed))


def test_from_genes_named_one_by_one(model) -> None:
    known = {"GENE1": 12, "GENE5": 50}
    found = scfm.tl.generate(model, known, genes=ASKED)
    packed = PackedCells.from_lists([[model.vocab.cls_id, 1, 5]], [[model.config.pad_value, 12, 50]])
    np.testing.assert_array_equal(found.X, one_pass(model, packed, ASKED)[0])
    assert found.shape == (1, len(ASKED))


def test_explicit_zeros_say_how_sure_they_are() -> None:
    model = scgpt_of(explicit_zeros=True)
    found = scfm.tl.generate(model, some_cells(), genes=ASKED, num_iterations=2)
    probability = found.layers["expressed"]
    np.testing.assert_array_equal(found.layers["confidence"], np.maximum(probability, 1 - probability))
    assert (found.layers["values"][probability < 0.5] == 0).all()
    first = found.layers["iteration"] == 1
    assert (np.where(first, found.layers["confidence"], 0).max(1) >= 0.5).all()


def test_kinds_of_confidence(model) -> None:
    adata = some_cells()
    kept = scfm.tl.generate(model, adata, genes=ASKED, confidence="none", num_iterations=7)
    np.testing.assert_array_equal(kept.layers["iteration"], np.tile(np.arange(1, 8), (6, 1)))
    expression, mvc = one_pass(model, model.tokenize(adata), ASKED)
    agreed = scfm.tl.generate(model, adata, genes=ASKED, confidence="agreement")
    np.testing.assert_array_equal(agreed.layers["confidence"], -np.abs(expression - mvc))
    defaults = [
        ({}, "bounded"),
        ({"explicit_zeros": True}, "zeros"),
        ({"input_style": "log1p"}, "agreement"),
        ({"input_style": "log1p", "mvc_style": None}, "none"),
    ]
    for changes, kind in defaults:
        assert resolve_confidence(scgpt_of(**changes).config, "auto") == kind
    with pytest.raises(InvalidArgumentError, match=r"zeros.*bounded.*agreement"):
        scfm.tl.generate(model, adata, genes=ASKED, confidence="zeros")
    with pytest.raises(InvalidArgumentError, match="confidence"):
        scfm.tl.generate(scgpt_of(mvc_style=None), adata, genes=ASKED, confidence="agreement")


def test_the_bound_on_the_variance_holds() -> None:
    """No distribution over the bins with a given mean varies more than "bounded" says."""
    draw = np.random.default_rng(0)
    for weights in draw.dirichlet(np.full(51, 0.05), size=300):
        mean = weights @ np.arange(51)
        assert weights @ (np.arange(51) - mean) ** 2 <= (50 - mean) * mean + 1e-9


def test_batch_labels_go_with_their_cells() -> None:
    model = scgpt_of(num_batch_labels=2, use_batch_labels=True)
    packed, labels = model.tokenize(some_cells()), np.array([0, 1, 1, 0, 1, 0])
    found = scfm.tl.generate(model, packed, genes=ASKED, num_iterations=2, batch_labels=labels)
    alone = scfm.tl.generate(model, packed.select([4]), genes=ASKED, num_iterations=2, batch_labels=[1])
    np.testing.assert_array_equal(found.X[4:5], alone.X)
    other = scfm.tl.generate(model, packed.select([4]), genes=ASKED, num_iterations=2, batch_labels=[0])
    assert not np.array_equal(other.X, alone.X)
    for wrong in (labels[1:], labels + 0.5, labels + 1):
        with pytest.raises(InvalidArgumentError, match="batch_labels"):
            scfm.tl.generate(model, packed, genes=ASKED, batch_labels=wrong)


def test_models_of_continuous_values_get_them_back() -> None:
    model = scgpt_of(input_style="log1p")
    found = scfm.tl.generate(model, some_cells(), genes=ASKED, num_iterations=2)
    np.testing.assert_array_equal(found.layers["values"], np.maximum(found.X, 0))


def test_the_table_survives_the_disk(model, tmp_path) -> None:
    found = scfm.tl.generate(model, some_cells(), genes=ASKED, num_iterations=2)
    found.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(again.X, found.X)
    assert again.uns["scfm"]["generate"]["num_iterations"] == 2


def test_what_is_wrong_is_named(model, tiny_model) -> None:
    adata = some_cells()
    with pytest.raises(GeneMappingError, match=r"'GENE99', 'x'.*Did you mean"):
        scfm.tl.generate(model, adata, genes=["GENE1", "GENE99", "x"])
    with pytest.raises(GeneMappingError, match=r"known: .*'nogene'"):
        scfm.tl.generate(model, {"nogene": 3.0, "GENE1": 2.0}, genes=ASKED)
    with pytest.raises(GeneMappingError, match="<cls>"):
        scfm.tl.generate(model, adata, genes=["<cls>"])
    cases = [
        ("GENE3", {"known": {"GENE3": 1.0}, "genes": ASKED}),
        ("more than once", {"known": adata, "genes": ["GENE1", "GENE1"]}),
        ("genes", {"known": adata, "genes": []}),
        ("list of genes", {"known": adata, "genes": "GENE1"}),
        ("num_iterations", {"known": adata, "genes": ASKED, "num_iterations": 0}),
        ("nothing to generate from", {"genes": ASKED}),
        ("cell_embedding", {"genes": ASKED, "cell_embedding": np.zeros((2, 5))}),
        ("2 for 6 cells", {"known": adata, "genes": ASKED, "cell_embedding": np.ones((2, 16))}),
        ("begin with <cls>", {"known": PackedCells.from_lists([[1]], [[2.0]]), "genes": ASKED}),
        ("no values", {"known": PackedCells.from_lists([[61]]), "genes": ASKED}),
    ]
    for message, arguments in cases:
        with pytest.raises(InvalidArgumentError, match=message):
            scfm.tl.generate(model, **arguments)
    with pytest.raises(InvalidArgumentError, match="flag_encoder"):
        scfm.tl.generate(Scgpt.from_config(ScgptConfig(63, 16, 2, 16, 1), model.vocab), adata, genes=ASKED)
    with pytest.raises(InvalidArgumentError, match="geneformer"):
        scfm.tl.generate(tiny_model, adata, genes=ASKED)


@pytest.mark.golden
@pytest.mark.parametrize("cells", ["pad", "nopad"])
def test_one_iteration_gives_the_authors_numbers(goldens, cells: str) -> None:
    """Generation of one pass from the goldens' perceived genes, whose targets differ from cell to cell."""
    stored = np.load(goldens("scgpt") / "M_generative.npz", allow_pickle=False)
    model = scfm.load(goldens("scgpt") / "ckpt_released_flash_keys", dtype="float32")
    names, pad_id = model.token_names(), model.vocab.pad_id
    for row in range(5):
        known, values = stored[f"{cells}.pcpt_gene"][row], stored[f"{cells}.pcpt_expr"][row]
        asked = stored[f"{cells}.gen_gene"][row]
        want = stored[f"{cells}.gen_preds"][row][asked != pad_id]
        known, values, asked = known[known != pad_id], values[known != pad_id], asked[asked != pad_id]
        packed = PackedCells.from_lists([known.tolist()], [values.tolist()])
        if np.isin(known, asked).any():
            continue  # asked genes would be hidden from the known ones
        found = scfm.tl.generate(model, packed, genes=[names[token] for token in asked.tolist()])
        np.testing.assert_allclose(found.X[0], want, rtol=1e-4, atol=2e-5)
