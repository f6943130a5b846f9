"""The kernels of embed_norm against float64, by instruction set and storage type."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scfm import _native as native

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = [torch.float32, torch.bfloat16]
ROWS = (11, 700, 1, 5)  # of the tables


def array(tensor: Tensor) -> Array:
    view: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return view


class Case:
    """Inputs and, poisoned, room for every result."""

    def __init__(
        self,
        num_tokens: int,
        size: int,
        dtype: torch.dtype,
        *,
        tables: int = 2,
        addend: bool = True,
        norm: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(7)

        def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(kind)

        self.ids = [torch.randint(0, n, (num_tokens,), generator=generator) for n in ROWS[:tables]]
        self.ids[0] = self.ids[0].int()
        self.tables = [normal(n, size) for n in ROWS[:tables]]
        self.addend = normal(num_tokens, size) if addend else None
        self.weight, self.bias = (normal(size, kind=torch.float32) if norm else None for _ in range(2))
        self.upstream = normal(num_tokens, size)

    def inputs(self) -> list[Tensor]:
        return [x for x in (*self.tables, self.addend, self.weight, self.bias) if x is not None]

    def native(self) -> list[Tensor]:
        """out, then gradients in the order of inputs()."""
        size = self.tables[0].shape[1]
        out, mean, rstd = (
            torch.full(shape, math.nan, dtype=dtype)
            for shape, dtype in (
                (self.upstream.shape, self.upstream.dtype),
                (self.upstream.shape[:1], torch.float32),
                (self.upstream.shape[:1], torch.float32),
            )
        )
        ids, tables = [array(x) for x in self.ids], [array(x) for x in self.tables]
        addend, weight, bias = (
            None if x is None else array(x) for x in (self.addend, self.weight, self.bias)
        )
        native.embed_norm_forward(
            ids, tables, addend, weight, bias, array(out), array(mean), array(rstd), 1e-5
        )
        d_tables = [torch.full(x.shape, math.nan) for x in self.tables]
        d_addend = None if self.addend is None else torch.full_like(self.addend, math.nan)
        d_norm = [] if self.weight is None else [torch.full((size,), math.nan) for _ in range(2)]
        native.embed_norm_backward(
            array(self.upstream),
            ids,
            tables,
            addend,
            weight,
            array(mean),
            array(rstd),
            [array(x) for x in d_tables],
            None if d_addend is None else array(d_addend),
            *([array(x) for x in d_norm] or (None, None)),
        )
        return [out, *d_tables, *([] if d_addend is None else [d_addend]), *d_norm]

    def formula(self, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().clone().to(dtype).requires_grad_() for x in self.inputs()]
        rest = leaves[len(self.tables) :]
        x = sum(table[ids.long()] for table, ids in zip(leaves, self.ids, strict=False))
        x = x + rest.pop(0) if self.addend is not None else x
        out = torch.nn.functional.layer_norm(x, x.shape[1:], *rest, eps=1e-5) if rest else x
        return [out.detach(), *torch.autograd.grad(out, leaves, self.upstream.to(dtype))]


def check(case: Case) -> None:
    """Every result's error is at most twice that of torch in the same dtype."""
    plain, exact = case.formula(case.upstream.dtype), case.formula(torch.float64)
    for number, (ours, torchs, want) in enumerate(zip(case.native(), plain, exact, strict=True)):
        assert ours.shape == want.shape and bool(torch.isfinite(ours).all()), number
        if want.numel():
            allowed = 2 * (torchs.double() - want).abs().max() + 2e-6 * max(1.0, float(want.abs().max()))
            assert (ours.double() - want).abs().max() <= allowed, number


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 63, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_tokens(isa: str, num_tokens: int, dtype: torch.dtype) -> None:
    check(Case(num_tokens, 48, dtype))


@pytest.mark.parametrize("size", [2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 130, 257, 768])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size(isa: str, size: int, dtype: torch.dtype) -> None:
    check(Case(70, size, dtype))


