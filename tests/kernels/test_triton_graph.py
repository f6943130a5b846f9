"""The Triton kernels of sparse gene attention against the dense mask in float64, and the plans that they follow."""

from __future__ import annotations

import math

import packs
import pytest
import torch
from attention_checks import check_lse, check_results
from scfm.kernels import graph_attention as kernels
from scfm.kernels import graph_blocks

from scfm.ops import GeneGraph, GraphPlan
from scfm.ops import graph_attention_reference as reference
from scfm.ops.gene_graph import plan_by_sorting

pytestmark = pytest.mark.usefixtures("poisoned")
NUM_GENES = 60
LENGTHS = [[], [1], [0, 3, 0], [37, 64, 5, 65], [127, 128], [1] * 40, [63, 66, 1, 0]]


def graph_of(num_edges=6 * NUM_GENES, global_ids=(0,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randint(0, NUM_GENES, (2, num_edges), generator=generator)
    return GeneGraph.from_edges(NUM_GENES, source, target, global_ids=global_ids)


def case(lengths, dtype=torch.float32, dim=16, num_heads=2, **graph):
    total = sum(lengths)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, NUM_GENES, (total,), generator=generator, dtype=torch.int32)
    plan = plan_by_sorting(graph_of(**graph), tokens, packs.offsets(lengths))
    return *packs.heads(total, num_heads, dim, dtype=dtype, seed=len(lengths)), plan


def run(q, k, v, upstream, plan, scale=0.25, device="cpu"):
    q, k, v, upstream, plan = (x.to(device) for x in (q, k, v, upstream, plan))
    blocks = kernels.block_plan(plan.row_offsets, plan.columns)
    out, lse = kernels.forward(q, k, v, blocks, scale)
    return out, lse, *kernels.backward(upstream, q, k, v, out, lse, blocks, scale)


def check(q, k, v, upstream, plan, scale=0.25, device="cpu"):
    out, lse, *grads = run(q, k, v, upstream, plan, scale, device)
    check_results([out, *grads], lambda *x: reference(*x, plan, scale=scale), (q, k, v), upstream)
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * scale
    seen = scores.masked_fill(~plan.dense_mask(), -math.inf)
    check_lse(lse, torch.logsumexp(seen, -1).T)


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        *((lengths, torch.bfloat16) for lengths in LENGTHS),
        *((lengths, torch.float32) for lengths in LENGTHS[:4]),
        ([33, 7], torch.float16),
    ],
    ids=str,
)
def test_equals_the_dense_mask(lengths, dtype, device):
    check(*case(lengths, dtype), device=device)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (1, torch.float32),
        (17, torch.bfloat16),
        (64, torch.bfloat16),
        (128, torch.float16),
        (256, torch.bfloat16),
    ],
)
def test_head_dims(head_dim, dtype, device):
    check(*case([19, 0, 70], dtype, head_dim, 1), head_dim**-0.5, device)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.0])
def test_scales(scale, device):
    check(*case([33, 40]), scale, device)


@pytest.mark.parametrize("global_ids", [(), range(NUM_GENES)], ids=["no edges", "complete"])
def test_graphs_at_the_ends(global_ids, device):
    """Without edges a gene sees itself only; where all is seen no block has a mask but the last of a tile."""
    q, k, v, upstream, plan = case([130, 2], num_edges=0, global_ids=global_ids)
    check(q, k, v, upstream, plan, device=device)
    lists = kernels.block_plan(plan.row_offsets, plan.columns).keys
    full, blocks = lists.tiles[:, 3].tolist(), lists.tiles[:, 4].tolist()
    assert (full, blocks) == ([2, 2, 2, 0], [3, 3, 3, 1]) if global_ids else not any(full)


