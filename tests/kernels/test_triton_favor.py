"""The Triton kernels of FAVOR+ attention against the float64 formula: maxima and ties, chunks, scales, neighbours."""

from __future__ import annotations

import math

import packs
import pytest
import torch
from attention_checks import check_results
from scfm.kernels import favor_attention as kernels
from scfm.kernels import favor_context

from scfm.ops.favor_attention import _torch_backward, _torch_forward, favor_attention_reference

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-4


def random_projection(num_features, head_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(9)
    return torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64).to(dtype)


def run(q, k, v, upstream, projection, cu_seqlens, key_max=None, device="cpu", eps=EPS):
    """out, the key maxima, dq, dk, dv and the gradient of the maxima."""
    q, k, v, upstream, w, cu_seqlens = (x.to(device) for x in (q, k, v, upstream, projection, cu_seqlens))
    key_max = None if key_max is None else key_max.to(device)
    out, used = kernels.forward(q, k, v, w.float(), cu_seqlens, key_max, eps)
    grads = kernels.backward(upstream, q, k, v, w.float(), cu_seqlens, used, key_max is not None, eps)
    return [x.cpu() for x in (out, used, *grads)]


def check(q, k, v, upstream, projection, cu_seqlens, device="cpu", eps=EPS):
    """out and gradients as exact as torch's in the same dtype; the maxima are those of the cells."""
    out, used, dq, dk, dv, max_grad = run(q, k, v, upstream, projection, cu_seqlens, device=device, eps=eps)

    def formula(*inputs):
        return favor_attention_reference(*inputs, projection.to(inputs[0].dtype), cu_seqlens, eps=eps)

    check_results([out, dq, dk, dv], formula, (q, k, v), upstream)
    exact = [x.double() for x in (q, k, v, projection)]
    exact_max = _torch_forward(*exact, cu_seqlens, None, eps)[1]
    torch.testing.assert_close(used.double(), exact_max, rtol=2e-6, atol=2e-6)
    exact_grad = _torch_backward(upstream.double(), *exact, cu_seqlens, exact_max, False, eps)[3]
    tolerance = 1e-5 if q.dtype == torch.float32 else 0.02
    assert (max_grad.double() - exact_grad).abs().le(tolerance * (1 + 10 * exact_grad.abs())).all()


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        *((lengths, torch.float32) for lengths in ([], [0, 3, 0], [31, 32, 33], [1] * 4)),
        *((lengths, torch.bfloat16) for lengths in ([], [0, 3, 0], [63, 64, 65], [37, 2, 0, 1])),
        ([0, 3, 37], torch.float16),  # torch's own float16 gradients of a single token are not finite
    ],
    ids=str,
)
def test_equals_the_formula(lengths, dtype, device):
    q, k, v, upstream = packs.heads(sum(lengths), dtype=dtype, seed=len(lengths))
    check(q, k, v, upstream, random_projection(23, 16, dtype), packs.offsets(lengths), device)


@pytest.mark.parametrize(
    ("head_dim", "num_features", "dtype"),
    [
        (1, 1, torch.float32),
        (17, 64, torch.bfloat16),
        (64, 266, torch.bfloat16),
        (64, 37, torch.float32),
        (24, 31, torch.float16),
        (80, 31, torch.bfloat16),
        (256, 40, torch.bfloat16),
    ],
)
def test_head_dims_and_features(head_dim, num_features, dtype, device):
    q, k, v, upstream = packs.heads(42, 1, head_dim, dtype=dtype)
    projection = random_projection(num_features, head_dim, dtype)
    check(q, k, v, upstream, projection, packs.offsets([19, 2, 0, 21]), device)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [(65, torch.float32), (128, torch.float32), (63, torch.bfloat16), (64, torch.bfloat16)],
    ids=str,
)
def test_chunks_are_joined(length, dtype, device, monkeypatch):
    """Cells of several partial sums, with very different maxima in each."""
    monkeypatch.setattr(favor_context, "CHUNK", 64)
    lengths = [length, 1, 0, 67]
    q, k, v, upstream = packs.heads(sum(lengths), dtype=dtype)
    k = k * torch.linspace(0.1, 1.6, len(k))[:, None, None].to(dtype)
    check(q, k, v, upstream, random_projection(40, 16, dtype), packs.offsets(lengths), device)


