"""What became of every tensor in a checkpoint, and the one door through which weights enter a model.

A loader that skips what does not fit gives a model that runs and is wrong. Here each name of the file is
loaded, renamed, or ignored for a stated reason, and each name that the model expects is found or may be
absent for a stated reason; anything else is an error that lists all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from scfm.errors import CheckpointError
from scfm.models.weights import Weights, WeightsSource

__all__ = ["LoadReport", "fit_state"]

_MAX_LISTED = 12
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class LoadReport:
    """The account of one loading.

    loaded: the model's names that got a tensor. renamed: name in the file -> the model's name, where they
    differ. ignored, missing: name -> why that is right. unexpected: names of the file that nothing accounts
    for (empty in every report of a loading that succeeded). ``str()`` is for people, ``to_dict()`` for
    JSON.
    """

    family: str
    source: WeightsSource | None
    loaded: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: tuple[str, ...] = ()
    revision: str | None = None

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights, as ``Weights.sha256``; empty if they came from no file."""
        return "" if self.source is None else self.source.sha256

    @property
    def source_files(self) -> dict[str, str]:
        """Every file read -> its SHA-256 (computed when first asked for: it reads them whole)."""
        return {} if self.source is None else self.source.file_sha256

    def to_dict(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "source": None if self.source is None else str(self.source.source_file),
            "format": None if self.source is None else self.source.format,
            "revision": self.revision,
            "sha256": self.source_files,
            "loaded": list(self.loaded),
            "renamed": dict(self.renamed),
            "ignored": dict(self.ignored),
            "missing": dict(self.missing),
            "unexpected": list(self.unexpected),
        }

    def __str__(self) -> str:
        source = "no file" if self.source is None else f"{self.source.source_file} ({self.source.format})"
        lines = [f"{self.family}: {len(self.loaded)} tensors loaded from {source}"]
        lines += [f"  renamed  {old} -> {new}" for old, new in _some(self.renamed.items())]
        for title, names in (("ignored", self.ignored), ("absent", self.missing)):
            lines += [f"  {title:8} {name}: {why}" for name, why in _some(names.items())]
            if len(names) > _MAX_LISTED:
                lines.append(f"  {title:8} ... {len(names) - _MAX_LISTED} more")
        lines += [f"  unexpected {name}" for name in _some(self.unexpected)]
        return "\n".join(lines)


def fit_state(
    expected: Mapping[str, Sequence[int]],
    weights: Weights,
    *,
    rename: Callable[[str], str] | None = None,
    ignore: Mapping[str, str] | None = None,
    optional: Mapping[str, str] | None = None,
    family: str,
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors that a model expects (name -> shape), taken from ``weights``, and the account of it.

    rename: name in the file -> the model's name. ignore: pattern (``*`` and ``?``) over names in the file
    -> reason to leave them out. optional: pattern over the model's names -> reason why they may be absent;
    those are then not in the result. Tensors come in the file's dtype, which must be a floating-point one.
    Raises CheckpointError with the full difference: missing, unexpected, wrong shape, wrong dtype; and for
    NaN.
    """
    ignored: dict[str, str] = {}
    homes: dict[str, str] = {}
    problems: list[str] = []
    for name in weights:
        reason = _matching(name, ignore)
        if reason is not None:
            ignored[name] = reason
            continue
        target = rename(name) if rename else name
        if target in homes:
            problems.append(f"two tensors for one name: {homes[target]} and {name} both are {target}")
        homes[target] = name
    unexpected = [homes[target] for target in homes if target not in expected]
    absent = {name: _matching(name, optional) for name in expected if name not in homes}
    problems += _listed(
        "missing", [_described(name, expected) for name, why in absent.items() if why is None]
    )
    problems += _listed("unexpected", [f"{name} {list(weights.shapes[name])}" for name in unexpected])
    fitting = [name for name in expected if name in homes]
    wrong = [name for name in fitting if weights.shapes[homes[name]] != tuple(expected[name])]
    problems += _listed(
        "wrong shape",
        [
            f"{name}: found {list(weights.shapes[homes[name]])}, expected {list(expected[name])}"
            for name in wrong
        ],
    )
    if problems:
        raise _mismatch(problems, weights, family)
    state = {name: weights[homes[name]] for name in fitting}
    strange = [f"{name}: {tensor.dtype}" for name, tensor in state.items() if tensor.dtype not in _FLOATS]
    if strange:
        raise _mismatch(_listed("wrong dtype", strange), weights, family)
    report = LoadReport(
        family=family,
        source=weights.source,
        loaded=tuple(fitting),
        renamed={homes[name]: name for name in fitting if homes[name] != name},
        ignored=ignored,
        missing={name: why for name, why in absent.items() if why is not None},
    )
    return state, report


def _matching(name: str, patterns: Mapping[str, str] | None) -> str | None:
    return next((why for pattern, why in (patterns or {}).items() if fnmatchcase(name, pattern)), None)


def _described(name: str, expected: Mapping[str, Sequence[int]]) -> str:
    return f"{name} {list(expected[name])}"


def _listed(title: str, names: Sequence[str]) -> list[str]:
    return [f"{title} ({len(names)}):", *(f"  {name}" for name in names)] if names else []


def _mismatch(problems: Sequence[str], weights: Weights, family: str) -> CheckpointError:
    return CheckpointError(
        f"these weights are not those of the {family} model that the configuration describes\n"
        + "\n".join(problems),
        path=weights.source_file,
    )


def _some(items: Any) -> list[Any]:
    return list(items)[:_MAX_LISTED]
