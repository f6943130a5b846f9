"""The sparse attention kernels, run on the host, against the formula in float64.

Their error is at most twice that of the formula in the same dtype, as for every other path.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cuda_emulator import Emulator
from test_graph_kernels import RESULTS, dense, formula, make_plan, offsets, plan_of, random_graph
from torch import Tensor

from scfm import _native as native

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WHOLE = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}  # numbers in 16 bytes


def inputs(num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((num_tokens, heads, head_dim), generator=generator).to(dtype) for _ in range(4)]


def check(emulator: Emulator, tensors: list[Tensor], plan, scale: float = 0.2, names=RESULTS) -> list[Tensor]:
    found, seen = emulator.graph(tensors, plan, scale), dense(plan)
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


@pytest.mark.parametrize(
    "lengths",
    [[], [0], [1], [0, 3, 0], [37, 64, 5, 130, 1], [1] * 70],
    ids=lambda x: f"{len(x)}x{max(x, default=0)}",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_dense_mask(emulator: Emulator, lengths: list[int], dtype: torch.dtype) -> None:
    check(emulator, inputs(sum(lengths), 2, 64, dtype), make_plan(lengths))


HEAD_DIMS = [4, 8, 16, 24, 32, 40, 64, 72, 96, 128, 136, 200, 256]
CUTS = [(dtype, dim) for dtype in DTYPES for dim in HEAD_DIMS if dim % WHOLE[dtype] == 0]


@pytest.mark.parametrize(("dtype", "head_dim"), CUTS, ids=str)
def test_every_cut_of_a_warp(emulator: Emulator, dtype: torch.dtype, head_dim: int) -> None:
    check(emulator, inputs(31, 2, head_dim, dtype), make_plan([20, 11]), scale=1 / math.sqrt(head_dim))


@pytest.mark.parametrize("num_seen", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_length(emulator: Emulator, num_seen: int, dtype: torch.dtype) -> None:
    seen = np.zeros((66, 66), dtype=bool)
    for row in range(66):
        seen[row, np.random.default_rng(row).choice(66, num_seen, replace=False)] = True
    check(emulator, inputs(66, 1, 32, dtype), plan_of(seen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_see_nothing_or_that_nobody_sees(emulator: Emulator, dtype: torch.dtype) -> None:
    seen = np.random.default_rng(5).random((50, 50)) < 0.2
    seen[[0, 17, 49]] = False
    seen[:, [3, 49]] = False
    out, lse, dq, dk, dv = check(emulator, inputs(50, 2, 40, dtype), plan_of(seen))
    blind, hidden = ~torch.from_numpy(seen.any(1)), ~torch.from_numpy(seen.any(0))
    assert not out[blind].any() and not dq[blind].any() and bool((lse[blind] == -math.inf).all())
    assert not dk[hidden].any() and not dv[hidden].any()


def test_no_edge_at_all(emulator: Emulator) -> None:
    check(emulator, inputs(9, 2, 16, torch.float32), plan_of(np.zeros((9, 9), dtype=bool)))


@pytest.mark.parametrize(("num_tokens", "dtype"), [(513, torch.float32), (700, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 256])
def test_hubs_see_and_are_seen_by_all(
    emulator: Emulator, num_tokens: int, dtype: torch.dtype, head_dim: int
) -> None:
    """Rows above 512 edges are shared by the warps of a block; two in one block, and one in the last."""
    seen = np.eye(num_tokens, dtype=bool)
    for hub in (0, 3, num_tokens - 1):
        seen[hub] = True
        seen[:, hub] = True
    check(emulator, inputs(num_tokens, 1, head_dim, dtype), plan_of(seen), scale=1 / math.sqrt(head_dim))


@pytest.mark.parametrize("count", [511, 512, 513])
def test_rows_about_the_size_of_a_hub(emulator: Emulator, count: int) -> None:
    seen = np.eye(600, dtype=bool)
    seen[5, :count] = True
    check(emulator, inputs(600, 1, 16, torch.float32), plan_of(seen))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(emulator: Emulator, order: int) -> None:
    tensors = inputs(520, 1, 16, torch.float32)
    seen = np.random.default_rng(1).random((520, 520)) < 0.02
    seen[[0, 1, 4]] = seen[:, [0, 1, 4]] = True
    first = emulator.graph(tensors, plan_of(seen), 0.3)
    with emulator.order(order):
        again = emulator.graph(tensors, plan_of(seen), 0.3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("scale", [3.0, 1e-6, -0.3])
def test_scores_of_any_size(emulator: Emulator, scale: float) -> None:
    check(emulator, inputs(60, 2, 16, torch.float32), make_plan([60]), scale=scale)


def test_scores_of_a_thousand(emulator: Emulator) -> None:
    """The gradients find the weights again by a log-sum-exp whose last bit is then worth 6e-5."""
    check(emulator, inputs(60, 2, 16, torch.float32), make_plan([60]), scale=60.0, names=("out", "lse"))


def test_values_far_from_zero_cancel_in_the_gradient(emulator: Emulator) -> None:
    """A constant added to every value moves no gradient of q and k: what cancels must cancel well."""
    tensors = inputs(60, 1, 64, torch.float32)
    tensors[2] += 100.0
    check(emulator, tensors, make_plan([60]))


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_out_lost_by_rounding_does_not_reach_the_gradient(
    emulator: Emulator, dtype: torch.dtype, hub
) -> None:
    """<out, dO> is only a guess of delta; with values about 100, out is rounded by as much as 0.25."""
    num_tokens = 520 if hub else 40
    tensors = inputs(num_tokens, 1, 16, dtype)
    tensors[2] = tensors[2] + 100.0
    seen = np.eye(num_tokens, dtype=bool)
    seen[:3] = True
    dq = emulator.graph(tensors, plan_of(seen), 0.2)[2].double()
    exact = formula([x.double() for x in tensors], torch.from_numpy(seen), 0.2)[2]
    rounding = 2 * float(torch.finfo(dtype).eps) * exact[:3].abs()
    assert bool(((dq[:3] - exact[:3]).abs() <= rounding + 1e-4).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cell_does_not_depend_on_the_batch(emulator: Emulator, dtype: torch.dtype) -> None:
    lengths = [90, 20, 0, 64]
    tensors = inputs(sum(lengths), 2, 64, dtype)
    together = emulator.graph(tensors, make_plan(lengths), 0.125)
    ids = np.random.default_rng(1).integers(0, 60, sum(lengths)).astype(np.int32)
    for begin, end in zip(offsets(lengths)[:-1].tolist(), offsets(lengths)[1:].tolist(), strict=True):
        plan = native.graph_plan(offsets([end - begin]), ids[begin:end].copy(), *random_graph(60, 500))
        alone = emulator.graph([x[begin:end] for x in tensors], plan, 0.125)
        assert all(torch.equal(a[begin:end], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_reaches_those_that_see_it_and_no_others(emulator: Emulator, dtype: torch.dtype) -> None:
    seen = np.eye(40, dtype=bool)
    seen[7, 3] = True
    q, k, v, upstream = inputs(40, 1, 16, dtype)
    k[3, 0, 5] = math.nan
    out, lse = emulator.graph([q, k, v, upstream], plan_of(seen), 0.25)[:2]
    hit = torch.tensor([row in (3, 7) for row in range(40)])
    assert torch.equal(out.isnan().all(-1).all(-1), hit) and torch.equal(out.isnan().any(-1).any(-1), hit)
    assert torch.equal(lse.isnan()[:, 0], hit)


def test_a_row_that_is_not_aligned_is_told_on(emulator: Emulator) -> None:
    """What a GPU answers with a fault; the bindings refuse it before."""
    tensors = inputs(3, 1, 6, torch.float32)
    with pytest.raises(RuntimeError, match="not aligned"):
        emulator.graph([x[..., :6] for x in tensors], plan_of(np.eye(3, dtype=bool)), 1.0)


def test_the_emulation_rounds_as_torch_does(emulator: Emulator) -> None:
    """float16 and bfloat16 in software: a token that sees only itself gives its value's bits back."""
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = bits[torch.isfinite(bits)]
        v = values[: values.numel() // 64 * 64].reshape(-1, 1, 64).contiguous()
        q = torch.zeros_like(v)
        out = emulator.graph([q, q, v, q], plan_of(np.eye(len(v), dtype=bool)), 1.0)[0]
        assert torch.equal(out, v)
