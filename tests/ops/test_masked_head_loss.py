"""masked_head_loss against its formula with all logits: values, gradients, blocks of rows, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packs import check_as_exact_as_torch, gradients, module_of

from scfm.errors import InvalidArgumentError
from scfm.ops import masked_head_loss, masked_head_loss_reference


def case(num_rows=70, vocab=53, size=24, *, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(6)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    return normal(num_rows, size), normal(vocab, size), normal(vocab) if bias else None, targets


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 70, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_formula(num_rows, dtype, bias) -> None:
    hidden, weight, offset, targets = case(num_rows, dtype=dtype, bias=bias)
    given = [x for x in (hidden, weight, offset) if x is not None]
    upstream = torch.linspace(-1, 2, num_rows, dtype=torch.float64)

    def of(function):
        return lambda h, w, b=None: function(h, w, b, targets)

    losses = masked_head_loss(hidden, weight, offset, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = of(masked_head_loss_reference)(*(x.double() for x in given))
    check_as_exact_as_torch(losses, of(masked_head_loss_reference)(*given), exact)
    ours = gradients(of(masked_head_loss), given, upstream.to(losses.dtype))
    same = gradients(of(masked_head_loss_reference), given, upstream.to(dtype))
    wide = gradients(of(masked_head_loss_reference), [x.double() for x in given], upstream)
    for mine, plain, want in zip(ours, same, wide, strict=True):
        check_as_exact_as_torch(mine, plain, want)


def test_equals_cross_entropy() -> None:
    hidden, weight, bias, targets = case()
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    torch.testing.assert_close(masked_head_loss(hidden, weight, bias, targets), expected)


def test_blocks_of_rows_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = case(300)
    whole = gradients(
        lambda *x: masked_head_loss(*x, targets).sum(), (hidden, weight, bias), torch.tensor(1.0).double()
    )
    monkeypatch.setattr(module_of("masked_head_loss"), "_LOGITS_AT_ONCE", 1)  # 64 rows, the least
    parts = gradients(
        lambda *x: masked_head_loss(*x, targets).sum(), (hidden, weight, bias), torch.tensor(1.0).double()
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of("masked_head_loss"), "_LOGITS_AT_ONCE", 1)
    hidden, weight, bias, targets = case(1000, vocab=500, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        masked_head_loss(*inputs, targets).sum().backward()
    assert 0 < largest <= 64 * 500


def test_gradcheck() -> None:
    hidden, weight, bias, targets = case(5, 7, 4)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *x: masked_head_loss(*x, targets), inputs)


@pytest.mark.parametrize("wrong", [-1, -100, 53])
def test_a_target_outside_the_vocabulary_is_named(wrong) -> None:
    hidden, weight, bias, targets = case()
    targets[8] = wrong
    with pytest.raises(InvalidArgumentError, match=rf"targets\[8\] = {wrong}; expected 0 to 52"):
        masked_head_loss(hidden, weight, bias, targets)


@pytest.mark.parametrize(
    "change",
    [
        lambda h, w, b, t: (h[:, :-1], w, b, t),
        lambda h, w, b, t: (h, w, b[:-1], t),
        lambda h, w, b, t: (h, w, b, t[:-1]),
        lambda h, w, b, t: (h, w.float(), b, t),
        lambda h, w, b, t: (h, w, b, t.double()),
        lambda h, w, b, t: (h, w[:0], b[:0], t),
    ],
)
def test_what_does_not_fit_is_refused(change) -> None:
    with pytest.raises(InvalidArgumentError):
        masked_head_loss(*change(*case()))
