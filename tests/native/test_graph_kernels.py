"""The kernels of sparse graph attention against float64, by instruction set, storage type and plan."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scfm import _native as native

Array = np.ndarray[Any, np.dtype[Any]]
Plan = tuple[Array, Array, Array, Array]

LENGTHS = [[], [0], [1], [0, 3, 0], [37, 64, 5, 130, 1], [255, 256, 257], [1] * 300]
DTYPES = [torch.float32, torch.bfloat16]
RESULTS = ("out", "lse", "dq", "dk", "dv")


def offsets(lengths: list[int]) -> Array:
    return np.cumsum([0, *lengths]).astype(np.int32)


def random_graph(num_genes: int, num_edges: int, num_global: int = 1) -> tuple[Array, Array, Array]:
    """CSR over genes, the first of which are global."""
    edges = np.unique(np.random.default_rng(0).integers(0, num_genes**2, num_edges))
    counts = np.bincount(edges // num_genes, minlength=num_genes)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return starts, (edges % num_genes).astype(np.int32), np.arange(num_genes) < num_global


def make_plan(lengths: list[int], num_genes: int = 60, num_edges: int = 500) -> Plan:
    ids = np.random.default_rng(1).integers(0, num_genes, sum(lengths)).astype(np.int32)
    return native.graph_plan(offsets(lengths), ids, *random_graph(num_genes, num_edges))


def plan_of(seen: Array) -> Plan:
    parts: list[Array] = []
    for pairs in (seen, seen.T):
        parts += [np.cumsum([0, *pairs.sum(1)]).astype(np.int64), np.nonzero(pairs)[1].astype(np.int32)]
    return parts[0], parts[1], parts[2], parts[3]


def dense(plan: Plan) -> Tensor:
    seen = np.zeros((plan[0].size - 1,) * 2, dtype=bool)
    seen[np.repeat(np.arange(plan[0].size - 1), np.diff(plan[0])), plan[1]] = True
    return torch.from_numpy(seen)


def array(tensor: Tensor) -> Array:
    view: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return view


def inputs(num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 2) -> list[Tensor]:
    """q, k, v and the upstream gradient: views of one packed tensor, with a stride to skip."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn((num_tokens, 4, heads, head_dim + 3), generator=generator).to(dtype)
    return [packed[:, i, :, :head_dim] for i in range(4)]


def run(tensors: list[Tensor], plan: Plan, scale: float) -> list[Tensor]:
    """out, lse, dq, dk, dv into poisoned memory; out and dq strided."""
    q, k, v, upstream = tensors
    shape, dtype = q.shape, q.dtype
    out, dq = torch.full((shape[0], 2, *shape[1:]), math.nan, dtype=dtype).unbind(1)
    dk, dv = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
    lse = torch.full(shape[:2], math.nan)
    native.graph_forward(*map(array, (q, k, v, out, lse)), plan[0], plan[1], scale)
    native.graph_backward(*map(array, (upstream, q, k, v, out, lse, dq, dk, dv)), *plan, scale)
    return [out, lse, dq, dk, dv]


def formula(tensors: list[Tensor], seen: Tensor, scale: float) -> list[Tensor]:
    """The same in the tensors' own dtype, with a dense mask."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[:3])
    scores = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen, -math.inf)
    weights = torch.where(seen.any(1)[:, None], torch.softmax(scores, -1), 0.0)
    out = torch.einsum("hij,jhd->ihd", weights.to(q.dtype), v)
    grads = torch.autograd.grad(out, (q, k, v), tensors[3])
    return [out.detach(), torch.logsumexp(scores, -1).T.detach(), *(x.nan_to_num(0.0) for x in grads)]


def check(
    tensors: list[Tensor], plan: Plan, scale: float = 0.2, names: tuple[str, ...] = RESULTS
) -> list[Tensor]:
    """Every result's error is at most twice that of the formula in the same dtype."""
    found, seen = run(tensors, plan, scale), dense(plan)
    exact = formula([x.double() for x in tensors], seen, scale)
    plain = formula(tensors, seen, scale)
    for name, ours, torchs, want in zip(RESULTS, found, plain, exact, strict=True):
        assert ours.shape == want.shape
        if not want.numel() or name not in names:
            continue
        finite = torch.isfinite(want)
        assert torch.equal(torch.isfinite(ours), finite), name
        assert torch.equal(ours[~finite].double(), want[~finite]), name
        difference = (ours.double() - want).where(finite, 0.0).abs().max()
        allowed = 2 * (torchs.double() - want).where(finite, 0.0).abs().max()
        slack = 2e-6 * max(1.0, float(want.where(finite, 0.0).abs().max()))
        assert difference <= allowed + slack, f"{name}: {float(difference):.3g} above {float(allowed):.3g}"
    return found


