"""generative_attention against its dense mask: every count of known genes, gradients, isolation of cells."""

from __future__ import annotations

import pytest
import torch
from packs import check_as_exact_as_torch, gradients, heads, offsets

from scfm.errors import InvalidArgumentError
from scfm.ops import generative_attention, generative_attention_reference, varlen_attention

CASES = [
    ([], []),
    ([1, 1], [0, 1]),
    ([5, 0, 9], [0, 0, 9]),
    ([37, 64, 130, 1], [20, 64, 65, 0]),
    ([127, 128, 129], [64, 1, 128]),
    ([3] * 30, [0, 1, 2] * 10),
]


def case(lengths, known, dtype=torch.float64, dim=16):
    return (
        *heads(sum(lengths), head_dim=dim, dtype=dtype),
        offsets(lengths),
        torch.tensor(known, dtype=torch.int32),
    )


@pytest.mark.parametrize(("lengths", "known"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_dense_mask(lengths, known, dtype) -> None:
    q, k, v, upstream, cu_seqlens, num_known = case(lengths, known, dtype)

    def reference(*x):
        return generative_attention_reference(*x, cu_seqlens, num_known)

    wide = [x.double() for x in (q, k, v)]
    out = generative_attention(q, k, v, cu_seqlens, num_known)
    assert out.dtype == dtype
    check_as_exact_as_torch(out, reference(q, k, v), reference(*wide))
    ours = gradients(lambda *x: generative_attention(*x, cu_seqlens, num_known), (q, k, v), upstream)
    same = gradients(reference, (q, k, v), upstream)
    for ours_one, same_one, exact in zip(
        ours, same, gradients(reference, wide, upstream.double()), strict=True
    ):
        check_as_exact_as_torch(ours_one, same_one, exact)


def test_all_known_is_full_attention() -> None:
    q, k, v, _, cu_seqlens, num_known = case([40, 7], [40, 7])
    torch.testing.assert_close(
        generative_attention(q, k, v, cu_seqlens, num_known), varlen_attention(q, k, v, cu_seqlens)
    )


def test_a_cell_of_unknown_genes_sees_each_gene_alone() -> None:
    q, k, v, _, cu_seqlens, num_known = case([6], [0])
    torch.testing.assert_close(generative_attention(q, k, v, cu_seqlens, num_known), v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_unknown_gene_does_not_depend_on_the_other_unknown_ones(dtype) -> None:
    q, k, v, _, cu_seqlens, num_known = case([50], [20], dtype)
    whole = generative_attention(q, k, v, cu_seqlens, num_known)
    k[30:], v[30:] = 7.0, -3.0
    changed = generative_attention(q, k, v, cu_seqlens, num_known)
    assert torch.equal(whole[:30], changed[:30])
    assert not torch.equal(whole[30:], changed[30:])


def test_cells_never_see_each_other() -> None:
    q, k, v, _, cu_seqlens, num_known = case([40, 17, 90], [11, 9, 80], torch.float32)
    alone = generative_attention(q[40:57], k[40:57], v[40:57], offsets([17]), num_known[1:2])
    assert torch.equal(generative_attention(q, k, v, cu_seqlens, num_known)[40:57], alone)


def test_gradcheck() -> None:
    q, k, v, _, cu_seqlens, num_known = case([3, 0, 5, 1], [2, 0, 0, 1], dim=4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: generative_attention(*x, cu_seqlens, num_known), inputs)


@pytest.mark.parametrize("known", [[-1, 2], [2, 5], [2], [1, 2, 3]], ids=str)
def test_counts_that_do_not_fit_are_refused(known) -> None:
    q, k, v, _, cu_seqlens, _ = case([3, 4], [0, 0])
    with pytest.raises(InvalidArgumentError, match="num_known"):
        generative_attention(q, k, v, cu_seqlens, torch.tensor(known, dtype=torch.int32))


def test_counts_must_be_int32() -> None:
    q, k, v, _, cu_seqlens, _ = case([3, 4], [0, 0])
    with pytest.raises(InvalidArgumentError, match="num_known"):
        generative_attention(q, k, v, cu_seqlens, torch.tensor([1, 2]))
