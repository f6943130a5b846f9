"""graph_attention against the formula with a dense mask: dtypes, gradients, hubs, tokens that see nothing."""

from __future__ import annotations

import pytest
import torch
from packs import check_as_exact_as_torch, gradients, heads, module_of, offsets
from test_gene_graph import random_graph

from scfm.errors import InvalidArgumentError
from scfm.ops import GeneGraph, GraphPlan, graph_attention, graph_attention_reference, varlen_attention

LENGTHS = [[], [1], [4, 0, 9], [33, 1, 129], [1] * 20]


def case(lengths, dtype=torch.float64, dim=16, num_genes=60, global_ids=(0,)):
    graph = random_graph(num_genes, 8 * num_genes, global_ids=global_ids)
    total = sum(lengths)
    tokens = torch.randint(
        0, num_genes, (total,), generator=torch.Generator().manual_seed(3), dtype=torch.int32
    )
    return *heads(total, head_dim=dim, dtype=dtype), graph.plan(tokens, offsets(lengths))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_dense_mask(lengths, dtype) -> None:
    q, k, v, upstream, plan = case(lengths, dtype)

    def reference(*x):
        return graph_attention_reference(*x, plan)

    wide = [x.double() for x in (q, k, v)]
    out = graph_attention(q, k, v, plan)
    assert out.dtype == dtype
    check_as_exact_as_torch(out, reference(q, k, v), reference(*wide))
    ours = gradients(lambda *x: graph_attention(*x, plan), (q, k, v), upstream)
    same = gradients(reference, (q, k, v), upstream)
    for ours_one, same_one, exact in zip(
        ours, same, gradients(reference, wide, upstream.double()), strict=True
    ):
        check_as_exact_as_torch(ours_one, same_one, exact)


def test_a_complete_graph_is_full_attention() -> None:
    q, k, v, _, _ = case([40])
    graph = GeneGraph.from_edges(40, [], [], global_ids=range(40))
    plan = graph.plan(torch.arange(40, dtype=torch.int32), offsets([25, 15]))
    torch.testing.assert_close(graph_attention(q, k, v, plan), varlen_attention(q, k, v, offsets([25, 15])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_token_that_sees_nothing_gives_zeros_and_no_gradient(dtype) -> None:
    q, k, v, upstream, _ = case([3], dtype)
    none, some = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 2], dtype=torch.int32)
    plan = GraphPlan(none, some, none, some)
    assert not graph_attention(q, k, v, plan)[1].any()
    dq, dk, dv = gradients(lambda *x: graph_attention(*x, plan), (q, k, v), upstream)
    assert not dq[1].any() and not dk[1].any() and not dv[1].any()
    torch.testing.assert_close(dv[0], upstream[0])


def test_long_rows_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, upstream, plan = case([33, 1, 129])
    whole = gradients(lambda *x: graph_attention(*x, plan), (q, k, v), upstream)
    monkeypatch.setattr(module_of("graph_attention"), "_EDGES_AT_ONCE", 40)
    for a, b in zip(whole, gradients(lambda *x: graph_attention(*x, plan), (q, k, v), upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_cells_never_see_each_other() -> None:
    graph = random_graph(30, 200)
    tokens = torch.randint(0, 30, (60,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    q, k, v, _ = heads(60, dtype=torch.float32)
    whole = graph_attention(q, k, v, graph.plan(tokens, offsets([20, 25, 15])))
    alone = graph_attention(q[20:45], k[20:45], v[20:45], graph.plan(tokens[20:45], offsets([25])))
    assert torch.equal(whole[20:45], alone)


def test_gradcheck() -> None:
    q, k, v, _, plan = case([4, 0, 6], dim=4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: graph_attention(*x, plan), inputs)


def test_a_plan_of_other_tokens_is_refused() -> None:
    q, k, v, _, plan = case([4, 5])
    with pytest.raises(InvalidArgumentError, match="the plan is of 9 tokens"):
        graph_attention(q[:5], k[:5], v[:5], plan)
