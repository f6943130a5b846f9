"""embed_norm against its formula: tables, addend, no norm, gradients of repeated ids, ids outside a table."""

from __future__ import annotations

import pytest
import torch
from packs import check_as_exact_as_torch

from scfm.errors import InvalidArgumentError
from scfm.ops import embed_norm, embed_norm_reference, use_path


def case(num_tokens=50, size=24, num_tables=3, *, dtype=torch.float64, addend=True, norm=True):
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = [11, 7, 1, 5][:num_tables]
    ids = [torch.randint(0, n, (num_tokens,), generator=generator) for n in rows]
    tables = [normal(n, size) for n in rows]
    weight, bias = (normal(size), normal(size)) if norm else (None, None)
    return ids, tables, normal(num_tokens, size) if addend else None, weight, bias, normal(num_tokens, size)


def run(function, ids, tables, addend, weight, bias, upstream):
    """The output and the gradients of everything floating that is given."""
    given = [x for x in (*tables, addend, weight, bias) if x is not None]
    leaves = iter([x.detach().clone().requires_grad_() for x in given])
    copies = [None if x is None else next(leaves) for x in (*tables, addend, weight, bias)]
    count = len(tables)
    out = function(ids, copies[:count], *copies[count + 1 :], addend=copies[count], eps=1e-5)
    return out, torch.autograd.grad(out, [x for x in copies if x is not None], upstream)


@pytest.mark.parametrize("num_tables", [1, 2, 3, 4])
@pytest.mark.parametrize("addend", [False, True], ids=["alone", "addend"])
@pytest.mark.parametrize("norm", [False, True], ids=["sum", "norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_formula(num_tables, addend, norm, dtype) -> None:
    arguments = case(num_tables=num_tables, dtype=dtype, addend=addend, norm=norm)
    wide = [[x.double() for x in a] if i == 1 else a for i, a in enumerate(arguments[:2])]
    wide += [None if x is None else x.double() for x in arguments[2:]]
    out, grads = run(embed_norm, *arguments)
    same, same_grads = run(embed_norm_reference, *arguments)
    exact, exact_grads = run(embed_norm_reference, *wide)
    assert out.dtype == dtype
    check_as_exact_as_torch(out, same, exact)
    for ours, plain, want in zip(grads, same_grads, exact_grads, strict=True):
        assert ours.dtype == dtype
        check_as_exact_as_torch(ours, plain, want)


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 257])
def test_every_shape(num_tokens, size) -> None:
    arguments = case(num_tokens, size, dtype=torch.float32)
    with use_path("embed_norm", "torch"):
        plain, plain_grads = run(embed_norm, *arguments)
    out, grads = run(embed_norm, *arguments)
    for a, b in zip((out, *grads), (plain, *plain_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_gradients_are_the_same_every_time() -> None:
    arguments = case(5000, 32, dtype=torch.float32)
    first = run(embed_norm, *arguments)[1]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = run(embed_norm, *arguments)[1]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_token_does_not_depend_on_its_batch() -> None:
    ids, tables, addend, weight, bias, _ = case(dtype=torch.float32)
    whole = embed_norm(ids, tables, weight, bias, addend=addend)
    part = embed_norm([x[7:20] for x in ids], tables, weight, bias, addend=addend[7:20])
    assert torch.equal(whole[7:20], part)


def test_gradcheck() -> None:
    ids, tables, addend, weight, bias, _ = case(6, 4)
    inputs = [x.requires_grad_() for x in (*tables, addend, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *x: embed_norm(ids, x[:3], x[4], x[5], addend=x[3], eps=1e-5), inputs
    )


def test_ids_of_either_width() -> None:
    ids, tables, _, weight, bias, _ = case(dtype=torch.float32)
    narrow = [x.to(torch.int32) for x in ids]
    assert torch.equal(embed_norm(ids, tables, weight, bias), embed_norm(narrow, tables, weight, bias))


@pytest.mark.parametrize("wrong", [-1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_id_outside_its_table_is_named(wrong, dtype) -> None:
    ids, tables, _, weight, bias, _ = case(dtype=dtype)
    ids[1][3] = wrong
    with pytest.raises(InvalidArgumentError, match=r"ids\[1\].*table 1 has rows 0 to 6"):
        embed_norm(ids, tables, weight, bias)


@pytest.mark.parametrize(
    "change",
    [
        lambda i, t, w, b: (i[:2], t, w, b),
        lambda i, t, w, b: ([], [], w, b),
        lambda i, t, w, b: ([i[0], i[1][:-1], i[2]], t, w, b),
        lambda i, t, w, b: ([x.double() for x in i], t, w, b),
        lambda i, t, w, b: (i, [t[0], t[1].float(), t[2]], w, b),
        lambda i, t, w, b: (i, [t[0], t[1][:, :-1], t[2]], w, b),
        lambda i, t, w, b: (i, t, w[:-1], b),
        lambda i, t, w, b: (i, t, w, None),
    ],
)
def test_what_does_not_fit_is_refused(change) -> None:
    ids, tables, _, weight, bias, _ = case()
    with pytest.raises(InvalidArgumentError):
        embed_norm(*change(ids, tables, weight, bias))