# ---- plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [*LENGTHS, [5000]], ids=lambda x: f"{len(x)}x{max(x, default=0)}")
@pytest.mark.parametrize("num_global", [0, 1, 3])
@pytest.mark.parametrize("id_type", [np.int32, np.int64])
def test_plans_follow_the_definition(lengths: list[int], num_global: int, id_type: type) -> None:
    num_genes = max(60, sum(lengths) // 20)
    starts, columns, is_global = random_graph(num_genes, 500, num_global)
    ids = np.random.default_rng(3).integers(0, num_genes, sum(lengths)).astype(id_type)
    plan = native.graph_plan(offsets(lengths), ids, starts, columns, is_global)
    assert [x.dtype for x in plan] == [np.int64, np.int32, np.int64, np.int32]
    related = np.eye(num_genes, dtype=bool) | is_global[:, None] | is_global
    related[np.repeat(np.arange(num_genes), np.diff(starts)), columns] = True
    cell = np.repeat(np.arange(len(lengths)), lengths)
    seen = related[ids[:, None], ids] & (cell[:, None] == cell)
    for found, expected in zip(plan, plan_of(seen), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_plans_do_not_depend_on_threads() -> None:
    lengths = [300, 0, 1, 200, 77, 500, 3]
    native.set_num_threads(1)
    first = make_plan(lengths)
    native.set_num_threads(3)
    for a, b in zip(first, make_plan(lengths), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("token_id", [-1, 60, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_named(token_id: int) -> None:
    ids = np.zeros(9, np.int32)
    ids[5] = token_id
    with pytest.raises(ValueError, match=rf"token_ids\[5\] = {token_id} is out of range for 60 genes"):
        native.graph_plan(offsets([9]), ids, *random_graph(60, 100))


def test_broken_gene_graphs_are_refused() -> None:
    ids, cu_seqlens = np.zeros(4, np.int64), offsets([4])
    starts, columns, is_global = random_graph(60, 100)
    with pytest.raises(ValueError, match="gene_offsets must rise"):
        native.graph_plan(cu_seqlens, ids, starts[::-1].copy(), columns, is_global)
    with pytest.raises(ValueError, match="gene_offsets has"):
        native.graph_plan(cu_seqlens, ids, starts[:-1].copy(), columns, is_global)
    with pytest.raises(ValueError, match=r"gene_columns\[3\] = 60"):
        native.graph_plan(
            cu_seqlens,
            ids,
            starts,
            np.where(np.arange(columns.size) == 3, 60, columns).astype("i4"),
            is_global,
        )
    with pytest.raises(TypeError, match="is_global"):
        native.graph_plan(cu_seqlens, ids, starts, columns, is_global.astype(np.int32))
    with pytest.raises(ValueError, match="cu_seqlens"):
        native.graph_plan(offsets([3]), ids, starts, columns, is_global)


# ---- attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}x{max(x, default=0)}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_dense_mask(isa: str, lengths: list[int], dtype: torch.dtype) -> None:
    check(inputs(sum(lengths), 2, 64, dtype), make_plan(lengths))


@pytest.mark.parametrize("head_dim", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65, 100, 128, 129, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    check(inputs(61, 3, head_dim, dtype), make_plan([40, 21]), scale=1 / math.sqrt(head_dim))


@pytest.mark.parametrize("num_seen", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_length(isa: str, num_seen: int, dtype: torch.dtype) -> None:
    seen = np.zeros((80, 80), dtype=bool)
    for row in range(80):
        seen[row, np.random.default_rng(row).choice(80, num_seen, replace=False)] = True
    check(inputs(80, 2, 64, dtype), plan_of(seen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_see_nothing_or_that_nobody_sees(isa: str, dtype: torch.dtype) -> None:
    seen = np.random.default_rng(5).random((50, 50)) < 0.2
    seen[[0, 17, 49]] = False
    seen[:, [3, 49]] = False
    out, lse, dq, dk, dv = check(inputs(50, 2, 33, dtype), plan_of(seen))
    blind, hidden = ~torch.from_numpy(seen.any(1)), ~torch.from_numpy(seen.any(0))
    assert not out[blind].any() and not dq[blind].any() and bool((lse[blind] == -math.inf).all())
    assert not dk[hidden].any() and not dv[hidden].any()


def test_a_cell_without_holes(isa: str) -> None:
    """Every token sees every other: many tasks of one cell."""
    check(inputs(700, 1, 64, torch.float32), plan_of(np.ones((700, 700), dtype=bool)))


def test_one_token_that_all_see_and_that_sees_all(isa: str) -> None:
    num_tokens = 17_000  # its row is longer than a block of scores
    seen_offsets = np.concatenate([[0, num_tokens], num_tokens + 2 * np.arange(1, num_tokens)]).astype(
        np.int64
    )
    others = np.stack([np.zeros(num_tokens - 1), np.arange(1, num_tokens)], 1).ravel()
    columns = np.concatenate([np.arange(num_tokens), others]).astype(np.int32)
    plan = seen_offsets, columns, seen_offsets, columns
    tensors = inputs(num_tokens, 1, 8, torch.float32)
    out, lse, dq, dk, dv = run(tensors, plan, 0.5)
    q, k, v = (x.double().clone().requires_grad_() for x in tensors[:3])
    first = torch.einsum("hd,jhd->jh", q[0], k) * 0.5
    pairs = torch.stack([(q * k[0]).sum(-1), (q * k).sum(-1)])[:, 1:] * 0.5
    mixed = torch.softmax(pairs, 0).unsqueeze(-1) * torch.stack([v[:1].expand_as(v), v])[:, 1:]
    exact = torch.cat([(torch.softmax(first, 0).unsqueeze(-1) * v).sum(0, keepdim=True), mixed.sum(0)])
    sums = torch.cat([torch.logsumexp(first, 0, keepdim=True), torch.logsumexp(pairs, 0)])
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), sums, rtol=0, atol=4e-6)
    for ours, want in zip(
        (dq, dk, dv), torch.autograd.grad(exact, (q, k, v), tensors[3].double()), strict=True
    ):
        torch.testing.assert_close(ours.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [3.0, 1e-6, -0.3])
def test_scores_of_any_size(isa: str, scale: float) -> None:
    check(inputs(90, 2, 16, torch.float32), make_plan([90]), scale=scale)


def test_scores_of_a_thousand(isa: str) -> None:
    """The gradients find the weights again by a log-sum-exp whose last bit is then worth 6e-5."""
    check(inputs(90, 2, 16, torch.float32), make_plan([90]), scale=60.0, names=("out", "lse"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cell_does_not_depend_on_the_batch_or_on_threads(isa: str, dtype: torch.dtype) -> None:
    lengths = [300, 20, 257, 0, 64]
    tensors = inputs(sum(lengths), 2, 64, dtype)
    native.set_num_threads(1)
    together = run(tensors, make_plan(lengths), 0.125)
    native.set_num_threads(3)
    again = run(tensors, make_plan(lengths), 0.125)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    ids = np.random.default_rng(1).integers(0, 60, sum(lengths)).astype(np.int32)
    for begin, end in zip(offsets(lengths)[:-1].tolist(), offsets(lengths)[1:].tolist(), strict=True):
        plan = native.graph_plan(offsets([end - begin]), ids[begin:end].copy(), *random_graph(60, 500))
        alone = run([x[begin:end] for x in tensors], plan, 0.125)
        assert all(torch.equal(a[begin:end], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_reaches_those_that_see_it_and_no_others(isa: str, dtype: torch.dtype) -> None:
    seen = np.eye(40, dtype=bool)
    seen[7, 3] = True
    q, k, v, upstream = inputs(40, 1, 16, dtype)
    k[3, 0, 5] = math.nan
    out, lse = run([q, k, v, upstream], plan_of(seen), 0.25)[:2]
    hit = torch.tensor([row in (3, 7) for row in range(40)])
    assert torch.equal(out.isnan().all(-1).all(-1), hit) and torch.equal(out.isnan().any(-1).any(-1), hit)
    assert torch.equal(lse.isnan()[:, 0], hit)


# ---- refusals ---------------------------------------------------------------------------------------------------


def broken_plans() -> list[tuple[str, Plan]]:
    good = plan_of(np.ones((6, 6), dtype=bool))
    cases = []
    for part, name in ((0, "row"), (2, "col")):
        for place, value, message in ((0, 1, r"\[0\] = 1"), (3, 1, "falls"), (6, 35, "ends at 35")):
            bad = [x.copy() for x in good]
            bad[part][place] = value
            cases.append((f"{name}_offsets.*{message}", (bad[0], bad[1], bad[2], bad[3])))
    for part, name in ((1, "columns"), (3, "rows")):
        for value in (-1, 6, 2**31 - 1):
            bad = [x.copy() for x in good]
            bad[part][20] = value
            cases.append((f"token 3: {name} run from", (bad[0], bad[1], bad[2], bad[3])))
    return cases


@pytest.mark.parametrize(("message", "plan"), broken_plans())
def test_broken_plans_are_refused_before_anything_is_written(message: str, plan: Plan) -> None:
    tensors = inputs(6, 1, 8, torch.float32)
    out, dq, dk, dv = (torch.full((6, 1, 8), 5.0) for _ in range(4))
    lse = torch.full((6, 1), 5.0)
    with pytest.raises(ValueError, match=message):
        native.graph_backward(*map(array, (tensors[3], *tensors[:3], out, lse, dq, dk, dv)), *plan, 1.0)
    if "row_" in message or "columns" in message:
        with pytest.raises(ValueError, match=message):
            native.graph_forward(*map(array, (*tensors[:3], out, lse)), plan[0], plan[1], 1.0)
    assert all(bool((x == 5.0).all()) for x in (out, lse, dq, dk, dv))


def test_arguments_that_do_not_fit_are_refused() -> None:
    plan = plan_of(np.ones((6, 6), dtype=bool))
    q, k, v, _ = inputs(6, 1, 8, torch.float32)
    out, lse = torch.zeros(6, 1, 8), torch.zeros(6, 1)
    with pytest.raises(ValueError, match="graph_forward: k is 5 x 1 x 8"):
        native.graph_forward(*map(array, (q, k[:5], v, out, lse)), plan[0], plan[1], 1.0)
    with pytest.raises(TypeError, match="graph_forward: v has another dtype"):
        native.graph_forward(*map(array, (q, k, v.bfloat16(), out, lse)), plan[0], plan[1], 1.0)
    wide = torch.zeros(6, 1, 257)
    with pytest.raises(ValueError, match="head_dim = 257"):
        native.graph_forward(*map(array, (wide, wide, wide, wide, lse)), plan[0], plan[1], 1.0)


def test_no_instruction_set_reads_past_the_end_of_a_graph(isa: str) -> None:
    """Arrays that end where forbidden memory begins; a process of its own, since a fault there is a signal."""
    if sys.platform == "win32":
        pytest.skip("needs mprotect")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "guard_page_probe_graph.py")],
        env={**os.environ, "SCFM_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"signal or error {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "ok"
