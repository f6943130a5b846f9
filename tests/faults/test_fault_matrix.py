"""The table in README.md against the tests: every row has its tests, and every test named there exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROWS = [13, *range(16, 48), *range(49, 83)]


def table() -> dict[int, list[tuple[str, str]]]:
    """Row number to (file, function) of its tests."""
    rows: dict[int, list[tuple[str, str]]] = {}
    for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].isdigit():
            assert int(cells[0]) not in rows, f"row {cells[0]} stands in the table twice"
            rows[int(cells[0])] = re.findall(r"`([\w./]+\.py)::(\w+)`", cells[2])
    return rows


@cache
def tests_in(file: str) -> frozenset[str]:
    tree = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def test_the_table_has_every_row() -> None:
    rows = table()
    assert set(rows) == set(ROWS)
    assert list(rows) == sorted(rows)


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_of_a_row_exist(row: int) -> None:
    named = table()[row]
    assert named
    for file, name in named:
        assert name in tests_in(file), f"{file} has no {name}"


def test_every_test_named_after_a_row_stands_in_it() -> None:
    """A test called test_row_27_... that the table forgot, or that bears another row's number."""
    rows = table()
    for path in FOLDER.glob("test_*.py"):
        for name in tests_in(path.name):
            found = re.match(r"test_row_(\d+)_", name)
            if found and int(found[1]) in rows:
                for row, tests in rows.items():
                    assert row == int(found[1]) or (path.name, name) not in tests