@pytest.mark.parametrize("tables", [1, 2, 3, 4])
@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_parts(isa: str, tables: int, addend: bool, norm: bool, dtype: torch.dtype) -> None:
    check(Case(90, 40, dtype, tables=tables, addend=addend, norm=norm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_tokens_than_a_chunk(isa: str, dtype: torch.dtype) -> None:
    check(Case(4096 + 130, 24, dtype, tables=3))


def test_a_size_of_one_is_all_bias(isa: str) -> None:
    case = Case(9, 1, torch.float32)
    out, *grads = case.native()
    assert case.bias is not None and torch.equal(out, case.bias.expand(9, 1))
    assert all(not x.any() for x in grads[:-1]) and bool(torch.isfinite(grads[-1]).all())


def test_large_means_do_not_drown_the_variance(isa: str) -> None:
    case = Case(40, 300, torch.float32, tables=1, addend=False)
    case.tables[0] += 100.0
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    case = Case(5000, 72, dtype, tables=3)
    native.set_num_threads(1)
    first = case.native()
    native.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(first, case.native(), strict=True))


def test_rows_of_an_id_are_summed_in_the_order_of_tokens(isa: str) -> None:
    case = Case(4500, 16, torch.float32, tables=1, addend=False, norm=False)
    found = case.native()[1]
    expected = np.zeros((ROWS[0], 16), np.float32)
    for token, row in enumerate(case.ids[0].tolist()):
        expected[row] += case.upstream[token].numpy()
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("bad", [-1, 700, 2**40])
def test_ids_outside_a_table_are_named_before_anything_is_written(bad: int) -> None:
    case = Case(20, 8, torch.float32)
    case.ids[1][13] = bad
    ids, tables = [array(x) for x in case.ids], [array(x) for x in case.tables]
    out, mean, rstd = torch.full((20, 8), 5.0), torch.full((20,), 5.0), torch.full((20,), 5.0)
    message = rf"ids\[1\]\[13\] = {bad} is out of range for the 700 rows of table 1"
    with pytest.raises(ValueError, match="embed_norm_forward: " + message):
        native.embed_norm_forward(ids, tables, None, None, None, *map(array, (out, mean, rstd)), 1e-5)
    grads = [torch.full_like(x, 5.0) for x in case.tables]
    with pytest.raises(ValueError, match="embed_norm_backward: " + message):
        native.embed_norm_backward(
            *(array(out), ids, tables, None, None, array(mean), array(rstd)),
            [array(x) for x in grads],
            None,
            None,
            None,
        )
    assert all(bool((x == 5.0).all()) for x in (out, mean, rstd, *grads))


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = Case(20, 8, torch.float32)
    ids, tables = [array(x) for x in case.ids], [array(x) for x in case.tables]
    rest = array(torch.zeros(20, 8)), np.zeros(20, np.float32), np.zeros(20, np.float32), 1e-5
    weight = np.ones(8, np.float32)
    with pytest.raises(ValueError, match="1 ids and 2 tables"):
        native.embed_norm_forward(ids[:1], tables, None, None, None, *rest)
    with pytest.raises(ValueError, match="given together"):
        native.embed_norm_forward(ids, tables, None, weight, None, *rest)
    with pytest.raises(ValueError, match="tables has the wrong shape"):
        native.embed_norm_forward(ids, [tables[0], tables[1][:, :7].copy()], None, None, None, *rest)
    with pytest.raises(ValueError, match="not contiguous"):
        native.embed_norm_forward(ids, [np.asfortranarray(tables[0]), tables[1]], None, None, None, *rest)
    with pytest.raises(TypeError, match="another dtype"):
        native.embed_norm_forward(ids, [tables[0], tables[1].astype(np.int16)], None, None, None, *rest)
    with pytest.raises(TypeError, match="ids has dtype"):
        native.embed_norm_forward([ids[0].astype(np.int16), ids[1]], tables, None, None, None, *rest)
    with pytest.raises(ValueError, match="ids have 19 entries"):
        native.embed_norm_forward([ids[0], ids[1][:19]], tables, None, None, None, *rest)


def test_no_instruction_set_reads_past_the_end_of_a_table(isa: str) -> None:
    """Arrays that end where forbidden memory begins; a process of its own, since a fault there is a signal."""
    if sys.platform == "win32":
        pytest.skip("needs mprotect")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "guard_page_probe_embed_norm.py")],
        env={**os.environ, "SCFM_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"signal or error {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "ok"
