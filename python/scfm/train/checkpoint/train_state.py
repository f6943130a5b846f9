"""Where a training run stands, as a few lines of JSON that are read back strictly.

With these, the settings and the data, every later step is determined: all randomness is keyed by seed, epoch and
cell, so there is no generator to save. All ranks hold the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scfm.data.safe_pickle import parse_json
from scfm.errors import FormatError, InvalidArgumentError, VersionError

__all__ = ["FORMAT_VERSION", "TRAIN_STATE_FILE", "TrainState", "expect_format"]

TRAIN_STATE_FILE = "train_state.json"
FORMAT_VERSION = 1
_COUNTS = ("step", "epoch", "cursor", "tokens_seen", "cells_seen")


@dataclass(frozen=True)
class TrainState:
    """step: optimiser steps done; epoch, cursor: the next microbatch is number ``cursor`` of ``epoch``'s plan.

    tokens_seen, cells_seen: since the beginning, of all ranks. world_size: ranks that wrote it. settings: what a
    resumed run must not change (compare_settings). data_fingerprint: the corpus's, which compares it. versions: package
    to version, to be told, not compared.
    """

    step: int
    epoch: int
    cursor: int
    seed: int
    tokens_seen: int = 0
    cells_seen: int = 0
    world_size: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    data_fingerprint: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Raises InvalidArgumentError if a setting cannot stand in JSON and come back equal."""
        content = {"format": FORMAT_VERSION, **asdict(self)}
        try:
            text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
            alike = json.loads(text) == content
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"cannot be stored as JSON: {error}", where="TrainState") from error
        if not alike:
            raise InvalidArgumentError(
                "its settings must be plain JSON (text keys; lists, not tuples)", where="TrainState"
            )
        return text

    @classmethod
    def from_json(cls, text: bytes, path: Path) -> TrainState:
        """Raises FormatError naming the key, and VersionError for a file of a newer scfm. ``path`` is only named."""
        content = parse_json(text, path)
        expect_format(content, path)
        known = {entry.name: entry.type for entry in fields(cls)}
        unknown, missing = sorted(set(content) - set(known)), sorted(set(known) - set(content))
        if unknown or missing:
            raise FormatError(f"keys missing: {missing}; keys unknown: {str(unknown)[:200]}", path=path)
        for name, value in content.items():
            _check(name, value, str(known[name]), path)
        return cls(**content)


def expect_format(content: dict[str, Any], path: Path) -> None:
    """Takes "format" out of ``content``. Raises FormatError without it, VersionError if it is a newer one."""
    found = content.pop("format", None)
    if type(found) is not int or found < 1:
        raise FormatError(
            f"expected a format number from 1, found {str(found)[:50]}", path=path, where="format"
        )
    if found > FORMAT_VERSION:
        raise VersionError(
            f"format {found}; this scfm reads up to {FORMAT_VERSION}",
            path=path,
            hint="It was written by a newer scfm: upgrade, or resume with the version that wrote it.",
        )


def _check(name: str, value: Any, expected: str, path: Path) -> None:
    if expected == "int":
        sound = (
            type(value) is int
            and (value >= 0 or name not in _COUNTS)
            and (value >= 1 or name != "world_size")
        )
    else:
        sound = isinstance(value, Mapping)
        if sound and expected == "dict[str, str]":
            sound = all(isinstance(item, str) for item in value.values())
    if not sound:
        raise FormatError(f"expected {expected}, found {str(value)[:100]}", path=path, where=name)
