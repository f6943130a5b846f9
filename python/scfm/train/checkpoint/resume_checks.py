"""Whether a run may go on from a checkpoint: same settings, same data, or a change that was asked for by name.

A run resumed under another learning rate, seed or set of cells would still train, and nobody could say afterwards
what the model is. So each difference is named with both values, and with the words that would allow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scfm.errors import ConfigError, IntegrityError

__all__ = ["compare_settings", "expect_same_data"]

_ABSENT = "not set"
_MOST_NAMED = 10


def compare_settings(
    saved: Mapping[str, Any], now: Mapping[str, Any], allow_change: Sequence[str] = ()
) -> None:
    """saved, now: settings by name, tables nested. allow_change: names, or dotted names in a table, that may differ.

    Raises ConfigError naming every setting that differs, both values and the remedy.
    """
    before, after = _flat(saved), _flat(now)
    changed = [
        name
        for name in sorted({*before, *after})
        if not _equal(before.get(name, _ABSENT), after.get(name, _ABSENT))
        and not _allowed(name, allow_change)
    ]
    if changed:
        told = [
            f"{name} (was {_shown(before.get(name, _ABSENT))}, now {_shown(after.get(name, _ABSENT))})"
            for name in changed[:_MOST_NAMED]
        ]
        raise ConfigError(
            f"the run was begun with other settings: {', '.join(told)}{_more(changed)}",
            where=", ".join(changed[:_MOST_NAMED]),
            hint=f"Set them back, write to another folder, or allow it with allow_change={_quoted(changed)}.",
        )


def expect_same_data(differences: Sequence[str], allow_change: Sequence[str] = ()) -> None:
    """differences: a sentence each, from the corpus, which knows what its fingerprint means.

    "data" in ``allow_change`` lets them pass: the run then goes on at the same place in the plan of other cells. Raises
    IntegrityError with the sentences.
    """
    if differences and "data" not in allow_change:
        raise IntegrityError(
            f"the run was begun with other data: {'; '.join(differences[:_MOST_NAMED])}{_more(differences)}",
            where="data",
            hint='Give the same data, write to another folder, or allow it with allow_change=["data"].',
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _equal(before: Any, after: Any) -> bool:
    """Equal as JSON: a tuple is a list; true is not 1, but 1 is 1.0."""
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        return len(before) == len(after) and all(map(_equal, before, after))
    return isinstance(before, bool) == isinstance(after, bool) and bool(before == after)


def _allowed(name: str, allow_change: Sequence[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in allow_change)


def _shown(value: Any) -> str:
    text = value if value is _ABSENT else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _quoted(names: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def _more(changed: Sequence[str]) -> str:
    return f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
