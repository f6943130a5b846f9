"""varlen_attention against its float64 formula: hostile lengths, gradients, isolation of cells, dtypes."""

from __future__ import annotations

import pytest
import torch

from scfm.errors import InvalidArgumentError
from scfm.ops import varlen_attention, varlen_attention_reference
from scfm.ops.varlen_attention import gradients_by_formula, log_sum_exp

LENGTHS = [
    [1],
    [0, 3, 0],
    [37, 64, 5, 130, 1],
    [127, 128, 129],
    [1] * 40,
    [257, 2, 0, 1],
    [],
]


def packed(lengths: list[int], heads: int = 2, dim: int = 16, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q.to(dtype), k.to(dtype), v.to(dtype), cu_seqlens


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_formula(lengths: list[int], dtype: torch.dtype) -> None:
    q, k, v, cu_seqlens = packed(lengths, dtype=dtype)
    out = varlen_attention(q, k, v, cu_seqlens)
    exact = varlen_attention_reference(q.double(), k.double(), v.double(), cu_seqlens)
    assert out.dtype == dtype and out.shape == q.shape
    if not out.numel():
        return
    error = (out.double() - exact).abs().max()
    same_dtype = varlen_attention_reference(q, k, v, cu_seqlens)
    bound = 2 * (same_dtype.double() - exact).abs().max() + 1e-14
    assert error <= bound


def test_scale_is_used() -> None:
    q, k, v, cu_seqlens = packed([9, 4])
    ours = varlen_attention(q, k, v, cu_seqlens, scale=0.7)
    torch.testing.assert_close(ours, varlen_attention_reference(q, k, v, cu_seqlens, scale=0.7))
    assert not torch.allclose(ours, varlen_attention(q, k, v, cu_seqlens))


def test_one_query_a_cell() -> None:
    q, k, v, cu_seqlens = packed([7, 1, 130])
    first = q[cu_seqlens[:-1].long()]
    one_each = torch.arange(4, dtype=torch.int32)
    ours = varlen_attention(first, k, v, cu_seqlens, cu_seqlens_q=one_each)
    whole = varlen_attention_reference(q, k, v, cu_seqlens)
    torch.testing.assert_close(ours, whole[cu_seqlens[:-1].long()])


def test_gradients() -> None:
    q, k, v, cu_seqlens = packed([3, 0, 5, 1], heads=2, dim=4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda a, b, c: varlen_attention(a, b, c, cu_seqlens), inputs)


def test_gradients_where_queries_are_apart() -> None:
    q, k, v, cu_seqlens = packed([3, 5], heads=1, dim=4)
    first = q[cu_seqlens[:-1].long()].clone()
    one_each = torch.arange(3, dtype=torch.int32)
    inputs = [x.requires_grad_() for x in (first, k, v)]
    assert torch.autograd.gradcheck(
        lambda a, b, c: varlen_attention(a, b, c, cu_seqlens, cu_seqlens_q=one_each), inputs
    )


def test_the_formula_used_off_the_cpu_gives_the_same_gradients() -> None:
    q, k, v, cu_seqlens = packed([300], heads=2, dim=8)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(300, 2, 8, dtype=torch.float64)
    exact = torch.autograd.grad(varlen_attention_reference(*inputs, cu_seqlens, scale=0.3), inputs, upstream)
    formula = gradients_by_formula(upstream, *(x.detach() for x in inputs), 0.3)
    for ours, want in zip(formula, exact, strict=True):
        torch.testing.assert_close(ours, want)


def test_cells_never_see_each_other() -> None:
    q, k, v, cu_seqlens = packed([40, 17, 90], dtype=torch.float32)
    alone = varlen_attention(q[40:57], k[40:57], v[40:57], torch.tensor([0, 17], dtype=torch.int32))
    assert torch.equal(varlen_attention(q, k, v, cu_seqlens)[40:57], alone)


def test_strided_views_are_read_right() -> None:
    _, _, _, cu_seqlens = packed([5, 12])
    qkv = torch.randn(17, 3, 2, 8, dtype=torch.float64)
    q, k, v = qkv.unbind(1)
    ours = varlen_attention(q, k, v, cu_seqlens)
    torch.testing.assert_close(ours, varlen_attention_reference(q.clone(), k.clone(), v.clone(), cu_seqlens))


def test_torch_knows_the_operator() -> None:
    q, k, v, cu_seqlens = packed([3, 4], dtype=torch.float32)
    q.requires_grad_()
    torch.library.opcheck(torch.ops.scfm.varlen_attention.default, (q, k, v, cu_seqlens, cu_seqlens, 0.25))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, c: (q[:, :1], k, v, c),
        lambda q, k, v, c: (q, k[:-1], v, c),
        lambda q, k, v, c: (q.float(), k, v, c),
        lambda q, k, v, c: (q, k, v, c + 1),
        lambda q, k, v, c: (q, k, v, c[:-1]),
        lambda q, k, v, c: (q, k, v, torch.tensor([0, 9, 3, 12], dtype=torch.int32)),
    ],
)
def test_what_does_not_fit_is_refused(change) -> None:
    q, k, v, cu_seqlens = packed([3, 4, 5])
    with pytest.raises(InvalidArgumentError):
        varlen_attention(*change(q, k, v, cu_seqlens))


@pytest.mark.parametrize("length", [1, 255, 257, 600])
def test_log_sum_exp_in_blocks_is_that_of_the_whole(length: int) -> None:
    q, k, _, _ = packed([length])
    found = log_sum_exp(q.transpose(0, 1), k.transpose(0, 1), 0.3)
    torch.testing.assert_close(found, torch.logsumexp(torch.einsum("ihd,jhd->hij", q, k) * 0.3, -1))
