"""A cell's embedding depends on that cell alone; rows come back in the input's order; bad cells follow policy."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import scfm
from scfm.errors import BadCellError, InvalidArgumentError
from scfm.models.batches import token_budget_batches

POOLINGS = ["cls", "mean"]


def random_cells(num_cells: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 94, size=num_cells)
    return [[2, *(generator.permutation(120)[:n] + 4).tolist(), 3] for n in lengths]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layer", [0, -1, -2])
def test_any_batching_gives_the_same_bits(tiny_model, pooling: str, layer: int) -> None:
    cells = random_cells(23)
    whole = tiny_model.embed(scfm.PackedCells.from_lists(cells), pooling=pooling, layer=layer)
    assert whole.dtype == np.float32 and whole.shape == (23, 32) and np.isfinite(whole).all()
    order = np.random.default_rng(1).permutation(23)
    shuffled = scfm.PackedCells.from_lists([cells[i] for i in order])
    for budget in (1, 97, 500, 10**6):
        again = tiny_model.embed(shuffled, pooling=pooling, layer=layer, token_budget=budget)
        np.testing.assert_array_equal(again, whole[order])
    for i in (0, 7):
        alone = tiny_model.embed(scfm.PackedCells.from_lists([cells[i]]), pooling=pooling, layer=layer)
        np.testing.assert_array_equal(alone[0], whole[i])


def test_threads_change_nothing_that_matters(tiny_model) -> None:
    packed = scfm.PackedCells.from_lists(random_cells(12))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = tiny_model.embed(packed)
        torch.set_num_threads(2)
        two = tiny_model.embed(packed)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_pooling_equals_the_plain_definition(tiny_model) -> None:
    packed = scfm.PackedCells.from_lists(random_cells(9))
    with torch.inference_mode():
        states = tiny_model.forward(packed, output_hidden_states=True).hidden_states
    bounds = packed.cu_seqlens.tolist()
    for layer, hidden in ((0, states[-1]), (-1, states[-2]), (-2, states[-3])):
        cls = torch.stack([hidden[a] for a in bounds[:-1]])
        genes = [hidden[a + 1 : b - 1].mean(0) for a, b in itertools.pairwise(bounds)]
        np.testing.assert_allclose(tiny_model.embed(packed, layer=layer, pooling="cls"), cls, atol=1e-5)
        np.testing.assert_allclose(
            tiny_model.embed(packed, layer=layer, pooling="mean"), torch.stack(genes), atol=1e-5
        )


def test_bfloat16_stays_close(tiny_model) -> None:
    packed = scfm.PackedCells.from_lists(random_cells(9))
    exact = tiny_model.embed(packed, pooling="mean")
    close = tiny_model.set_compute_dtype("bfloat16").embed(packed, pooling="mean")
    cosine = (exact * close).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(close, axis=1)
    assert cosine.min() > 0.999
    assert not np.array_equal(exact, close)


def test_adata_rows_keep_their_order_and_zero_cells_work(tiny_model, tiny_adata) -> None:
    X = tiny_model.embed(tiny_adata)
    order = np.random.default_rng(0).permutation(tiny_adata.n_obs)
    np.testing.assert_array_equal(tiny_model.embed(tiny_adata[order]), X[order])
    assert tiny_model.embed(tiny_adata[:0]).shape == (0, 32)


def test_cells_without_known_genes_follow_the_policy(tiny_model, tiny_adata) -> None:
    counts = tiny_adata.X.toarray()
    counts[[3, 17]] = 0
    tiny_adata.X = sp.csr_matrix(counts)
    with pytest.raises(BadCellError, match="3, 17"):
        tiny_model.embed(tiny_adata)
    with_nan = tiny_model.embed(tiny_adata, on_bad_cell="nan")
    assert np.flatnonzero(np.isnan(with_nan).any(1)).tolist() == [3, 17]
    skipped = tiny_model.embed(tiny_adata, on_bad_cell="skip")
    np.testing.assert_array_equal(skipped, np.delete(with_nan, [3, 17], axis=0))


@pytest.mark.parametrize("count", [np.nan, np.inf, -1.0])
def test_impossible_counts_follow_the_policy(tiny_model, tiny_adata, count: float) -> None:
    good = tiny_model.embed(tiny_adata)
    tiny_adata.X.data[tiny_adata.X.indptr[7]] = count
    with pytest.raises(BadCellError, match="row 7"):
        tiny_model.embed(tiny_adata)
    with pytest.warns(scfm.ScfmWarning, match=r"1 cells hold NaN, infinite or negative counts.*rows 7"):
        with_nan = tiny_model.embed(tiny_adata, on_bad_cell="nan-row")
    assert np.flatnonzero(np.isnan(with_nan).any(1)).tolist() == [7]
    np.testing.assert_array_equal(np.delete(with_nan, 7, 0), np.delete(good, 7, 0))
    with pytest.warns(scfm.ScfmWarning):
        assert len(tiny_model.embed(tiny_adata, on_bad_cell="skip")) == len(good) - 1


def test_a_bad_cell_stops_the_run_at_once(tiny_model, tiny_adata) -> None:
    tiny_adata.X = sp.csr_matrix(np.vstack([np.zeros((1, 120)), tiny_adata.X.toarray()[1:]]))
    seen: list[int] = []
    with pytest.raises(BadCellError, match="rows 0"):
        tiny_model.embed(tiny_adata, progress=lambda done, *_: seen.append(done))
    assert not seen


@pytest.mark.parametrize("pooling", POOLINGS)
def test_packs_with_empty_cells(tiny_model, pooling: str) -> None:
    cells = [[], [2, 9, 8, 3], [], [2, 7, 3], []]
    whole = tiny_model.embed(scfm.PackedCells.from_lists(cells), pooling=pooling, on_bad_cell="nan")
    good = tiny_model.embed(scfm.PackedCells.from_lists([cells[1], cells[3]]), pooling=pooling)
    np.testing.assert_array_equal(whole[[1, 3]], good)
    assert np.isnan(whole[[0, 2, 4]]).all()
    with pytest.raises(BadCellError, match="0, 2, 4"):
        tiny_model.embed(scfm.PackedCells.from_lists(cells), pooling=pooling)


def test_bfloat16_copies_follow_the_weights(tiny_model) -> None:
    packed = scfm.PackedCells.from_lists(random_cells(3))
    tiny_model.set_compute_dtype("bfloat16")
    before = tiny_model.embed(packed)
    state = {name: tensor * 1.5 for name, tensor in tiny_model.state_dict().items()}
    tiny_model.load_state_dict(state, assign=True)
    assert not np.array_equal(tiny_model.embed(packed), before)


def test_the_float32_setting_is_left_as_found(tiny_model) -> None:
    packed = scfm.PackedCells.from_lists(random_cells(30))
    with ThreadPoolExecutor(4) as pool:
        one, *others = pool.map(lambda _: tiny_model.embed(packed, token_budget=100), range(8))
    assert torch.get_float32_matmul_precision() == "highest"
    for other in others:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "options",
    [{"layer": 1}, {"layer": -3}, {"pooling": "max"}, {"on_bad_cell": "maybe"}, {"token_budget": 0}],
    ids=str,
)
def test_wrong_options_are_named(tiny_model, tiny_adata, options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        tiny_model.embed(tiny_adata, **options)


def test_tokens_of_another_model_are_refused(tiny_model) -> None:
    with pytest.raises(InvalidArgumentError, match="vocabulary"):
        tiny_model.embed(scfm.PackedCells.from_lists([[2, 5000, 3]]))
    with pytest.raises(InvalidArgumentError, match="cell 1"):
        tiny_model.embed(scfm.PackedCells.from_lists([[2, 5, 3], [5] * 97]))


def test_progress_counts_every_cell(tiny_model, tiny_adata) -> None:
    seen: list[tuple[int, int, int]] = []
    tiny_model.embed(tiny_adata, token_budget=300, progress=lambda *state: seen.append(state))
    assert seen[-1][0] == seen[-1][1] == tiny_adata.n_obs
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)


@pytest.mark.parametrize("budget", [1, 10, 64, 10_000])
def test_batches_hold_every_cell_once_within_the_budget(budget: int) -> None:
    lengths = torch.tensor([5, 64, 1, 63, 9, 0, 64, 2], dtype=torch.int32)
    batches = token_budget_batches(lengths, budget)
    assert sorted(torch.cat(batches).tolist()) == list(range(8))
    for chosen in batches:
        assert int(lengths[chosen].sum()) <= budget or len(chosen) == 1
    assert token_budget_batches(lengths[:0], budget) == []


def test_gene_embeddings_do_not_depend_on_batches(tiny_model, tiny_adata) -> None:
    names, one = tiny_model.gene_embeddings(tiny_adata, token_budget=100)
    same, other = tiny_model.gene_embeddings(tiny_adata)
    assert names == same and not any(name.startswith("<") for name in names)
    np.testing.assert_allclose(one, other, atol=1e-6)
    table_names, table = tiny_model.gene_embeddings()
    assert len(table_names) == 120
    token = tiny_model.vocab.token[table_names[5]]
    np.testing.assert_array_equal(table[5], tiny_model.gene_table[token].detach().numpy())
