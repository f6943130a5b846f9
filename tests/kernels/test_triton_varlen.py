"""The Triton kernels of varlen attention against the float64 formula, and what must not depend on other cells."""

from __future__ import annotations

import math

import packs
import pytest
import torch
from attention_checks import check_lse, check_results
from scfm.kernels import tiles
from scfm.kernels import varlen_attention as kernels

from scfm.ops.varlen_attention import varlen_attention_reference as reference

pytestmark = pytest.mark.usefixtures("poisoned")


def check(q, k, v, upstream, cu_seqlens, cu_seqlens_q, scale, device="cpu"):
    """Forward, log-sum-exp and gradients are as exact as torch's in the same dtype; nothing is left unwritten."""
    out, lse, *grads = run(*(x.to(device) for x in (q, k, v, upstream, cu_seqlens, cu_seqlens_q)), scale)

    def formula(*inputs):
        return reference(*inputs, cu_seqlens, scale=scale, cu_seqlens_q=cu_seqlens_q)

    check_results([out, *grads], formula, (q, k, v), upstream)
    check_every_lse(lse, q.double(), k.double(), cu_seqlens, cu_seqlens_q, scale)


def run(q, k, v, upstream, cu_seqlens, cu_seqlens_q, scale):
    out, lse = kernels.forward(q, k, v, cu_seqlens_q, cu_seqlens, scale)
    return out, lse, *kernels.backward(upstream, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, scale)


def check_every_lse(lse, q, k, cu_seqlens, cu_seqlens_q, scale):
    for cell in range(cu_seqlens.numel() - 1):
        rows, keys = (slice(int(x[cell]), int(x[cell + 1])) for x in (cu_seqlens_q, cu_seqlens))
        scores = torch.einsum("ihd,jhd->ihj", q[rows], k[keys]) * scale
        check_lse(lse[rows], torch.logsumexp(scores, -1))


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        *((lengths, torch.bfloat16) for lengths in packs.LENGTHS),
        *((lengths, torch.float32) for lengths in ([], [1], [0, 3, 0], [37, 64, 5, 65, 1])),
        ([33, 7], torch.float16),
    ],
    ids=str,
)
def test_equals_the_formula(lengths, dtype, device):
    offsets = packs.offsets(lengths)
    q, k, v, upstream = packs.heads(int(offsets[-1]), dtype=dtype, seed=len(lengths))
    check(q, k, v, upstream, offsets, offsets, 0.25, device)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (1, torch.float32),
        (17, torch.bfloat16),
        (64, torch.bfloat16),
        (80, torch.float16),
        (128, torch.float32),
        (200, torch.bfloat16),
        (256, torch.bfloat16),
    ],
)
def test_head_dims(head_dim, dtype, device):
    offsets = packs.offsets([19, 1, 0, 67])
    q, k, v, upstream = packs.heads(87, 1, head_dim, dtype=dtype)
    check(q, k, v, upstream, offsets, offsets, head_dim**-0.5, device)


def test_queries_of_their_own(device):
    """One query a cell, cells without queries, cells without keys (zeros, log-sum-exp -infinity, no gradient)."""
    offsets, offsets_q = packs.offsets([5, 0, 130, 7, 0]), packs.offsets([1, 2, 1, 0, 0])
    q, _, _, upstream = packs.heads(4, dtype=torch.float32)
    _, k, v, _ = packs.heads(142, dtype=torch.float32)
    check(q, k, v, upstream, offsets, offsets_q, 0.25, device)
    out, lse, dq, dk, dv = run(*(x.to(device) for x in (q, k, v, upstream, offsets, offsets_q)), 0.25)
    assert not out[1:3].any() and not dq[1:3].any()
    assert bool((lse[1:3] == -math.inf).all())
    assert not dk[135:].any() and not dv[135:].any()


def test_a_thousand_tiny_cells(device, monkeypatch):
    """Of no token, one, two or three; counted in one turn here, since the interpreter takes its time for each."""
    monkeypatch.setattr(tiles, "_CELLS", 1024)
    offsets = packs.offsets([1, 0, 0, 0, 2, 0, 0, 3] * 125)
    q, k, v, _ = packs.heads(int(offsets[-1]), 1, dtype=torch.float32)
    out, _ = kernels.forward(*(x.to(device) for x in (q, k, v, offsets, offsets)), 0.25)
    exact = reference(q.double(), k.double(), v.double(), offsets, scale=0.25)
    packs.check_as_exact_as_torch(out.cpu(), reference(q, k, v, offsets, scale=0.25), exact)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.0])
def test_scales(scale, device):
    offsets = packs.offsets([33, 70])
    q, k, v, upstream = packs.heads(103, dtype=torch.float32)
    check(q, k, v, upstream, offsets, offsets, scale, device)


def test_scores_far_beyond_exp(device):
    """Scores of thousands: only their differences may reach the exponential."""
    offsets = packs.offsets([40, 129])
    q, k, v, upstream = packs.heads(169, dtype=torch.float32)
    q, k = 100 * q, 100 * k
    out, *_ = run(*(x.to(device) for x in (q, k, v, upstream, offsets, offsets)), 0.25)
    exact = reference(q.double(), k.double(), v.double(), offsets, scale=0.25)
    packs.check_as_exact_as_torch(out.cpu(), reference(q, k, v, offsets, scale=0.25), exact)


@pytest.mark.parametrize("layout", ["packed qkv", "heads first", "last dimension strided", "expanded"])
def test_strided_inputs(layout, device):
    offsets = packs.offsets([37, 64, 5])
    q, k, v, upstream = packs.heads(106, 2, 16, dtype=torch.float32)
    if layout == "packed qkv":
        q, k, v = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1).view(106, 3, 2, 16).unbind(1)
    elif layout == "heads first":
        q, k, v, upstream = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, upstream))
    elif layout == "last dimension strided":
        q, k, v, upstream = (torch.stack([x, x], -1)[..., 1] for x in (q, k, v, upstream))
    else:
        upstream = upstream[:1].expand(106, 2, 16)
    check(q, k, v, upstream, offsets, offsets, 0.25, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cell_does_not_feel_the_others(dtype, device):
    """Bit for bit the same alone, between others, and after a cell of NaN."""
    q, k, v, upstream = packs.heads(67, dtype=dtype)
    alone = packs.offsets([67])
    expected = run(*(x.to(device) for x in (q, k, v, upstream, alone, alone)), 0.25)
    before, after = (torch.full((n, 2, 16), math.nan, dtype=dtype) for n in (66, 7))
    packed = [torch.cat([before, x, after]).to(device) for x in (q, k, v, upstream)]
    offsets = packs.offsets([65, 1, 67, 0, 7]).to(device)
    for found, wanted in zip(run(*packed, offsets, offsets, 0.25), expected, strict=True):
        assert torch.equal(found[66:133], wanted)
