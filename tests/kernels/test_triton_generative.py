"""The Triton kernels of generative attention against the dense mask in float64."""

from __future__ import annotations

import math

import packs
import pytest
import torch
from attention_checks import check_lse, check_results
from scfm.kernels import generative_attention as kernels

from scfm.ops.generative_attention import generative_attention_reference as reference

pytestmark = pytest.mark.usefixtures("poisoned")
# (length, known tokens) of every cell
CELLS = [
    [],
    [(1, 0)],
    [(1, 1)],
    [(0, 0), (3, 3), (0, 0), (4, 0)],
    [(37, 20), (64, 64), (5, 1), (130, 129), (1, 0)],
    [(127, 127), (128, 127), (129, 128)],
    [(200, 64), (130, 0), (67, 65)],
    [(2, 1)] * 7,
]


def pack(cells):
    return packs.offsets([n for n, _ in cells]), torch.tensor([m for _, m in cells], dtype=torch.int32)


def run(q, k, v, upstream, cu_seqlens, num_known, scale):
    out, lse = kernels.forward(q, k, v, cu_seqlens, num_known, scale)
    return out, lse, *kernels.backward(upstream, q, k, v, out, lse, cu_seqlens, num_known, scale)


def check(q, k, v, upstream, cu_seqlens, num_known, scale, device):
    out, lse, *grads = run(*(x.to(device) for x in (q, k, v, upstream, cu_seqlens, num_known)), scale)

    def formula(*inputs):
        return reference(*inputs, cu_seqlens, num_known, scale=scale)

    check_results([out, *grads], formula, (q, k, v), upstream)
    check_every_lse(lse, q.double(), k.double(), cu_seqlens, num_known, scale)


def check_every_lse(lse, q, k, cu_seqlens, num_known, scale):
    for cell, known in enumerate(num_known.tolist()):
        rows = slice(int(cu_seqlens[cell]), int(cu_seqlens[cell + 1]))
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) * scale
        seen = torch.eye(scores.shape[-1], dtype=torch.bool)
        seen[:, :known] = True
        total = torch.logsumexp(scores.masked_fill(~seen, -math.inf), -1).T
        check_lse(lse[rows], total)


@pytest.mark.parametrize(
    ("cells", "dtype"),
    [
        *((cells, torch.bfloat16) for cells in CELLS),
        *((cells, torch.float32) for cells in CELLS[:5]),
        ([(37, 20), (5, 1)], torch.float16),
    ],
    ids=str,
)
def test_equals_the_dense_mask(cells, dtype, device):
    offsets, num_known = pack(cells)
    q, k, v, upstream = packs.heads(int(offsets[-1]), dtype=dtype, seed=len(cells))
    check(q, k, v, upstream, offsets, num_known, 0.25, device)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(1, torch.float32), (24, torch.float16), (64, torch.bfloat16), (256, torch.bfloat16)],
)
def test_head_dims(head_dim, dtype, device):
    offsets, num_known = pack([(19, 7), (70, 66)])
    q, k, v, upstream = packs.heads(89, 1, head_dim, dtype=dtype)
    check(q, k, v, upstream, offsets, num_known, head_dim**-0.5, device)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.0])
def test_scales(scale, device):
    offsets, num_known = pack([(33, 20), (70, 65)])
    q, k, v, upstream = packs.heads(103, dtype=torch.float32)
    check(q, k, v, upstream, offsets, num_known, scale, device)


def test_views_of_a_packed_tensor(device):
    offsets, num_known = pack([(37, 30), (64, 1), (5, 5)])
    q, k, v, upstream = packs.heads(106, dtype=torch.float32)
    q, k, v = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1).view(106, 3, 2, 16).unbind(1)
    check(q, k, v, upstream, offsets, num_known, 0.25, device)


def test_unknown_tokens_are_seen_by_nobody_else(device):
    """NaN in one unknown token's key and value reaches its own row only."""
    offsets, num_known = pack([(70, 40), (20, 20)])
    q, k, v, upstream = (x.to(device) for x in packs.heads(90, dtype=torch.float32))
    rest = (upstream, offsets.to(device), num_known.to(device), 0.25)
    expected = run(q, k, v, *rest)
    k, v = k.clone(), v.clone()
    k[50], v[50] = math.nan, math.nan
    others = torch.arange(90) != 50
    for found, wanted in zip(run(q, k, v, *rest)[:3], expected[:3], strict=True):
        assert torch.equal(found[others], wanted[others])
        assert bool(found[50].isnan().all())


def test_a_cell_does_not_feel_the_others(device):
    q, k, v, upstream = packs.heads(67, dtype=torch.float32)
    alone = pack([(67, 40)])
    expected = run(*(x.to(device) for x in (q, k, v, upstream, *alone)), 0.25)
    before, after = (torch.full((n, 2, 16), math.nan) for n in (66, 7))
    packed = [torch.cat([before, x, after]).to(device) for x in (q, k, v, upstream)]
    among = pack([(65, 33), (1, 0), (67, 40), (0, 0), (7, 7)])
    for found, wanted in zip(run(*packed, *(x.to(device) for x in among), 0.25), expected, strict=True):
        assert torch.equal(found[66:133], wanted)
