"""Where a run stands, read back strictly; settings and data that a resumed run must not change (fault row 72)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scfm.errors import ConfigError, FormatError, IntegrityError, InvalidArgumentError, VersionError
from scfm.train.checkpoint import TrainState, compare_settings, expect_same_data

PATH = Path("train_state.json")
STATE = TrainState(
    step=12,
    epoch=1,
    cursor=40,
    seed=-3,
    tokens_seen=10**13,
    cells_seen=9,
    world_size=4,
    settings={"learning_rate": 1e-3, "model": {"num_bins": 51, "names": ["a", None, True]}},
    data_fingerprint={"files": [{"name": "a.h5ad", "cells": 3}], "held out": "ü"},
    versions={"torch": "2.13"},
)


def changed(**changes: Any) -> bytes:
    content = {**json.loads(STATE.to_json()), **changes}
    return json.dumps({name: value for name, value in content.items() if value != "gone"}).encode()


def test_comes_back_equal() -> None:
    assert TrainState.from_json(STATE.to_json().encode(), PATH) == STATE
    assert TrainState.from_json(TrainState(0, 0, 0, 0).to_json().encode(), PATH) == TrainState(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"step": "gone"}, "step"),
        ({"surprise": 1}, "surprise"),
        ({"step": 1.0}, "step"),
        ({"step": True}, "step"),
        ({"step": -1}, "step"),
        ({"tokens_seen": "1"}, "tokens_seen"),
        ({"world_size": 0}, "world_size"),
        ({"settings": []}, "settings"),
        ({"data_fingerprint": "a"}, "data_fingerprint"),
        ({"versions": None}, "versions"),
        ({"format": "gone"}, "format"),
        ({"format": "1"}, "format"),
        ({"format": 0}, "format"),
    ],
)
def test_what_is_not_as_it_should_be_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named) as refused:
        TrainState.from_json(changed(**changes), PATH)
    assert str(PATH) in str(refused.value)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"step": 1, "step": 2}', b'{"step": NaN}', b"\xff", b"{" * 100_000]
)
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(FormatError):
        TrainState.from_json(text, PATH)


def test_a_newer_format_asks_for_a_newer_scfm() -> None:
    with pytest.raises(VersionError, match="newer scfm"):
        TrainState.from_json(changed(format=2, surprise=1), PATH)


@pytest.mark.parametrize("settings", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}, {"a": Path("x")}])
def test_settings_that_json_would_change_are_refused_when_written(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="JSON"):
        replace(STATE, settings=settings).to_json()


SAVED = {
    "token_budget": 8192,
    "microbatches_per_step": 4,
    "seed": 0,
    "genes": "vocab.json",
    "schedule": "linear",
    "objective": {"mask_ratio": 0.15, "weights": [1, 2]},
    "max_steps": None,
}


def test_row_72_the_same_settings_pass() -> None:
    compare_settings(SAVED, json.loads(json.dumps(SAVED)))
    compare_settings(SAVED, {**SAVED, "seed": 0.0, "objective": {"mask_ratio": 0.15, "weights": (1, 2)}})
    expect_same_data([])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("microbatches_per_step", 8),
        ("token_budget", 4096),
        ("seed", 1),
        ("genes", None),
        ("schedule", "cosine"),
    ],
)
def test_row_72_a_changed_setting_is_named_with_both_values_and_the_remedy(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        compare_settings(SAVED, {**SAVED, name: value})
    assert f"{name} (was {SAVED[name]!r}, now {value!r})" in str(refused.value)
    assert f'allow_change=["{name}"]' in str(refused.value) and refused.value.where == name
    compare_settings(SAVED, {**SAVED, name: value}, [name])
    with pytest.raises(ConfigError):
        compare_settings(SAVED, {**SAVED, name: value}, ["max_steps"])


def test_row_72_tables_absent_settings_and_many_changes() -> None:
    now = {**SAVED, "objective": {"mask_ratio": 0.3, "weights": [1, 2]}}
    with pytest.raises(ConfigError, match=r"objective.mask_ratio \(was 0.15, now 0.3\)"):
        compare_settings(SAVED, now)
    compare_settings(SAVED, now, ["objective.mask_ratio"])
    compare_settings(SAVED, now, ["objective"])
    with pytest.raises(ConfigError, match=r"seed \(was 0, now not set\)"):
        compare_settings(SAVED, {name: value for name, value in SAVED.items() if name != "seed"})
    with pytest.raises(ConfigError, match=r"bfloat16 \(was not set, now True\)"):
        compare_settings(SAVED, {**SAVED, "bfloat16": True})
    with pytest.raises(ConfigError, match=r"max_steps \(was None, now 0\)"):
        compare_settings(SAVED, {**SAVED, "max_steps": 0})
    with pytest.raises(ConfigError, match="compile"):
        compare_settings({"compile": 1}, {"compile": True})
    many = {f"s{i:02d}": i for i in range(25)}
    with pytest.raises(ConfigError, match="and 15 more") as refused:
        compare_settings(many, {name: -1 - value for name, value in many.items()})
    compare_settings(many, {name: -1 - value for name, value in many.items()}, list(many))
    assert all(f'"s{i:02d}"' in str(refused.value) for i in range(25))


def test_row_72_other_data_are_named() -> None:
    differences = ["a.h5ad has 9 cells instead of 8", "the vocabulary is another"]
    with pytest.raises(IntegrityError) as refused:
        expect_same_data(differences, ["seed"])
    assert all(told in str(refused.value) for told in (*differences, 'allow_change=["data"]'))
    with pytest.raises(IntegrityError, match="and 3 more"):
        expect_same_data([f"file {i} has changed" for i in range(13)])
    expect_same_data(differences, ["data"])