def test_a_cell_longer_than_a_chunk(device):
    q, k, v, upstream = packs.heads(favor_context.CHUNK + 3, 1, dtype=torch.float32)
    check(q, k, v, upstream, random_projection(9, 16), packs.offsets([len(q)]), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_given_maxima(dtype, device):
    """Each cell relative to the batch's maximum: as torch's path, the gradient of the maximum apart."""
    lengths = packs.offsets([33, 0, 70, 1])
    q, k, v, upstream = packs.heads(104, dtype=dtype)
    projection = random_projection(23, 16, dtype)
    exact = [x.double() for x in (q, k, v, projection)]
    key_max = _torch_forward(*exact, lengths, None, EPS)[1].max().float().expand(4).contiguous()
    ours = run(q, k, v, upstream, projection, lengths, key_max, device)
    truth = [
        *_torch_forward(*exact, lengths, key_max.double(), EPS),
        *_torch_backward(upstream.double(), *exact, lengths, key_max.double(), True, EPS),
    ]
    assert torch.equal(ours[1], key_max)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for found, expected in zip(ours, truth, strict=True):
        error = (found.double() - expected).abs().max()
        assert error <= tolerance * max(1, float(expected.abs().max()))


def test_the_least_of_equal_maxima_gets_the_gradient(device):
    """Three keys of a cell alike, features in equal pairs: of the largest the lowest token has it, then its head."""
    q, k, v, upstream = packs.heads(70, dtype=torch.float32)
    k = 0.1 * k
    for token, head in ((40, 0), (11, 1), (40, 1)):
        k[token, head] = torch.eye(16)[0] * 8  # a power of two along one axis: no rounding parts the equals
    projection, offsets = random_projection(4, 16).repeat(2, 1), packs.offsets([1, 69])
    dk, max_grad = run(q, k, v, upstream, projection, offsets, device=device, eps=0.1)[3:6:2]
    exact = [x.double() for x in (q, k, v, projection)]
    exact_max = _torch_forward(*exact, offsets, None, 0.1)[1]
    _, expected, _, wanted = _torch_backward(upstream.double(), *exact, offsets, exact_max, False, 0.1)
    assert wanted[1].abs() > 1e-2  # or nothing would tell where it went
    torch.testing.assert_close(dk.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(max_grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_zero_cell_gives_its_gradient_to_the_first_feature(device):
    """Keys of zeros: every a_k is 0, and so are its own gradients but for the maximum's."""
    q, k, v, upstream = packs.heads(40, dtype=torch.float32)
    k.zero_()
    projection, offsets = random_projection(23, 16), packs.offsets([40])
    dk = run(q, k, v, upstream, projection, offsets, device=device)[3]
    exact = [x.double() for x in (q, k, v, projection)]
    expected = _torch_backward(upstream.double(), *exact, offsets, torch.zeros(1).double(), False, EPS)[1]
    torch.testing.assert_close(dk.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [12.0, 60.0])
def test_exponents_of_thousands(size, device):
    """Nearly every feature is eps, and nothing overflows."""
    q, k, v, upstream = packs.heads(97, dtype=torch.float32)
    check(q, size * k, v, upstream, random_projection(23, 16), packs.offsets([30, 67]), device)


def test_float16_sums_beyond_its_range(device):
    """Totals of 300,000 and contexts as large are kept scaled, or float16 would hold infinity."""
    q, k, v, upstream = packs.heads(300, 1, dtype=torch.float16)
    k, v = k * 0.01, v + 1000
    offsets, projection = packs.offsets([300]), random_projection(23, 16, torch.float16)
    out, _, *grads, _ = run(q, k, v, upstream, projection, offsets, device=device)
    exact = favor_attention_reference(*(x.double() for x in (q, k, v, projection)), offsets)
    assert (out.double() - exact).abs().max() <= 2**-9 * 1000
    assert all(bool(torch.isfinite(x).all()) for x in grads)


@pytest.mark.parametrize("layout", ["packed qkv", "heads first", "last dimension strided", "expanded"])
def test_strided_inputs(layout, device):
    q, k, v, upstream = packs.heads(76, 2, 16, dtype=torch.float32)
    if layout == "packed qkv":
        q, k, v = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1).view(76, 3, 2, 16).unbind(1)
    elif layout == "heads first":
        q, k, v, upstream = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, upstream))
    elif layout == "last dimension strided":
        q, k, v, upstream = (torch.stack([x, x], -1)[..., 1] for x in (q, k, v, upstream))
    else:
        upstream = upstream[:1].expand(76, 2, 16)
    check(q, k, v, upstream, random_projection(23, 16), packs.offsets([37, 34, 5]), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cell_does_not_feel_the_others(dtype, device, monkeypatch):
    """Bit for bit the same alone, between others, and after a cell of NaN."""
    monkeypatch.setattr(favor_context, "CHUNK", 64)
    q, k, v, upstream = packs.heads(91, dtype=dtype)
    projection = random_projection(23, 16, dtype)
    expected = run(q, k, v, upstream, projection, packs.offsets([91]), device=device)
    before, after = (torch.full((n, 2, 16), math.nan, dtype=dtype) for n in (71, 7))
    packed = [torch.cat([before, x, after]) for x in (q, k, v, upstream)]
    found = run(*packed, projection, packs.offsets([70, 1, 91, 0, 7]), device=device)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        own = slice(2, 3) if index in (1, 5) else slice(71, 162)
        assert torch.equal(a[own], b)


def test_the_projection_is_split_again_when_it_changes(device):
    """On a device the halves of a projection are kept on it."""
    q, k, v, _ = (x.to(device) for x in packs.heads(20, dtype=torch.bfloat16))
    projection, offsets = random_projection(23, 16).to(device), packs.offsets([20]).to(device)
    first, _ = kernels.forward(q, k, v, projection, offsets, None, EPS)
    projection.mul_(0.5)
    second, _ = kernels.forward(q, k, v, projection, offsets, None, EPS)
    fresh, _ = kernels.forward(q, k, v, projection.clone(), offsets, None, EPS)
    assert torch.equal(second, fresh) and not torch.equal(first, second)