def test_tokens_that_see_nothing(device):
    """Zeros, a log-sum-exp of -infinity and no gradient; whole tiles of them too."""
    total = 70
    row_offsets = torch.zeros(total + 1, dtype=torch.int64)
    row_offsets[68:] = torch.arange(1, 4)
    plan = GraphPlan(row_offsets, torch.tensor([3, 68, 69], dtype=torch.int32), *2 * [torch.empty(0)])
    q, k, v, upstream = packs.heads(total, dtype=torch.float32)
    check(q, k, v, upstream, plan, device=device)
    out, lse, dq, _, dv = run(q, k, v, upstream, plan, device=device)
    assert not out[:67].any() and not dq[:67].any() and not dv[:3].any()
    assert bool((lse[:67] == -math.inf).all())


def test_scores_far_beyond_exp(device):
    q, k, v, upstream, plan = case([40, 70])
    out, *_ = run(100 * q, 100 * k, v, upstream, plan, device=device)
    exact = reference(100 * q.double(), 100 * k.double(), v.double(), plan, scale=0.25)
    packs.check_as_exact_as_torch(out.cpu(), reference(100 * q, 100 * k, v, plan, scale=0.25), exact)


@pytest.mark.parametrize("layout", ["packed qkv", "heads first", "last dimension strided"])
def test_strided_inputs(layout, device):
    q, k, v, upstream, plan = case([37, 29])
    if layout == "packed qkv":
        q, k, v = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1).view(66, 3, 2, 16).unbind(1)
    elif layout == "heads first":
        q, k, v, upstream = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, upstream))
    else:
        q, k, v, upstream = (torch.stack([x, x], -1)[..., 1] for x in (q, k, v, upstream))
    check(q, k, v, upstream, plan, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cell_does_not_feel_the_others(dtype, device):
    """Bit for bit the same alone, between others, and beside cells of NaN."""
    graph = graph_of()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, NUM_GENES, (141,), generator=generator, dtype=torch.int32)
    own = slice(66, 133)
    q, k, v, upstream = packs.heads(141, dtype=dtype)
    alone = plan_by_sorting(graph, tokens[own], packs.offsets([67]))
    expected = run(*(x[own] for x in (q, k, v, upstream)), alone, device=device)
    for x in (q, k, v, upstream):
        x[: own.start], x[own.stop :] = math.nan, math.nan
    among = plan_by_sorting(graph, tokens, packs.offsets([65, 1, 67, 0, 8]))
    for found, wanted in zip(run(q, k, v, upstream, among, device=device), expected, strict=True):
        assert torch.equal(found[own], wanted)


# ---- plans ------------------------------------------------------------------------------------------------------


def pairs_of(lists, num_tokens):
    """bool (T, T): every pair that a plan's tiles list, each at most once."""
    found = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for first, own, block, full, blocks in lists.tiles.tolist():
        slots = slice(block * graph_blocks.TILE, (block + blocks) * graph_blocks.TILE)
        bits = (lists.words[slots, None] >> torch.arange(own)) & 1
        assert bool((bits[: full * graph_blocks.TILE] == 1).all())
        for entry, row in zip(lists.entries[slots].tolist(), bits, strict=True):
            found[first : first + own, entry] += row
    assert int(found.max()) <= 1
    return found.bool()


@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
def test_plans_list_every_pair_once(lengths):
    plan = case(lengths)[-1]
    blocks = graph_blocks.block_plan(plan.row_offsets, plan.columns)
    for lists, pairs in ((blocks.keys, plan.dense_mask()), (blocks.queries, plan.dense_mask().T)):
        assert torch.equal(pairs_of(lists, sum(lengths)), pairs)
        own, blocks_each = lists.tiles[:, 1], lists.tiles[:, 4]
        assert int(own.sum()) == sum(lengths) and int(own.max()) <= graph_blocks.TILE
        assert blocks_each.tolist() == sorted(blocks_each.tolist(), reverse=True)


def test_a_plan_is_kept_until_its_pairs_change():
    plan = case([37, 64])[-1]
    first = graph_blocks.block_plan(plan.row_offsets, plan.columns)
    assert graph_blocks.block_plan(plan.row_offsets, plan.columns) is first
    plan.columns[0] = plan.columns[0]
    assert graph_blocks.block_plan(plan.row_offsets, plan.columns) is not first
