"""favor_forward and favor_backward against the formula in float64, on every instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scfm import _native as native
from scfm.ops import favor_attention_reference
from scfm.ops.favor_attention import _torch_backward, _torch_forward

if not hasattr(native, "favor_forward"):
    pytest.skip("the native module has no favor_forward", allow_module_level=True)

EPS = 1e-4
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LENGTHS = [
    [],
    [0, 0],
    [1],
    [0, 1, 0, 2, 3],
    [47, 48, 49],
    [5, 6, 7, 95, 96, 97, 0, 13],
    [1] * 30 + [211],
]


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The oracle's products are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(
    lengths: Sequence[int], dtype: Any, heads: int = 2, dim: int = 16, features: int = 23, gain: float = 1.0
):
    """q, k, v as views of one packed tensor, the upstream gradient, projection and offsets."""
    generator = torch.Generator().manual_seed(7 + sum(lengths) + dim)
    packed = torch.randn(sum(lengths), 3, heads, dim, generator=generator)
    packed[:, :2] *= gain
    q, k, v = packed.to(dtype).unbind(1)
    upstream = torch.randn(q.shape, generator=generator).to(dtype)
    projection = torch.randn(features, dim, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return q, k, v, upstream, projection, cu_seqlens


def array(x: Any) -> Any:
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def poisoned(shape: Sequence[int], dtype: Any = torch.float32) -> Any:
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def forward(q, k, v, projection, cu_seqlens, key_max=None, eps=EPS):
    out = poisoned(q.shape, q.dtype)
    used = poisoned([len(cu_seqlens) - 1]) if key_max is None else key_max
    arrays = [array(x) for x in (q, k, v, projection, out, used)]
    native.favor_forward(*arrays, key_max is not None, array(cu_seqlens), eps)
    return out, used


def backward(upstream, q, k, v, projection, cu_seqlens, key_max, given, eps=EPS):
    grads = [poisoned(q.shape, q.dtype) for _ in range(3)]
    max_grad = poisoned([len(cu_seqlens) - 1])
    arrays = [array(x) for x in (upstream, q, k, v, projection, *grads, key_max)]
    native.favor_backward(*arrays, given, array(max_grad), array(cu_seqlens), eps)
    return *grads, max_grad


def check(ours: Any, same: Any, exact: Any, scale: float) -> None:
    """At most twice the error of torch in the same dtype, in the largest and (of many) in the mean.

    scale: the size of the terms that may cancel in the result.
    """
    assert ours.shape == exact.shape
    assert torch.isfinite(ours).all()
    if not ours.numel():
        return
    mine, theirs = ((x.double() - exact).abs() for x in (ours, same))
    assert mine.max() <= 2 * theirs.max() + 1e-6 * scale
    if ours.numel() > 100:
        assert mine.mean() <= 2 * theirs.mean() + 1e-7 * scale


def size_of(x: Any) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def same_dtype_formula(q, k, v, projection, cu_seqlens, key_max, eps):
    """The formula as written, every step in the inputs' dtype, with each cell's maximum given or its own."""
    if key_max is None:
        return favor_attention_reference(q, k, v, projection, cu_seqlens, eps=eps)
    out, c = torch.zeros_like(q), q.shape[-1] ** -0.25
    for cell, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        queries, keys = (c * x[start:stop] for x in (q, k))
        a_q, a_k = queries @ projection.T, keys @ projection.T
        n_q, n_k = (x.square().sum(-1, keepdim=True) / 2 for x in (queries, keys))
        q_features = torch.exp(a_q - n_q - a_q.amax(-1, keepdim=True)) + eps
        k_features = torch.exp(a_k - n_k - key_max[cell].to(q.dtype)) + eps
        context = torch.einsum("jhf,jhd->hfd", k_features, v[start:stop])
        norm = torch.einsum("ihf,hf->ih", q_features, k_features.sum(0))
        out[start:stop] = torch.einsum("ihf,hfd->ihd", q_features, context) / norm.unsqueeze(-1)
    return out


def check_case(q, k, v, upstream, projection, cu_seqlens, given: bool = False, eps: float = EPS) -> None:
    key_max = None
    if given:
        key_max = torch.linspace(1.0, 4.0, len(cu_seqlens) - 1)
    wide = [x.double() for x in (q, k, v, projection)]
    exact, exact_max = _torch_forward(
        *wide, cu_seqlens, key_max if key_max is None else key_max.double(), eps
    )
    low = projection.to(q.dtype)
    same = same_dtype_formula(q, k, v, low, cu_seqlens, key_max, eps)
    out, used = forward(q, k, v, projection, cu_seqlens, key_max, eps)
    check(out, same, exact, size_of(v))
    filled = cu_seqlens.diff() > 0
    # Products of pairs round the projection to bfloat16, and the maximum is that of the features as computed.
    loose = 2**-8 if q.dtype == torch.bfloat16 and native.active_isa() == "avx512_bf16" else 2e-6
    torch.testing.assert_close(used[filled].double(), exact_max[filled], rtol=loose, atol=loose)
    if not given:
        assert (used[~filled] == -torch.inf).all()
    exact_grads = _torch_backward(upstream.double(), *wide, cu_seqlens, exact_max, given, eps)
    same_grads = _torch_backward(upstream, q, k, v, projection, cu_seqlens, used.clone(), given, eps)
    ours = backward(upstream, q, k, v, projection, cu_seqlens, used, given, eps)
    for mine, theirs, truth in zip(ours[:3], same_grads, exact_grads, strict=False):
        check(mine, theirs, truth, max(size_of(x) for x in exact_grads[:3]))
    # The maximum's gradient sums what every token and feature has of it: nearly all cancels.
    check(ours[3], same_grads[3], exact_grads[3], (upstream.double() * exact).abs().sum().item())


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}cells{sum(x)}")
@pytest.mark.parametrize("given", [False, True], ids=["own_maximum", "given_maximum"])
def test_equals_the_formula(isa: str, lengths, dtype, given) -> None:
    check_case(*make(lengths, dtype), given=given)


@DTYPES
@pytest.mark.parametrize(
    ("dim", "features"),
    [(1, 1), (3, 7), (8, 16), (15, 17), (17, 31), (33, 48), (64, 266), (80, 5), (256, 129)],
)
def test_every_head_dim_and_number_of_features(isa: str, dim, features, dtype) -> None:
    check_case(*make([50, 0, 9], dtype, dim=dim, features=features, gain=min(1.0, 16 / dim**0.5 / 4)))


FLOAT_GAINS = [(torch.float32, gain) for gain in (0.0, 0.2, 2.0, 6.0, 40.0)]
PAIR_GAINS = [(torch.bfloat16, gain) for gain in (0.0, 0.2, 2.0)]  # above, bfloat16's formula is no measure


@pytest.mark.parametrize(("dtype", "gain"), FLOAT_GAINS + PAIR_GAINS)
def test_from_flat_keys_to_nothing_but_eps(isa: str, dtype, gain) -> None:
    check_case(*make([130, 7], dtype, gain=gain))


@DTYPES
def test_features_that_rise_beyond_all_before(isa: str, dtype) -> None:
    """Maxima that climb by 2^40 from block to block, and in the middle of one: sums follow without overflowing."""
    q, k, v, _, projection, cu_seqlens = make([150], dtype, heads=1, dim=8, features=9)
    k = (k.float() * 0.1 + torch.linspace(0, 40, 150).floor()[:, None, None] * projection[0]).to(dtype)
    out, used = forward(q, k, v, projection, cu_seqlens)
    exact, exact_max = _torch_forward(*(x.double() for x in (q, k, v, projection)), cu_seqlens, None, EPS)
    assert float(exact_max) > 100
    torch.testing.assert_close(used.double(), exact_max, rtol=2**-8, atol=0.0)
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)


def test_small_eps_shows_the_whole_exponential(isa: str) -> None:
    """With eps at the bottom of float32 even features of e^-60 decide the result."""
    q, k, v, upstream, projection, cu_seqlens = make([40], torch.float32, heads=1, dim=4, features=9)
    k = k * torch.linspace(0.1, 5, 40)[:, None, None]
    check_case(q, k, v, upstream, projection, cu_seqlens, eps=1e-36)


@DTYPES
def test_a_long_cell_is_merged_from_spans(isa: str, dtype) -> None:
    """Above 4,096 tokens a head's sums come from several spans, here with maxima that rise towards the end."""
    q, k, v, upstream, projection, cu_seqlens = make([9001, 4097], dtype, heads=2, dim=5, features=6)
    k = k * torch.linspace(0.3, 1.5, len(k))[:, None, None].to(dtype)
    check_case(q, k, v, upstream, projection, cu_seqlens)


