"""What every operator owes torch: schemas and fake implementations that hold, and torch.compile without a break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from packs import heads, offsets
from test_gene_graph import random_graph

from scfm import ops
from scfm.ops.arguments import wide

CU = offsets([5, 0, 9])
KNOWN = torch.tensor([3, 0, 9], dtype=torch.int32)
PLAN = random_graph(10, 40).plan(torch.arange(14, dtype=torch.int32) % 10, CU)
PLAN_PARTS = (PLAN.row_offsets, PLAN.columns, PLAN.col_offsets, PLAN.rows)
PROJECTION = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
IDS = [torch.arange(14) % 6, torch.arange(14) % 3]
TARGETS = torch.arange(14) % 9


def attention_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    return heads(14, head_dim=8, dtype=dtype)[:3]


def matrices(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# name: (inputs that need gradients, the operator of those, torch's operator and its arguments)
CASES: dict[str, tuple[Callable, Callable, Callable]] = {
    "varlen_attention": (
        attention_inputs,
        lambda q, k, v: ops.varlen_attention(q, k, v, CU),
        lambda q, k, v: (q, k, v, CU, CU, 0.3),
    ),
    "generative_attention": (
        attention_inputs,
        lambda q, k, v: ops.generative_attention(q, k, v, CU, KNOWN),
        lambda q, k, v: (q, k, v, CU, KNOWN, 0.3),
    ),
    "graph_attention": (
        attention_inputs,
        lambda q, k, v: ops.graph_attention(q, k, v, PLAN),
        lambda q, k, v: (q, k, v, *PLAN_PARTS, 0.3),
    ),
    "favor_attention": (
        attention_inputs,
        lambda q, k, v: ops.favor_attention(q, k, v, PROJECTION.to(q.dtype), CU),
        lambda q, k, v: (q, k, v, PROJECTION.to(wide(q.dtype)), CU, None, 1e-4),
    ),
    "embed_norm": (
        lambda dtype: matrices(dtype, (6, 8), (3, 8), (8,), (8,), (14, 8)),
        lambda a, b, w, c, x: ops.embed_norm(IDS, [a, b], w, c, addend=x, eps=1e-5),
        lambda a, b, w, c, x: (IDS, [a, b], x, w, c, 1e-5),
    ),
    "masked_head_loss": (
        lambda dtype: matrices(dtype, (14, 8), (9, 8), (9,)),
        lambda h, w, b: ops.masked_head_loss(h, w, b, TARGETS),
        lambda h, w, b: (h, w, b, TARGETS),
    ),
}
NAMES = list(CASES)


def test_every_operator_is_here() -> None:
    public = {name for name in ops.__all__ if f"{name}_reference" in ops.__all__}
    assert public == set(NAMES) == set(ops.paths.operators())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_torch_knows_the_operator(name, dtype) -> None:
    make, _, arguments = CASES[name]
    inputs = [x.requires_grad_() for x in make(dtype)]
    torch.library.opcheck(getattr(torch.ops.scfm, name).default, arguments(*inputs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_a_break(name, dtype) -> None:
    make, operator, _ = CASES[name]
    results = []
    for function in (operator, torch.compile(operator, fullgraph=True, backend="aot_eager")):
        inputs = [x.requires_grad_() for x in make(dtype)]
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_and_torch_paths_agree(name, dtype) -> None:
    make, operator, _ = CASES[name]
    inputs = make(dtype)
    results = {}
    for verdict in ops.explain(name, inputs[0]):
        if verdict.chosen or verdict.why.startswith("slower"):
            with ops.use_path(name, verdict.path):
                results[verdict.path] = operator(*inputs)
    assert "torch" in results
    for out in results.values():
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out, results["torch"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_flows_where_nothing_needs_a_gradient(name) -> None:
    make, operator, _ = CASES[name]
    assert not operator(*make(torch.float32)).requires_grad
    with torch.inference_mode():
        assert operator(*make(torch.float32)).isfinite().all()
