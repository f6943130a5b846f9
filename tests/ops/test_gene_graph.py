"""GeneGraph and its plans: built from edges or vectors, and equal to the definition written as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packs import offsets

from scfm.errors import InvalidArgumentError
from scfm.ops import GeneGraph
from scfm.ops.gene_graph import plan_by_sorting


def random_graph(num_genes: int, num_edges: int, *, seed: int = 0, global_ids=(0,)) -> GeneGraph:
    source, target = np.random.default_rng(seed).integers(0, num_genes, (2, num_edges))
    return GeneGraph.from_edges(num_genes, source, target, global_ids=global_ids)


def seen_by_definition(graph: GeneGraph, token_ids: list[int], lengths: list[int]) -> np.ndarray:
    seen = np.zeros((len(token_ids), len(token_ids)), dtype=bool)
    neighbors = [
        set(graph.columns[graph.offsets[g] : graph.offsets[g + 1]].tolist()) for g in range(graph.num_genes)
    ]
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            for j in range(start, start + length):
                a, b = token_ids[i], token_ids[j]
                everyone = bool(graph.is_global[a]) or bool(graph.is_global[b])
                seen[i, j] = everyone or a == b or b in neighbors[a]
        start += length
    return seen


@pytest.mark.parametrize("lengths", [[], [0], [1], [5, 0, 12], [30, 1, 2, 17]], ids=str)
@pytest.mark.parametrize("global_ids", [(), (0,), (0, 3)], ids=str)
def test_plans_follow_the_definition(lengths, global_ids) -> None:
    graph = random_graph(12, 30, global_ids=global_ids)
    ids = np.random.default_rng(1).integers(0, 12, sum(lengths)).astype(np.int32)  # genes recur in a cell
    tokens, cu_seqlens = torch.from_numpy(ids), offsets(lengths)
    expected = seen_by_definition(graph, ids.tolist(), lengths)
    for plan in (graph.plan(tokens, cu_seqlens), plan_by_sorting(graph, tokens, cu_seqlens)):
        np.testing.assert_array_equal(plan.dense_mask().numpy(), expected)
        columns, rows = np.nonzero(expected)[1], np.nonzero(expected.T)[1]
        np.testing.assert_array_equal(plan.columns.numpy(), columns)
        np.testing.assert_array_equal(plan.rows.numpy(), rows)
        np.testing.assert_array_equal(plan.row_offsets.diff().numpy(), expected.sum(1))
        np.testing.assert_array_equal(plan.col_offsets.diff().numpy(), expected.sum(0))


def test_the_kernel_and_the_sort_give_the_same_plan() -> None:
    graph = random_graph(400, 6000)
    tokens = torch.randint(0, 400, (900,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    cu_seqlens = offsets([300, 0, 1, 599])
    ours, sorted_plan = graph.plan(tokens, cu_seqlens), plan_by_sorting(graph, tokens, cu_seqlens)
    for name in ("row_offsets", "columns", "col_offsets", "rows"):
        a, b = getattr(ours, name), getattr(sorted_plan, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_edges_may_come_in_any_order_and_twice() -> None:
    a = GeneGraph.from_edges(5, [3, 1, 3, 1], [2, 4, 0, 4])
    assert a.offsets.tolist() == [0, 0, 1, 1, 3, 3] and a.columns.tolist() == [4, 0, 2]
    both = GeneGraph.from_edges(5, [3], [2], symmetric=True)
    assert both.offsets.tolist() == [0, 0, 0, 1, 2, 2] and both.columns.tolist() == [3, 2]


def test_nearest_takes_the_most_similar() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    graph = GeneGraph.nearest(vectors, 1, global_ids=[4])
    rows = [graph.columns[graph.offsets[g] : graph.offsets[g + 1]].tolist() for g in range(5)]
    assert rows == [[], [2], [1], [2], []]  # a row of zeros and a global token have no neighbours


def test_nearest_in_blocks_is_nearest_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    whole = GeneGraph.nearest(vectors, 5)
    monkeypatch.setattr("scfm.ops.gene_graph._SIMILARITY_ROWS", 7)
    assert torch.equal(whole.columns, GeneGraph.nearest(vectors, 5).columns)
    similarity = torch.nn.functional.normalize(vectors) @ torch.nn.functional.normalize(vectors).T
    similarity.fill_diagonal_(-2)
    assert torch.equal(whole.columns.view(50, 5).long(), similarity.topk(5).indices.sort().values)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GeneGraph.from_edges(3, [0], [3]), "target runs from 3 to 3"),
        (lambda: GeneGraph.from_edges(3, [-1], [0]), "source runs from -1"),
        (lambda: GeneGraph.from_edges(3, [0, 1], [0]), "2 sources and 1 targets"),
        (lambda: GeneGraph.from_edges(3, [0], [1], global_ids=[5]), "global_ids"),
        (lambda: GeneGraph.nearest(torch.zeros(4), 1), "vectors"),
        (lambda: GeneGraph.nearest(torch.zeros(4, 2), 4), "num_neighbors 4"),
        (
            lambda: GeneGraph(
                torch.tensor([0, 2]), torch.tensor([0, 0], dtype=torch.int32), torch.tensor([False])
            ),
            "not sorted and unique",
        ),
        (lambda: random_graph(4, 4).plan(torch.tensor([4], dtype=torch.int32), offsets([1])), "0 to 3"),
    ],
)
def test_what_does_not_fit_is_named(build, message) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        build()
