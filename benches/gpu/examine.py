"""One operator on every path that takes it: a line for each case, in the words that check.py counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import cases
import rules
import torch
from torch import Tensor

from scfm import ops
from scfm.ops import paths


@dataclass(frozen=True)
class Asked:
    """What to run; only: paths to be taken, () for all."""

    device: str
    seed: int
    dtypes: tuple[str, ...]
    only: tuple[str, ...]


def lines_of(operator: str, asked: Asked) -> Iterator[str]:
    """First what is skipped, then every case, then CUDA graphs (a capture that fails may leave a mess)."""
    takers, skipped = _takers(operator, asked)
    yield from skipped
    chosen = [case for case in cases.all_cases(tiny=asked.device == "cpu") if case.operator == operator]
    for case in chosen:
        for dtype in asked.dtypes:
            yield from _lines_of_case(case, dtype, takers[dtype], asked)
            if asked.device == "cuda":
                torch.cuda.empty_cache()  # others run beside
    if asked.device == "cuda":
        case = max(chosen, key=lambda case: case.name.startswith(_CAPTURED))
        for dtype in asked.dtypes:
            yield from _captures(case, dtype, takers[dtype], asked)


_CAPTURED = ("primes", "Geneformer")  # what a graph is captured of


def _takers(operator: str, asked: Asked) -> tuple[dict[str, list[str]], list[str]]:
    """{dtype: the paths without an objection}, and a line for every path's objections."""
    takers: dict[str, list[str]] = {dtype: [] for dtype in asked.dtypes}
    lines = []
    for path in paths.table(operator):
        if (asked.only and path.name not in asked.only) or (asked.device == "cuda" and path.name == "native"):
            continue
        objections: dict[str, list[str]] = {}
        for dtype in asked.dtypes:
            tensor = torch.empty(1, 1, 64, device=asked.device, dtype=getattr(torch, dtype))
            if (objection := path.objection(tensor)) is None:
                takers[dtype].append(path.name)
            else:
                objections.setdefault(objection, []).append(dtype)
        lines += [f"skip   {operator} {path.name} {', '.join(of)}: {why}" for why, of in objections.items()]
    return takers, lines


def _call(case: cases.Case, dtype: str, asked: Asked) -> cases.Call:
    generator = torch.Generator().manual_seed(asked.seed)
    return case.make(getattr(torch, dtype), asked.device, generator)


def _lines_of_case(case: cases.Case, dtype: str, takers: list[str], asked: Asked) -> Iterator[str]:
    """The formula is computed once and serves every path."""
    try:
        call = _call(case, dtype, asked)
        rod = rules.yardstick(call.formula, call.inputs, call.upstream)
    except Exception as error:
        yield f"FAILED {case.operator} formula {dtype}, {case.name}: {type(error).__name__}: {_first_line(error)}"
        _stop_if_lost(asked.device)
        return
    for path in takers:
        title = f"{case.operator} {path} {dtype}, {case.name}"
        if (objection := _objection(case.operator, path, call)) is not None:
            yield f"skip   {title}: {objection}"
            continue
        try:
            with ops.use_path(case.operator, path):
                wrong, said = _examine(call, rod, path)
        except Exception as error:  # whatever a path raises is its result
            wrong, said = f"{type(error).__name__}: {_first_line(error)}", ""
        yield f"FAILED {title}: {wrong}" if wrong else f"ok     {title}: {said}"
        _stop_if_lost(asked.device)


def _objection(operator: str, path: str, call: cases.Call) -> str | None:
    """To these very inputs: a path may refuse a head_dim."""
    found = next(p for p in paths.table(operator) if p.name == path)
    return found.objection(call.inputs[0])


def _examine(call: cases.Call, rod: rules.Yardstick, path: str) -> tuple[str | None, str]:
    """(what is wrong, or None; what was seen) of one path."""
    with rules.poisoned():
        found = rules.with_gradients(call.operator, call.inputs, call.upstream)
    wrong, said = rules.complaint(found, rod)
    if (
        wrong or path == "torch"
    ):  # torch's own sums on a GPU may take any order; it is the yardstick, not ours
        return wrong, said
    plain = [rules.with_gradients(call.operator, call.inputs, call.upstream) for _ in range(2)]
    if not rules.same_bits(*plain):
        return "two calls differ in their bits", said
    said += ", the same bits twice"
    if call.alone is None:
        return None, said
    return _company(call, plain[0]), f"{said} and alone"


def _company(call: cases.Call, plain: list[Tensor]) -> str | None:
    """Whether a part by itself has other bits than in the whole, or NaN beside it reaches it."""
    assert call.alone is not None
    function, inputs, rows = call.alone
    alone = rules.with_gradients(function, inputs, call.upstream[rows])
    if not rules.same_bits([alone[0]], [plain[0][rows]]):
        return "a part alone has other bits than in company"
    if not call.whole:
        return None
    if not rules.same_bits(alone[1:], [grad[rows] for grad in plain[1:]]):
        return "gradients of a cell alone have other bits than in company"
    beside = [torch.full_like(x, torch.nan) for x in call.inputs]
    for place, values in zip(beside, call.inputs, strict=True):
        place[rows] = values[rows]
    if not rules.same_bits([call.operator(*beside)[rows]], [plain[0][rows]]):
        return "NaN in other cells reaches a cell"
    return None


def _captures(case: cases.Case, dtype: str, takers: list[str], asked: Asked) -> Iterator[str]:
    call = _call(case, dtype, asked)
    for path in takers:
        title = f"{case.operator} {path} {dtype}, {case.name}, as a CUDA graph"
        try:
            with ops.use_path(case.operator, path):
                replayed, plain = rules.captured(call.operator, call.inputs)
        except Exception as error:  # a path that waits for the device cannot be captured
            yield f"skip   {title}: {_first_line(error)}"
            _stop_if_lost(asked.device)
            continue
        equal = path == "torch" or rules.same_bits([replayed], [plain])
        yield (
            f"ok     {title}: replays" if equal else f"FAILED {title}: the replay differs from the plain call"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _stop_if_lost(device: str) -> None:
    """After an illegal access every later call fails too: the process ends at once, and check.py says so."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the device is lost: {_first_line(error)}", flush=True)
        os._exit(1)  # taking CUDA down properly may hang now