def test_maximum_among_ties_is_the_lowest_token_then_head(isa: str) -> None:
    q, k, v, upstream, projection, cu_seqlens = make([5000], torch.float32, heads=2, dim=4, features=5)
    projection[1] = projection[3] = torch.tensor([3.0, 0, 0, 0])  # equal features
    k[[17, 4500]] = torch.tensor([4.5, 0, 0, 0])  # equal tokens, in different spans, with equal heads
    exact_max = _torch_forward(*(x.double() for x in (q, k, v, projection)), cu_seqlens, None, EPS)[1].float()
    own = backward(upstream, q, k, v, projection, cu_seqlens, exact_max, False)
    given = backward(upstream, q, k, v, projection, cu_seqlens, exact_max, True)
    for mine, theirs in zip(own[::2], given[::2], strict=True):
        assert torch.equal(mine, theirs)
    moved = (own[1] - given[1]).flatten(1).abs().amax(1).nonzero().flatten()
    assert moved.tolist() == [17]
    expected = given[1][17, 0] + own[3] * projection[1] * 4**-0.25
    torch.testing.assert_close(own[1][17, 0], expected)
    assert torch.equal(own[1][17, 1], given[1][17, 1])


@DTYPES
def test_a_cell_depends_on_nothing_else(isa: str, dtype) -> None:
    """Bit for bit the same alone, in another order, and on any number of threads."""
    lengths = [300, 0, 1, 4500, 17]
    q, k, v, upstream, projection, cu_seqlens = make(lengths, dtype, dim=8, features=11)

    def both(rows, offsets):
        part = [x[rows] for x in (q, k, v)]
        out, used = forward(*part, projection, offsets)
        return out, used, *backward(upstream[rows], *part, projection, offsets, used, False)

    native.set_num_threads(1)
    whole = both(slice(None), cu_seqlens)
    native.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(whole, both(slice(None), cu_seqlens), strict=True))
    for cell, (start, stop) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        if start == stop:
            continue
        alone = both(slice(start, stop), torch.tensor([0, stop - start], dtype=torch.int32))
        for i, (a, b) in enumerate(zip(whole, alone, strict=True)):
            assert torch.equal(a[[cell]] if i in (1, 5) else a[start:stop], b)


