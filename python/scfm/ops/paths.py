"""Which implementation computes an operator: a table, read from the top, that ``scfm doctor`` prints.

Every operator lists its paths, fastest first; each path says in words why it cannot take a tensor. The first one
that has no objection computes. Order on GPUs follows published figures (FlashAttention-3, then our Triton kernel,
then torch's FlashAttention-2), since an order of our own needs a measurement on that GPU; ``use_path`` overrules it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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


_TABLE: dict[str, tuple[Path, ...]] = {}
_FORCED: ContextVar[dict[str, str] | None] = ContextVar("scfm_forced_paths", default=None)


def register(operator: str, paths: Sequence[Path]) -> None:
    """Declare an operator's paths, fastest first."""
    _TABLE[operator] = tuple(paths)


def operators() -> list[str]:
    return list(_TABLE)


def choose(operator: str, tensor: Tensor) -> str:
    """The path that computes ``operator`` on such a tensor (its device, dtype and last dimension decide)."""
    forced = (_FORCED.get() or {}).get(operator)
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
    chosen = choose(operator, tensor)
    verdicts = []
    for path in _TABLE[operator]:
        objection = path.objection(tensor)
        if path.name == chosen:
            why = "forced" if (_FORCED.get() or {}).get(operator) else "the fastest that can"
        else:
            why = objection or f"slower than {chosen}"
        verdicts.append(Verdict(path.name, path.what, path.name == chosen, why))
    return verdicts


@contextmanager
def use_path(operator: str, path: str) -> Iterator[None]:
    """Within: ``operator`` is computed by ``path`` or not at all. Raises InvalidArgumentError for unknown names."""
    known = [p.name for p in _TABLE.get(operator, ())]
    if path not in known:
        raise InvalidArgumentError(
            f"{path!r} is no path of {operator}; expected one of {', '.join(known) or 'none'}",
            where="use_path",
        )
    token = _FORCED.set({**(_FORCED.get() or {}), operator: path})
    try:
        yield
    finally:
        _FORCED.reset(token)
