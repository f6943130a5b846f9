"""Fault rows 50, 51 and 55 for the operators: any shapes, threads and forks, too little memory."""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from run_child import run_child

from scfm import ops
from scfm.ops import native
from scfm.ops.gene_graph import GeneGraph

NAMES = ["varlen_attention", "generative_attention", "graph_attention", "favor_attention", "embed_norm"]


def any_call(name: str, seed: int, *, most_tokens: int = 90) -> tuple[list[torch.Tensor], object]:
    """Random shapes, strides, dtype and cells of an operator: its differentiable inputs and a function of them."""
    rng = np.random.default_rng([seed, NAMES.index(name)])
    cuts = np.sort(rng.integers(0, most_tokens + 1, rng.integers(0, 9)))
    bounds = np.concatenate([[0], cuts, [max([0, *cuts])]]).astype(np.int32)
    cu_seqlens, total = torch.from_numpy(bounds), int(bounds[-1])
    heads, dim = int(rng.integers(1, 4)), int(rng.choice([1, 3, 8, 17, 31, 32, 64, 65, 96, 128, 200, 256]))
    dtype = [torch.float32, torch.bfloat16][rng.integers(2)]
    generator = torch.Generator().manual_seed(seed)
    if name == "embed_norm":
        rows = rng.integers(1, 12, rng.integers(1, 5)).tolist()
        size = int(rng.integers(1, 300))
        ids = [torch.randint(0, n, (total,), generator=generator) for n in rows]
        inputs = [torch.randn(n, size, generator=generator).to(dtype) for n in rows]
        inputs += [torch.randn(size, generator=generator).to(dtype) for _ in range(2)]
        return inputs, lambda *x: ops.embed_norm(ids, x[:-2], *x[-2:], eps=1e-5)
    packed = torch.randn(total, 3, heads, dim + int(rng.integers(0, 3)), generator=generator).to(dtype)
    q, k, v = packed[..., :dim].unbind(1)
    if name == "varlen_attention":
        return [q, k, v], lambda *x: ops.varlen_attention(*x, cu_seqlens)
    if name == "generative_attention":
        known = torch.from_numpy(rng.integers(0, np.diff(bounds) + 1).astype(np.int32))
        return [q, k, v], lambda *x: ops.generative_attention(*x, cu_seqlens, known)
    if name == "graph_attention":
        genes = int(rng.integers(1, 30))
        edges = rng.integers(0, genes, (2, rng.integers(0, 120)))
        graph = GeneGraph.from_edges(genes, *edges, global_ids=rng.integers(0, genes, rng.integers(0, 3)))
        tokens = torch.from_numpy(rng.integers(0, genes, total).astype(np.int32))
        plan = graph.plan(tokens, cu_seqlens)
        return [q, k, v], lambda *x: ops.graph_attention(*x, plan)
    projection = torch.randn(int(rng.integers(1, 80)), dim, generator=generator)
    return [q, k, v], lambda *x: ops.favor_attention(*x, projection, cu_seqlens)


def results(inputs: list[torch.Tensor], function) -> list[torch.Tensor]:
    """The output and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


# --- row 50: any input, against the plain path ---


@pytest.mark.parametrize("name", NAMES)
def test_row_50_any_shape_equals_the_formula(name: str) -> None:
    for seed in range(60):
        inputs, function = any_call(name, seed)
        ours = results(inputs, function)
        with ops.use_path(name, "torch"):
            plain = results(inputs, function)
            exact = results([x.double() for x in inputs], function)
        for a, b, e in zip(ours, plain, exact, strict=True):
            assert bool(torch.isfinite(a).all()), (name, seed)
            if a.numel():
                error, usual = (a.double() - e).abs().max(), (b.double() - e).abs().max()
                slack = (1e-5 if a.dtype == torch.float32 else 2e-2) * (1 + e.abs().max())
                assert error <= 2 * usual + slack, (name, seed, float(error), float(usual))


# --- row 51: threads and forks ---


@pytest.mark.parametrize("name", NAMES)
def test_row_51_many_threads_at_once(name: str) -> None:
    calls = [any_call(name, seed, most_tokens=300) for seed in range(12)]
    alone = [results(*call) for call in calls]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda call: results(*call), calls * 4))
    for i, found in enumerate(together):
        assert all(torch.equal(a, b) for a, b in zip(found, alone[i % len(calls)], strict=True)), i


def _in_fork(queue) -> None:
    torch.set_num_threads(1)  # torch's own pool does not survive a fork; ours does
    queue.put([float(results(*any_call(name, 5))[0].double().sum()) for name in NAMES])


def test_row_51_a_fork_after_threads_were_used() -> None:
    for name in NAMES:
        results(*any_call(name, 5))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_fork, args=(queue,), daemon=True)
    child.start()
    try:
        found = queue.get(timeout=60)
        child.join(timeout=30)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert found == pytest.approx([float(results(*any_call(name, 5))[0].double().sum()) for name in NAMES])


# --- row 55: too little memory ---


def sweep_limits(name: str) -> list[str]:
    """In a child: what became of calls whose kernels were given less and more memory, and of one after them."""
    right = results(*any_call(name, 3, most_tokens=1500))

    def with_little_memory(allowed, function, *arguments):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + allowed, resource.RLIM_INFINITY))
        try:
            return function(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    usual = native.with_torch_threads
    ends = []
    for allowed in (0, 4096, *(int(2e4 * 3**step) for step in range(9))):
        native.with_torch_threads = partial(with_little_memory, allowed)
        try:
            found = results(*any_call(name, 3, most_tokens=1500))
            ends.append(
                "right" if all(torch.equal(a, b) for a, b in zip(found, right, strict=True)) else "wrong"
            )
        except MemoryError:
            ends.append("MemoryError")
    native.with_torch_threads = usual
    again = results(*any_call(name, 3, most_tokens=1500))
    assert all(torch.equal(a, b) for a, b in zip(again, right, strict=True))
    return ends


@pytest.mark.parametrize("name", NAMES)
def test_row_55_too_little_memory(name: str) -> None:
    """Whatever the limit: the same bits or MemoryError; never a crash, a hang or another error."""
    outcome = run_child(sweep_limits, name, timeout=120)
    assert outcome.kind == "ok", outcome
    assert set(outcome.value) <= {"right", "MemoryError"}
    assert outcome.value[-1] == "right"
