"""The kernels of attention inside packed cells against float64, by instruction set, storage type and mask."""

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

# Tiles are of 2 or 6 queries and 16 to 64 keys, blocks of 48 queries and 64, 96 or 128 keys, stretches of 512 keys.
LENGTHS = [
    [],
    [0],
    [1],
    [0, 3, 0],
    [5, 6, 7],
    [47, 48, 49],
    [63, 64, 65],
    [95, 96, 97, 0, 131],
    [513],
    [1] * 1000,
]
DTYPES = [torch.float32, torch.bfloat16]
RESULTS = ("out", "lse", "dq", "dk", "dv")


def offsets(lengths: list[int]) -> Array:
    return np.cumsum([0, *lengths]).astype(np.int32)


def array(tensor: Tensor) -> Array:
    view: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return view


def inputs(num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 2) -> list[Tensor]:
    """q, k, v and the upstream gradient: views of one packed tensor, with a stride to skip."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn((num_tokens, 4, heads, head_dim + 3), generator=generator).to(dtype)
    return [packed[:, i, :, :head_dim] for i in range(4)]


def run(tensors: list[Tensor], cells: Array, known: Array | None, scale: float, cells_q: Array | None = None):
    """out, lse, dq, dk, dv into poisoned memory; out and dq strided."""
    q, k, v, upstream = tensors
    dtype, offsets_q = q.dtype, cells if cells_q is None else cells_q
    out, dq = torch.full((len(q), 2, *q.shape[1:]), math.nan, dtype=dtype).unbind(1)
    dk, dv = (torch.full(k.shape, math.nan, dtype=dtype) for _ in range(2))
    lse = torch.full(q.shape[:2], math.nan)
    native.varlen_forward(*map(array, (q, k, v, out, lse)), offsets_q, cells, known, scale)
    native.varlen_backward(
        *map(array, (upstream, q, k, v, out, lse, dq, dk, dv)), offsets_q, cells, known, scale
    )
    return [out, lse, dq, dk, dv]


def seen(cells: Array, known: Array | None, cells_q: Array) -> Tensor:
    mask = torch.zeros(int(cells_q[-1]), int(cells[-1]), dtype=torch.bool)
    for cell in range(len(cells) - 1):
        begin, end = int(cells[cell]), int(cells[cell + 1])
        stop = end if known is None else begin + int(known[cell])
        mask[cells_q[cell] : cells_q[cell + 1], begin:stop] = True
        if known is not None:
            mask[range(stop, end), range(stop, end)] = True
    return mask


def by_formula(
    tensors, cells, known, scale, dtype: torch.dtype, cells_q: Array | None = None
) -> list[Tensor]:
    """The same in one dense masked softmax of the given dtype."""
    mask = seen(cells, known, cells if cells_q is None else cells_q)
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors[:3])
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    out = torch.einsum("hij,jhd->ihd", torch.softmax(scores, -1).nan_to_num(0.0), v)
    lse = torch.logsumexp(scores.float() if dtype == torch.bfloat16 else scores, -1).T
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype))]


def check(tensors, cells, known=None, scale=0.3, cells_q=None) -> None:
    found = run(tensors, cells, known, scale, cells_q)
    exact = by_formula(tensors, cells, known, scale, torch.float64, cells_q)
    usual = by_formula(tensors, cells, known, scale, tensors[0].dtype, cells_q)
    for name, ours, torchs, truth in zip(RESULTS, found, usual, exact, strict=True):
        empty = torch.isinf(truth)
        assert torch.equal(torch.isinf(ours), empty), name
        if not truth.numel():
            continue
        error, allowed = ((x.double() - truth).masked_fill(empty, 0.0).abs().max() for x in (ours, torchs))
        # torch's gradients of a single key are exactly 0; ours are the rounding of lse and delta. Of bfloat16 lse is
        # that of weights which are rounded to bfloat16 next.
        slack = {"dq": 5e-6, "dk": 5e-6, "lse": 1e-6 if tensors[0].dtype == torch.float32 else 2e-4}.get(
            name, 1e-6
        )
        slack *= max(1.0, float(truth.masked_fill(empty, 0.0).abs().max()))
        assert error <= 2 * allowed + slack, f"{name}: error {float(error):.3g}, torch's {float(allowed):.3g}"


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: str(x) if len(x) < 9 else "1000 of 1")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("generative", [False, True], ids=["full", "generative"])
def test_cells_of_every_length(isa: str, lengths: list[int], dtype: torch.dtype, generative: bool) -> None:
    rng = np.random.default_rng(3)
    known = rng.integers(0, np.array(lengths, dtype=np.int64) + 1).astype(np.int32) if generative else None
    check(inputs(sum(lengths), 2, 32, dtype), offsets(lengths), known)


@pytest.mark.parametrize("head_dim", [1, 2, 3, 15, 16, 17, 31, 48, 63, 64, 65, 80, 127, 128, 200, 255, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    check(inputs(70, 1, head_dim, dtype), offsets([13, 57]), scale=head_dim**-0.5)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-3, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scale(isa: str, scale: float, dtype: torch.dtype) -> None:
    check(inputs(80, 2, 16, dtype), offsets([30, 50]), np.array([20, 50], np.int32), scale=scale)


@pytest.mark.parametrize("known", [[0, 0], [48, 0], [0, 100], [48, 100], [1, 99], [47, 64]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_known_and_unknown(isa: str, known: list[int], dtype: torch.dtype) -> None:
    check(inputs(148, 2, 64, dtype), offsets([48, 100]), np.array(known, np.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [[1, 1, 1], [0, 5, 2], [50, 0, 7]], ids=str)
def test_queries_by_their_own_offsets(isa: str, queries: list[int], dtype: torch.dtype) -> None:
    _, k, v, _ = inputs(119, 2, 64, dtype)
    q, _, _, upstream = inputs(sum(queries), 2, 64, dtype, seed=5)
    check([q, k, v, upstream], offsets([100, 0, 19]), cells_q=offsets(queries))


def test_large_scores_keep_their_order(isa: str) -> None:
    q, k, v, _ = inputs(60, 1, 64, torch.float32)
    out = run([q * 30, k * 30, v, v], offsets([60]), None, 1.0)[0]
    best = torch.einsum("ihd,jhd->ij", q.double(), k.double()).argmax(1)
    torch.testing.assert_close(out, v[best].contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_none(isa: str, dtype: torch.dtype) -> None:
    tensors = [x.clone() for x in inputs(70, 2, 32, dtype)]
    tensors[1][45, 1, 3] = math.nan  # a key of the second cell, in one head
    out, lse, dq, *_ = run(tensors, offsets([40, 30]), None, 0.3)
    wrong = torch.zeros(70, 2, dtype=torch.bool)
    wrong[40:, 1] = True
    for found in (out, dq):
        assert torch.equal(found.isnan().any(-1), wrong)
    assert torch.equal(lse.isnan(), wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_alone_together_and_on_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    lengths = [800, 5, 131, 0, 64]
    known = np.array([300, 5, 0, 0, 63], np.int32)
    tensors, cells = inputs(sum(lengths), 3, 32, dtype), offsets(lengths)
    for num_known in (None, known):
        native.set_num_threads(1)
        whole = run(tensors, cells, num_known, 0.3)
        native.set_num_threads(3)
        for a, b in zip(whole, run(tensors, cells, num_known, 0.3), strict=True):
            assert a.equal(b)
        for cell, length in enumerate(lengths):
            rows = slice(int(cells[cell]), int(cells[cell + 1]))
            own = None if num_known is None else num_known[cell : cell + 1]
            alone = run([x[rows] for x in tensors], offsets([length]), own, 0.3)
            assert all(a[rows].equal(b) for a, b in zip(whole, alone, strict=True))


def test_nothing_outside_the_cells_is_written(isa: str) -> None:
    q, k, v, _ = inputs(20, 2, 24, torch.float32)
    room = torch.full((22, 2, 40), 7.0)
    out = room[1:21, :, 5:29]
    lse = torch.zeros(20, 2)
    native.varlen_forward(*map(array, (q, k, v, out, lse)), offsets([20]), offsets([20]), None, 0.2)
    untouched = torch.ones_like(room, dtype=torch.bool)
    untouched[1:21, :, 5:29] = False
    assert bool((room[untouched] == 7.0).all())


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_no_access_beyond_the_arrays(name: str) -> None:
    if name not in native.available_isas():
        pytest.skip(f"this processor does not run {name}")
    script = Path(__file__).with_name("guard_page_probe_varlen.py")
    probe = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "SCFM_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert probe.stdout.strip() == "ok", (probe.returncode, probe.stderr)


def good_arguments() -> dict[str, Any]:
    q, k, v, _ = inputs(9, 2, 8, torch.float32)
    return {
        "q": q.numpy(),
        "k": k.numpy(),
        "v": v.numpy(),
        "out": np.zeros((9, 2, 8), np.float32),
        "lse": np.zeros((9, 2), np.float32),
        "cu_seqlens_q": offsets([4, 5]),
        "cu_seqlens_k": offsets([4, 5]),
        "num_known": None,
        "scale": 0.3,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((9, 2, 7), np.float32)}, "k"),
        ({"v": np.zeros((8, 2, 8), np.float32)}, "v"),
        ({"out": np.zeros((9, 3, 8), np.float32)}, "out"),
        ({"out": np.zeros((9, 2, 8), np.int16)}, "out"),
        ({"lse": np.zeros((9, 1), np.float32)}, "lse"),
        ({"cu_seqlens_k": np.array([0, 5, 4], np.int32)}, "cu_seqlens_k"),
        ({"cu_seqlens_k": np.array([0, 4, 10], np.int32)}, "cu_seqlens_k"),
        ({"cu_seqlens_q": np.array([0, 9], np.int32)}, "cu_seqlens_q"),
        ({"cu_seqlens_q": np.array([1, 4, 9], np.int32)}, "cu_seqlens_q"),
        ({"num_known": np.array([5, 0], np.int32)}, "num_known"),
        ({"num_known": np.array([-1, 0], np.int32)}, "num_known"),
        ({"num_known": np.array([1], np.int32)}, "num_known"),
        ({"num_known": np.array([1, 1], np.int32), "cu_seqlens_q": np.array([0, 5, 9], np.int32)}, "same"),
        ({"q": np.zeros((9, 2, 300), np.float32)[..., ::2]}, "q"),
        ({name: np.zeros((9, 2, 257), np.float32) for name in ("q", "k", "v", "out")}, "head_dim"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    native.varlen_forward(**good_arguments())
    with pytest.raises((ValueError, TypeError), match=message):
        native.varlen_forward(**{**good_arguments(), **change})