def test_many_cells_pass_through_in_groups(isa: str) -> None:
    """More sums than are kept in memory at once."""
    lengths = [1, 2, 3] * 40
    check_case(*make(lengths, torch.float32, heads=4, dim=64, features=266, gain=0.5))


@DTYPES
def test_not_a_number_stays_visible(isa: str, dtype) -> None:
    q, k, v, _, projection, cu_seqlens = make([60, 5], dtype)
    q, k = q.clone(), k.clone()
    q[3, 1, 2] = torch.nan
    k[62, 0, 0] = torch.nan
    out, _ = forward(q, k, v, projection, cu_seqlens)
    assert out[3, 1].isnan().all()
    assert out[60:, 0].isnan().all()
    assert out[:3].isfinite().all()
    assert out[4:60].isfinite().all()


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "k: another shape": lambda a: a.update(k=a["k"][:-1]),
    "v: another dtype": lambda a: a.update(v=a["v"].astype(np.int16)),
    "out: read-only": lambda a: a["out"].setflags(write=False),
    "projection: head_dim": lambda a: a.update(projection=a["projection"][:, :-1].copy()),
    "projection: no features": lambda a: a.update(projection=a["projection"][:0]),
    "projection: 1-d": lambda a: a.update(projection=a["projection"].ravel()),
    "projection: not contiguous": lambda a: a.update(projection=np.asfortranarray(a["projection"])),
    "key_max: cells": lambda a: a.update(key_max=a["key_max"][:-1]),
    "cu_seqlens: does not end": lambda a: a.update(cu_seqlens=a["cu_seqlens"] - 1),
    "cu_seqlens: int64": lambda a: a.update(cu_seqlens=a["cu_seqlens"].astype(np.int64)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(wrong) -> None:
    q, k, v, _, projection, cu_seqlens = make([3, 4], torch.float32)
    names = ("q", "k", "v", "projection", "out", "key_max")
    tensors = (q, k, v, projection, poisoned(q.shape), poisoned([2]))
    arguments: dict[str, Any] = {name: array(x) for name, x in zip(names, tensors, strict=True)}
    arguments |= {"given_max": False, "cu_seqlens": array(cu_seqlens), "eps": EPS}
    WRONG[wrong](arguments)
    with pytest.raises((TypeError, ValueError), match=r"favor_(forward|attention): "):
        native.favor_forward(**arguments)


def test_head_dim_above_256_is_refused() -> None:
    q, k, v, _, projection, cu_seqlens = make([2], torch.float32, dim=257)
    with pytest.raises(ValueError, match="expected 1 to 256"):
        forward(q, k, v, projection, cu_seqlens)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_reads_and_writes_nothing_out_of_bounds(isa: str) -> None:
    script = Path(__file__).with_name("guard_page_probe_favor.py")
    environment = {**os.environ, "SCFM_ISA": isa}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"
