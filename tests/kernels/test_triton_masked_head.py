"""The Triton kernels of the masked head against the float64 formula; shares and chunks of the vocabulary; memory."""

from __future__ import annotations

import math

import packs
import pytest
import torch
from attention_checks import check_gradient
from scfm.kernels import masked_head as kernels

from scfm.ops.masked_head_loss import masked_head_loss_reference as reference

pytestmark = pytest.mark.usefixtures("poisoned")


def case(num_rows=70, vocab=53, size=24, *, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(num_rows + vocab)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    upstream = torch.rand(num_rows, generator=generator) + 0.5
    return normal(num_rows, size), normal(vocab, size), normal(vocab) if bias else None, targets, upstream


def on(device, tensors):
    return [None if x is None else x.to(device) for x in tensors]


def run(hidden, weight, bias, targets, upstream):
    losses, lse = kernels.forward(hidden, weight, bias, targets)
    assert losses.dtype == lse.dtype == torch.float32
    grads = kernels.backward(upstream, hidden, weight, bias, targets, lse)
    assert (grads[2] is None) == (bias is None)
    assert all(x is None or x.dtype == hidden.dtype for x in grads)
    return [losses, *(x for x in grads if x is not None)]


def by_formula(hidden, weight, bias, targets, upstream, dtype):
    given = [x.to(dtype) for x in (hidden, weight, bias) if x is not None]

    def function(h, w, b=None):
        return reference(h, w, b, targets)

    return [function(*given), *packs.gradients(function, given, upstream.to(dtype))]


def check(arguments, device):
    """Losses as exact as torch's; of gradients the whole as exact, and no element far off."""
    dtype = arguments[0].dtype
    found = [x.cpu() for x in run(*on(device, arguments))]
    same, exact = (by_formula(*arguments, kind) for kind in (dtype, torch.float64))
    packs.check_as_exact_as_torch(found[0], same[0], exact[0])
    for ours, plain, wanted in zip(found[1:], same[1:], exact[1:], strict=True):
        check_gradient(ours.double(), plain.double(), wanted)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("num_rows", [0, 1, 63, 65, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_formula(num_rows, bias, dtype, device):
    check(case(num_rows, dtype=dtype, bias=bias), device)


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 2048, 2049, 4225])
def test_vocabularies(vocab, device):
    """Below, at and above a tile, a share of the forward and a chunk of the backward; one gene has no loss."""
    check(case(3, vocab, 16, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("size", [1, 15, 16, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths(size, dtype, device):
    check(case(20, 40, size, dtype=dtype), device)


def test_chunks_leave_no_trace(monkeypatch, device):
    """The same bits however many genes' logits are made at a time."""
    arguments = on(device, case(20, 500, dtype=torch.float32))
    whole = run(*arguments)
    assert kernels.genes_at_once(20, 500) == 512
    monkeypatch.setattr(kernels, "_MOST_GRADIENTS", 20 * 128)
    assert kernels.genes_at_once(20, 500) == 128
    for a, b in zip(run(*arguments), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("num_rows", "vocab"), [(10_000, 20_275), (1, 60_697), (3_000_000, 60_697), (0, 5)])
def test_logits_are_never_whole(num_rows, vocab):
    step = kernels.genes_at_once(num_rows, vocab)
    assert step % 128 == 0
    assert 0 < step <= 4096
    assert num_rows * step <= max(1 << 25, 128 * num_rows)


def test_strided_inputs(device):
    hidden, weight, bias, targets, upstream = case(33)
    hidden, weight = (torch.cat([x, x], 1)[:, : x.shape[1]] for x in (hidden, weight.T.contiguous().T))
    targets, upstream, bias = (torch.stack([x, x], 1)[:, 1] for x in (targets, upstream, bias))
    check((hidden, weight, bias, targets, upstream[:1].expand(33)), device)


def test_logits_far_beyond_exp(device):
    hidden, weight, bias, targets, upstream = case(20, 300)
    check((100 * hidden, 100 * weight, bias, targets, upstream), device)


def test_genes_ruled_out_by_their_bias(device):
    """A bias of -infinity, over whole tiles and shares too, takes genes out of the sum."""
    hidden, weight, bias, targets, upstream = case(5, 2500)
    bias[:2400] = -math.inf
    targets = 2400 + targets % 100
    losses, d_hidden, d_weight, d_bias = run(*on(device, (hidden, weight, bias, targets, upstream)))
    kept = hidden, weight[2400:], bias[2400:], targets - 2400, upstream
    wanted, wanted_hidden, wanted_weight, wanted_bias = by_formula(*kept, torch.float64)
    for found, exact in (
        (losses, wanted),
        (d_hidden, wanted_hidden),
        (d_weight[2400:], wanted_weight),
        (d_bias[2400:], wanted_bias),
    ):
        torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    assert not d_weight[:2400].any() and not d_bias[:2400].any()


def test_a_row_does_not_feel_the_others(device):
    hidden, weight, bias, targets, upstream = on(device, case(130, 300, dtype=torch.float32))
    losses, d_hidden, *_ = run(hidden, weight, bias, targets, upstream)
    rows = slice(0, 30)
    poisoned = hidden.clone()
    poisoned[30:] = math.nan
    other, d_other, *_ = run(poisoned, weight, bias, targets, upstream)
    assert torch.equal(other[rows], losses[rows])
    assert torch.equal(d_other[rows], d_hidden[rows])


@pytest.mark.parametrize("wrong", [-1, -100, 53, 2**40])
def test_a_target_outside_the_vocabulary_gives_nan(wrong, device):
    hidden, weight, bias, targets, _ = on(device, case())
    right, _ = kernels.forward(hidden, weight, bias, targets)
    targets[8] = wrong
    losses, lse = kernels.forward(hidden, weight, bias, targets)
    assert bool(losses[8].isnan()) and bool(torch.isfinite(lse).all())
    losses[8] = right[8]
    assert torch.equal(losses, right)
