"""The Triton kernels of embed_norm against the float64 formula; frequent ids, ids outside a table, repeated bits."""

from __future__ import annotations

import packs
import pytest
import torch
from scfm.kernels import embed_norm as kernels
from scfm.kernels import table_grads

from scfm.ops.embed_norm import embed_norm_reference as reference

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-5
ROWS = [11, 7, 1, 5, 3, 4, 2, 6, 9]


def case(
    num_tokens=50, size=24, num_tables=3, *, dtype=torch.float32, addend=True, norm=True, index=torch.int64
):
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = ROWS[:num_tables]
    ids = [torch.randint(0, n, (num_tokens,), generator=generator).to(index) for n in rows]
    tables = [normal(n, size) for n in rows]
    weight, bias = (normal(size), normal(size)) if norm else (None, None)
    return ids, tables, normal(num_tokens, size) if addend else None, weight, bias, normal(num_tokens, size)


def on(device, arguments):
    return [
        [x.to(device) for x in a] if isinstance(a, list) else None if a is None else a.to(device)
        for a in arguments
    ]


def run(ids, tables, addend, weight, bias, upstream):
    """out, then the gradients of the tables and of all else that is given."""
    out, mean, rstd = kernels.forward(ids, tables, addend, weight, bias, EPS)
    assert bool(torch.isfinite(mean).all() and torch.isfinite(rstd).all())
    grads, *rest = kernels.backward(upstream, ids, tables, addend, weight, mean, rstd)
    assert [x is None for x in rest] == [addend is None, weight is None, weight is None]
    return [out, *grads, *(x for x in rest if x is not None)]


def by_formula(ids, tables, addend, weight, bias, upstream, dtype):
    given = [x.to(dtype) for x in (*tables, addend, weight, bias) if x is not None]

    def function(*given):
        given = list(given)
        used = [given.pop(0) for _ in tables]
        extra = None if addend is None else given.pop(0)
        scale, shift = given or (None, None)
        return reference(ids, used, scale, shift, addend=extra, eps=EPS)

    return [function(*given), *packs.gradients(function, given, upstream.to(dtype))]


def check(arguments, device):
    dtype = arguments[1][0].dtype
    found = run(*on(device, arguments))
    same, exact = (by_formula(*arguments, kind) for kind in (dtype, torch.float64))
    assert found[0].dtype == dtype
    assert all(x.dtype == torch.float32 or arguments[3] is None for x in found[1:])
    for ours, plain, wanted in zip(found, same, exact, strict=True):
        packs.check_as_exact_as_torch(ours.cpu().to(dtype), plain, wanted)


@pytest.mark.parametrize("num_tables", [1, 2, 3, 4])
@pytest.mark.parametrize("addend", [False, True], ids=["alone", "addend"])
@pytest.mark.parametrize(
    ("norm", "dtype"),
    [(True, torch.float32), (True, torch.bfloat16), (True, torch.float16), (False, torch.bfloat16)],
    ids=str,
)
def test_equals_the_formula(num_tables, addend, norm, dtype, device):
    check(case(37, num_tables=num_tables, addend=addend, norm=norm, dtype=dtype), device)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 63, 64, 65, 131])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_numbers_of_tokens(num_tokens, index, device):
    check(case(num_tokens, 20, 2, index=index), device)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 127, 128, 257, 768, 2050])
def test_widths(size, device):
    check(case(9, size, 2, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("num_tables", [5, 9])
def test_more_tables_than_a_launch_takes(num_tables, device):
    check(case(20, num_tables=num_tables, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("norm", [False, True], ids=["sum", "norm"])
def test_frequent_ids(norm, device):
    """128 tokens of an id are added by one program; one more, and 600, are cut into chunks."""
    counts = [128, 129, 600, 1, 0, 256]
    ids, _, addend, weight, bias, upstream = case(sum(counts), 20, 1, norm=norm, addend=False)
    shuffled = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    ids = [shuffled[torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(1))]]
    table = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    check((ids, [table], addend, weight, bias, upstream), device)


def test_strided_inputs(device):
    ids, tables, addend, weight, bias, upstream = case(40)
    ids = [torch.stack([x, x - 1], 1)[:, 0] for x in ids]
    tables = [torch.cat([x, x], 1)[:, : x.shape[1]] for x in tables]
    addend, upstream = (x.T.contiguous().T for x in (addend, upstream))
    check((ids, tables, addend, weight, bias, upstream), device)


def test_a_token_outside_its_table_is_nan_and_nothing_is_read_there(device):
    ids, tables, addend, weight, bias, _ = on(device, case(30))
    right, *_ = kernels.forward(ids, tables, addend, weight, bias, EPS)
    ids[1][4], ids[0][7], ids[2][9] = 7, -1, 2**40
    found, *_ = kernels.forward(ids, tables, addend, weight, bias, EPS)
    wrong = torch.zeros(30, dtype=torch.bool, device=device)
    wrong[[4, 7, 9]] = True
    assert bool(found[wrong].isnan().all())
    assert torch.equal(found[~wrong], right[~wrong])


def test_a_token_and_an_id_do_not_feel_the_others(device):
    """Bit for bit: a token in a part of its batch; an id's gradient, whatever tokens of other ids lie between."""
    ids, tables, addend, weight, bias, upstream = on(device, case(300, 20))
    whole = kernels.forward(ids, tables, addend, weight, bias, EPS)
    part = kernels.forward([x[7:40] for x in ids], tables, addend[7:40], weight, bias, EPS)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[7:40], b)
    ids = torch.arange(300, device=device) % 2  # 150 tokens each: cut into two chunks
    both = table_grads.table_gradient(upstream, ids, 2)
    alone = table_grads.table_gradient(upstream[1::2].contiguous(), torch.zeros_like(ids[1::2]), 1)
    assert torch.equal(both[1], alone[0])


def test_gradients_are_the_same_every_time(device):
    arguments = on(device, case(400, 20))
    assert all(torch.equal(a, b) for a, b in zip(run(*arguments), run(*arguments), strict=True))
