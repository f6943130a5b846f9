"""The public operators computed by the Triton kernels: every optional argument, autograd, and what layers share.

The kernels' own tests call them directly; these go through scfm.ops with the path forced, so that arguments, their
order and what is saved for the backward are those of every model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import packs
import pytest
import torch
from attention_checks import check_gradient
from scfm.kernels import graph_blocks, tiles
from torch import Tensor

from scfm import ops
from scfm.ops.gene_graph import plan_by_sorting

pytestmark = pytest.mark.usefixtures("poisoned")
LENGTHS = [19, 0, 37, 1]
CELLS = packs.offsets(LENGTHS)
TOTAL = sum(LENGTHS)
KNOWN = torch.tensor([11, 0, 37, 0], dtype=torch.int32)


@dataclass(frozen=True)
class Case:
    """inputs(dtype) need gradients; operator and formula are given those and where all else is to lie."""

    name: str
    inputs: Callable[[torch.dtype], list[Tensor]]
    operator: Callable[..., Tensor]
    formula: Callable[..., Tensor]


def normal(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attention(dtype: torch.dtype) -> list[Tensor]:
    return packs.heads(TOTAL, dtype=dtype)[:3]


def one_query_a_cell(dtype: torch.dtype) -> list[Tensor]:
    return normal(dtype, (4, 2, 16), (TOTAL, 2, 16), (TOTAL, 2, 16))


def graph_plan() -> ops.GraphPlan:
    source, target = torch.randint(0, 30, (2, 150), generator=torch.Generator().manual_seed(1))
    graph = ops.GeneGraph.from_edges(30, source, target, global_ids=(0,))
    return plan_by_sorting(graph, torch.arange(TOTAL, dtype=torch.int32) % 30, CELLS)


PLAN = graph_plan()
PROJECTION = normal(torch.float32, (23, 16))[0]
QUERIES = torch.arange(5, dtype=torch.int32)
TABLES = [11, 7, 1, 5, 3]
IDS = [torch.arange(40) * 7 % rows for rows in TABLES]
TARGETS = torch.arange(33) * 5 % 53


def embeddings(num_tables: int, *, addend: bool = False, norm: bool = True) -> Callable[..., list[Tensor]]:
    shapes = [(rows, 24) for rows in TABLES[:num_tables]] + [(40, 24)] * addend + [(24,)] * 2 * norm
    return lambda dtype: normal(dtype, *shapes)


def embed(function: Callable[..., Tensor], num_tables: int, *, addend: bool = False, norm: bool = True):
    def call(*given: Tensor, device: str) -> Tensor:
        more = list(given[num_tables:])
        extra = more.pop(0) if addend else None
        weight, bias = more if norm else (None, None)
        ids = [x.to(device) for x in IDS[:num_tables]]
        ids[0] = ids[0].int()
        return function(ids, given[:num_tables], weight, bias, addend=extra, eps=1e-5)

    return call


def both(call: Callable[..., Tensor], name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """``call`` with the operator, and with its reference, as first argument."""
    functions = [getattr(ops, name), getattr(ops, f"{name}_reference")]
    return tuple(lambda *x, device, f=f: call(f, *x, device) for f in functions)  # type: ignore[return-value]


def embed_case(name: str, num_tables: int, **options: bool) -> Case:
    functions = (embed(f, num_tables, **options) for f in (ops.embed_norm, ops.embed_norm_reference))
    return Case(f"embed_norm, {name}", embeddings(num_tables, **options), *functions)


def favor(scope: str):
    def call(f, q, k, v, device):
        return f(q, k, v, PROJECTION.to(device, q.dtype), CELLS.to(device), kmax_scope=scope)

    return both(call, "favor_attention")


CASES = [
    Case("varlen", attention, *both(lambda f, q, k, v, d: f(q, k, v, CELLS.to(d)), "varlen_attention")),
    Case(
        "varlen, one query a cell",
        one_query_a_cell,
        *both(
            lambda f, q, k, v, d: f(q, k, v, CELLS.to(d), cu_seqlens_q=QUERIES.to(d), scale=-0.3),
            "varlen_attention",
        ),
    ),
    Case(
        "generative",
        attention,
        *both(lambda f, q, k, v, d: f(q, k, v, CELLS.to(d), KNOWN.to(d), scale=0.4), "generative_attention"),
    ),
    Case("graph", attention, *both(lambda f, q, k, v, d: f(q, k, v, PLAN.to(d)), "graph_attention")),
    Case("favor, maxima of cells", attention, *favor("cell")),
    Case("favor, maximum of the batch", attention, *favor("batch")),
    embed_case("three tables", 3),
    embed_case("an addend", 2, addend=True),
    embed_case("a sum only", 2, addend=True, norm=False),
    embed_case("five tables", 5),
    Case(
        "masked head",
        lambda dtype: normal(dtype, (33, 24), (53, 24), (53,)),
        *both(lambda f, h, w, b, d: f(h, w, b, TARGETS.to(d)), "masked_head_loss"),
    ),
    Case(
        "masked head without bias",
        lambda dtype: normal(dtype, (33, 24), (53, 24)),
        *both(lambda f, h, w, d: f(h, w, None, TARGETS.to(d)), "masked_head_loss"),
    ),
]


@pytest.fixture(autouse=True)
def triton_everywhere():
    """No other path may compute anything, forward or backward."""
    with ExitStack() as stack:
        for operator in ops.paths.operators():
            stack.enter_context(ops.use_path(operator, "triton"))
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_and_gradients_equal_the_reference(case, dtype, device):
    inputs = case.inputs(dtype)
    ours = [x.to(device).requires_grad_() for x in inputs]
    out = case.operator(*ours, device=device)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(8)).to(out.dtype)
    grads = torch.autograd.grad(out, ours, upstream.to(device))
    same, exact = ([x.to(kind) for x in inputs] for kind in (dtype, torch.float64))
    results = []
    for given in (same, exact):
        results.append(
            [
                case.formula(*given, device="cpu"),
                *packs.gradients(
                    lambda *x: case.formula(*x, device="cpu"), given, upstream.to(given[0].dtype)
                ),
            ]
        )
    assert [g.dtype for g in grads] == [dtype] * len(inputs)
    packs.check_as_exact_as_torch(out.detach().cpu(), results[0][0], results[1][0])
    for found, plain, truth in zip(grads, results[0][1:], results[1][1:], strict=True):
        check_gradient(found.cpu().double(), plain.double(), truth)


def layers(function, q, k, v, count=3):
    for _ in range(count):
        q = function(q, k, v)
    return q


@pytest.mark.parametrize("operator", ["varlen_attention", "favor_attention", "generative_attention"])
def test_tile_lists_are_built_once_for_all_layers(operator, device, monkeypatch):
    """One list a block size and use, whatever the number of layers, forward and backward."""
    built = []
    build = tiles._build
    monkeypatch.setattr(tiles, "_build", lambda *a: built.append(a[2]) or build(*a))
    cells, known, projection = (x.to(device) for x in (CELLS.clone(), KNOWN, PROJECTION))
    calls = {
        "varlen_attention": lambda q, k, v: ops.varlen_attention(q, k, v, cells),
        "favor_attention": lambda q, k, v: ops.favor_attention(q, k, v, projection, cells),
        "generative_attention": lambda q, k, v: ops.generative_attention(q, k, v, cells, known),
    }
    q, k, v = (x.to(device).requires_grad_() for x in attention(torch.bfloat16))
    layers(calls[operator], q, k, v, 1).sum().backward()
    once = len(built)
    assert 1 <= once <= 3
    layers(calls[operator], q, k, v).sum().backward()
    assert len(built) == once


def test_block_plans_are_built_once_for_all_layers(device, monkeypatch):
    built = []
    build = graph_blocks._build
    monkeypatch.setattr(graph_blocks, "_build", lambda *a: built.append(a) or build(*a))
    plan = graph_plan().to(device)
    q, k, v = (x.to(device).requires_grad_() for x in attention(torch.bfloat16))
    layers(lambda *x: ops.graph_attention(*x, plan), q, k, v).sum().backward()
    assert len(built) == 1
