"""The check of `make test-gpu` can fail: operators that are wrong in every way it looks for, on the CPU."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from types import SimpleNamespace

import check
import examine
import numpy as np
import pytest
import rank
import rules
import torch
from cases import Call, Case, Pack

from scfm import _native, ops
from scfm.ops import paths

ASKED = examine.Asked("cpu", 0, ("float32",), ())
LENGTHS = [3, 0, 5]
CELLS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)


def formula(q, k, v, cells=CELLS):
    return ops.varlen_attention_reference(q, k, v, cells)


def lines_for(monkeypatch, operator) -> list[str]:
    """What the check says of an operator, beside the right formula: operator(q, k, v, cells)."""
    monkeypatch.setitem(paths._TABLE, "made_up", (paths.Path("ours", "made up", lambda tensor: None),))

    def make(dtype, device, generator) -> Call:
        qkv = torch.randn(8, 3, 2, 4, generator=generator).to(dtype)
        pack = Pack(*qkv.unbind(1), CELLS, torch.zeros(8, dtype=torch.int32), CELLS[1:])
        part = pack.cell(2)
        alone = (lambda q, k, v: operator(q, k, v, part.cu_seqlens), (part.q, part.k, part.v), pack.rows(2))
        upstream = torch.randn(pack.q.shape, generator=generator)
        return Call((pack.q, pack.k, pack.v), upstream, lambda *qkv: operator(*qkv, CELLS), formula, alone)

    case = Case("made_up", "a case", make)
    return list(examine._lines_of_case(case, "float32", ["ours"], ASKED))


def test_an_honest_operator_passes(monkeypatch) -> None:
    (line,) = lines_for(monkeypatch, formula)
    assert line.startswith("ok     made_up ours float32, a case: error 0.")
    assert line.endswith("the same bits twice and alone")


def slightly_wrong(q, k, v, cells):
    return formula(q, k, v, cells) * 1.001


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def wrong_gradient(q, k, v, cells):
    return formula(q, _WrongGradient.apply(k), v, cells)


def forgets_a_row(q, k, v, cells):
    out = formula(q, k, v, cells)
    left_out = torch.empty(1, *out.shape[1:])
    return torch.cat([out[:-1], left_out + 0 * out[-1:]]) if len(out) == 8 else out


_TURN = itertools.count()


def never_the_same(q, k, v, cells):
    return formula(q, k, v, cells) * (1 + 6e-8 * (next(_TURN) % 2))


def minds_its_company(q, k, v, cells):
    return formula(q, k, v, cells) * (1 + 6e-8 * (len(cells) > 2))


def sees_the_others(q, k, v, cells):
    return formula(q, k, v, cells) + 0 * q.sum()


def of_another_shape(q, k, v, cells):
    return formula(q, k, v, cells).flatten(1)


def raises(q, k, v, cells):
    raise RuntimeError("an illegal memory access\nand more")


@pytest.mark.parametrize(
    ("operator", "complaint"),
    [
        (slightly_wrong, r"output is \d+\.\d+ times as far from float64 as is allowed"),
        (wrong_gradient, r"gradient 2 is \d+\.\d+ times as far from float64 as is allowed"),
        (forgets_a_row, "output holds 8 values that were not written or overflow"),
        (never_the_same, "two calls differ in their bits"),
        (minds_its_company, "a part alone has other bits than in company"),
        (sees_the_others, "NaN in other cells reaches a cell"),
        (of_another_shape, "RuntimeError: Mismatch in shape"),
        (raises, "RuntimeError: an illegal memory access$"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_found(monkeypatch, operator, complaint) -> None:
    (line,) = lines_for(monkeypatch, operator)
    assert line.startswith("FAILED made_up ours float32, a case: ")
    assert re.search(complaint, line), line


def test_a_path_that_refuses_a_shape_is_skipped(monkeypatch) -> None:
    monkeypatch.setattr(examine, "_objection", lambda operator, path, call: "head_dim 4 is odd")
    (line,) = lines_for(monkeypatch, formula)
    assert line == "skip   made_up ours float32, a case: head_dim 4 is odd"


def test_memory_is_poisoned_and_then_no_longer() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with rules.poisoned():
        assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(4).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_bits_are_compared_not_numbers() -> None:
    one = torch.tensor([0.0, torch.nan])
    assert rules.same_bits([one], [one.clone()]) and rules.same_bits([one[:0]], [one[:0]])
    assert not rules.same_bits([one], [torch.tensor([0.0, 2.0])])
    assert not rules.same_bits([one[:1]], [-one[:1]])


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["ok     a", "skip   b"], 0),
        (["ok     a", "FAILED b"], 1),
        (["skip   a"], 1),  # nothing was checked
        ([], 1),
    ],
)
def test_the_exit_status(lines, status, capsys) -> None:
    assert check._count(iter(lines))[0] == status
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('ok     one'); print('every case was run')", ["ok     one"]),
        (
            "print('ok     one'); import os; os.abort()",
            ["ok     one", "FAILED made_up: its process ended with -6 before all cases were run: "],
        ),
        (
            "print('ok     one'); raise ValueError('why')",
            [
                "ok     one",
                "FAILED made_up: its process ended with 1 before all cases were run: ValueError: why",
            ],
        ),
    ],
    ids=["whole", "killed", "raised"],
)
def test_a_process_that_ends_early_is_a_failure(monkeypatch, program, expected) -> None:
    asked = argparse.Namespace(seed=0, dtype=["float32"], path=None)
    run = check.subprocess.Popen
    monkeypatch.setattr(
        check.subprocess, "Popen", lambda command, **options: run([sys.executable, "-c", program], **options)
    )
    assert list(check._child_lines(asked, "made_up")) == expected


def test_operators_run_side_by_side(monkeypatch) -> None:
    """Every line of every process arrives, once, whatever the order."""
    program = (
        "import sys, time; name = sys.argv[sys.argv.index('--operator') + 1]; "
        "[(print('ok    ', name, n, flush=True), time.sleep(0.01)) for n in range(20)]; "
        f"print({check._DONE!r})"
    )
    run = check.subprocess.Popen
    monkeypatch.setattr(
        check.subprocess,
        "Popen",
        lambda command, **options: run([sys.executable, "-c", program, *command[2:]], **options),
    )
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    asked = argparse.Namespace(seed=0, dtype=["float32"], path=["triton"], operator=list(check.OPERATORS))
    found = list(check._children(asked))
    assert sorted(found) == sorted(f"ok     {name} {n}" for name in check.OPERATORS for n in range(20))


@pytest.mark.parametrize("name", [name for name, shape in rank.SHAPES.items() if shape[2]])
def test_the_oracle_of_tokens_is_the_cpus(name) -> None:
    block = rank.random_block(*rank.SHAPES[name], torch.float32, seed=3)
    tokens, mapped, totals = rank.expected(block)
    found = _native.rank_value(
        block.indptr.numpy(), block.indices.numpy(), block.data.numpy(), np.array(totals, dtype=np.float64),
        block.slots.numpy(), block.tokens.numpy(), block.medians.numpy(), rank.NUM_SLOTS, "multiply64", True,
        rank.MAX_TOKENS, rank.CLS, rank.EOS, False,
    )  # fmt: skip
    assert found.cu_seqlens.tolist() == [0, *itertools.accumulate(len(x) for x in tokens)]
    assert found.token_ids.tolist() == [token for cell in tokens for token in cell.tolist()]
    assert found.mapped_counts.tolist() == mapped
