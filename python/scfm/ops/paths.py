"""Which implementation computes an operator: a table, read from the top, that ``scfm doctor`` prints.

Every operator lists its paths, fastest first; each path says in words why it cannot take a tensor. The first one
that has no objection computes; ORDER says where the order comes from, and ``use_path`` overrules it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from scfm.errors import InvalidArgumentError

Objection = Callable[[Tensor], str | None]


@dataclass(frozen=True)
class Path:
    """One way to compute an operator. objection(tensor): why it cannot take this tensor, or None."""

    name: str
    what: str
    objection: Objection


@dataclass(frozen=True)
class Verdict:
    """What the table says of one path for one tensor."""

    path: str
    what: str
    chosen: bool
    why: str


# Why the paths of a device stand in the order they do: {device type: where the order comes from}.
ORDER = {
    "cpu": "our C++ kernels before torch's, as measured (benches/results)",
    "cuda": "as published for Hopper, head_dim 64: FlashAttention-3, Triton's, FlashAttention-2; an order of our own "
    "needs a run of `make bench-gpu` on that GPU",
}


@dataclass(frozen=True)
class _Forced:
    """One use_path that is in force; told apart from its equals by identity."""

    operator: str
    path: str


_TABLE: dict[str, tuple[Path, ...]] = {}
# Of the process, not of a thread or context: autograd runs the backward of GPU tensors in threads of its own.
_FORCED: list[_Forced] = []
_LOCK = threading.Lock()


def register(operator: str, paths: Sequence[Path]) -> None:
    """Declare an operator's paths, fastest first."""
    _TABLE[operator] = tuple(paths)


def operators() -> list[str]:
    return list(_TABLE)


def table(operator: str) -> tuple[Path, ...]:
    """The operator's paths, fastest first."""
    return _TABLE[operator]


def choose(operator: str, tensor: Tensor) -> str:
    """The path that computes ``operator`` on such a tensor (its device, dtype and last dimension decide)."""
    forced = _forced(operator)
    objections = []
    for path in _TABLE[operator]:
        if forced is not None and path.name != forced:
            continue
        objection = path.objection(tensor)
        if objection is None:
            return path.name
        objections.append(f"{path.name}: {objection}")
    raise InvalidArgumentError(
        f"no path takes {tensor.dtype} on {tensor.device.type} ({'; '.join(objections)})", where=operator
    )


def explain(operator: str, tensor: Tensor) -> list[Verdict]:
    """Every path of ``operator``: whether it would be taken for this tensor, and why."""
    chosen, forced = choose(operator, tensor), _forced(operator) is not None
    verdicts = []
    for path in _TABLE[operator]:
        objection = path.objection(tensor)
        if path.name == chosen:
            why = "forced" if forced else "the fastest that can"
        else:
            why = objection or (f"{chosen} is forced" if forced else f"slower than {chosen}")
        verdicts.append(Verdict(path.name, path.what, path.name == chosen, why))
    return verdicts


@contextmanager
def use_path(operator: str, path: str) -> Iterator[None]:
    """Within: ``operator`` is computed by ``path`` or not at all, in every thread; the innermost holds.

    A backward belongs inside too. Raises InvalidArgumentError for unknown names.
    """
    known = [p.name for p in _TABLE.get(operator, ())]
    if path not in known:
        raise InvalidArgumentError(
            f"{path!r} is no path of {operator}; expected one of {', '.join(known) or 'none'}",
            where="use_path",
        )
    entry = _Forced(operator, path)
    with _LOCK:
        _FORCED.append(entry)
    try:
        yield
    finally:
        with _LOCK:
            _FORCED[:] = [other for other in _FORCED if other is not entry]


def _forced(operator: str) -> str | None:
    with _LOCK:
        return next((entry.path for entry in reversed(_FORCED) if entry.operator == operator), None)
