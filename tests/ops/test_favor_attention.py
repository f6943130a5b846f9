"""favor_attention against the formula with its feature maps: key maxima, gradients through them, memory."""

from __future__ import annotations

import pytest
import torch
from packs import LENGTHS, check_as_exact_as_torch, gradients, heads, offsets

from scfm.errors import InvalidArgumentError
from scfm.ops import favor_attention, favor_attention_reference, use_path


def case(lengths, dtype=torch.float64, dim=16, features=23):
    generator = torch.Generator().manual_seed(9)
    projection = torch.randn(features, dim, generator=generator, dtype=torch.float64)
    return *heads(sum(lengths), head_dim=dim, dtype=dtype), projection.to(dtype), offsets(lengths)


@pytest.mark.parametrize("scope", ["cell", "batch"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_formula(lengths, dtype, scope) -> None:
    q, k, v, upstream, projection, cu_seqlens = case(lengths, dtype)

    def reference(*x):
        return favor_attention_reference(*x, projection.to(x[0].dtype), cu_seqlens, kmax_scope=scope)

    def ours(*x):
        return favor_attention(*x, projection, cu_seqlens, kmax_scope=scope)

    wide = [x.double() for x in (q, k, v)]
    out = ours(q, k, v)
    assert out.dtype == dtype
    check_as_exact_as_torch(out, reference(q, k, v), reference(*wide))
    pairs = zip(gradients(ours, (q, k, v), upstream), gradients(reference, (q, k, v), upstream), strict=True)
    for (mine, same), exact in zip(pairs, gradients(reference, wide, upstream.double()), strict=True):
        # A cell of one token has no gradient but noise, which the maximum gathers from all of them.
        check_as_exact_as_torch(mine, same, exact, slack=1e-5)


@pytest.mark.parametrize("path", ["native", "torch"])
def test_a_cell_does_not_depend_on_its_batch(path) -> None:
    q, k, v, _, projection, cu_seqlens = case([40, 17, 90], torch.float32)
    k[57:] *= 3  # a neighbour with larger keys
    with use_path("favor_attention", path):
        whole = favor_attention(q, k, v, projection, cu_seqlens)[40:57]
        alone = favor_attention(q[40:57], k[40:57], v[40:57], projection, offsets([17]))
        batch = favor_attention(q, k, v, projection, cu_seqlens, kmax_scope="batch")[40:57]
    assert torch.equal(whole, alone)
    assert not torch.allclose(whole, batch, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["cell", "batch"])
def test_gradcheck_through_both_maxima(scope) -> None:
    q, k, v, _, projection, cu_seqlens = case([3, 0, 5, 1], dim=4, features=6)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: favor_attention(*x, projection, cu_seqlens, kmax_scope=scope), inputs
    )


def test_large_keys_do_not_overflow() -> None:
    q, k, v, _, projection, cu_seqlens = case([30], torch.float32)
    big = 12 * k  # exponents down to -thousands: every feature but the largest is eps
    out = favor_attention(q, big, v, projection, cu_seqlens)
    exact = favor_attention_reference(*(x.double() for x in (q, big, v, projection)), cu_seqlens)
    same = favor_attention_reference(q, big, v, projection, cu_seqlens)
    check_as_exact_as_torch(out, same, exact)


def test_approximates_softmax_attention_as_features_grow() -> None:
    q, k, v, _, _, cu_seqlens = case([60])
    q, k = q / 2, k / 2  # the estimate's variance grows with the exponential of their norms
    generator = torch.Generator().manual_seed(0)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v))
    ).transpose(0, 1)
    errors = []
    for features in (16, 4096):
        projection = torch.randn(features, 16, generator=generator, dtype=torch.float64)
        errors.append(
            (favor_attention(q, k, v, projection, cu_seqlens, eps=1e-9) - exact).norm() / exact.norm()
        )
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda q, w: (q, w[:, :3]),
        lambda q, w: (q, w.requires_grad_()),
        lambda q, w: (q[:-1], w),
    ],
)
def test_what_does_not_fit_is_refused(change) -> None:
    q, k, v, _, projection, cu_seqlens = case([3, 4])
    changed, projection = change(q, projection)
    with pytest.raises(InvalidArgumentError):
        favor_attention(changed, k, v, projection, cu_seqlens)


def test_scopes_are_named() -> None:
    q, k, v, _, projection, cu_seqlens = case([3, 4])
    with pytest.raises(InvalidArgumentError, match='expected "cell" or "batch"'):
        favor_attention(q, k, v, projection, cu_seqlens, kmax_scope="world")  # type: ignore[arg-type]
