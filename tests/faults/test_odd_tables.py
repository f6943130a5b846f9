"""Fault row 44, as far as reading goes: odd columns of obs come out as anndata gives them, or are refused by name.

What annotation and fine-tuning make of odd labels is tested with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from counts_files import poisson_matrix
from run_child import run_child

import scfm
from scfm.data.read import read
from scfm.errors import FormatError, ScfmError

NUM_CELLS = 12
COLUMNS: dict[str, Any] = {
    "missing_codes": pd.Categorical(["a", None, "b", np.nan] * 3),
    "unused": pd.Categorical(["a", "b"] * 6, categories=["a", "b", "never", "never either"]),
    "ordered": pd.Categorical(["low", "high", "mid"] * 4, categories=["low", "mid", "high"], ordered=True),
    "of_integers": pd.Categorical([3, 1, 2] * 4),
    "of_booleans": pd.Categorical([True, False] * 6),
    "of_one": pd.Categorical(["only"] * 12),
    "all_missing": pd.Categorical([None] * 12, categories=["a"]),
    "no_categories": pd.Categorical([None] * 12),
    "empty_name": pd.Categorical(["", "a", "ü 細"] * 4),
    "text": ["x", "y", ""] * 4,
    "whole": np.arange(12),
    "real": np.array([0.5, np.nan, np.inf] * 4),
    "truth": np.array([True, False] * 6),
    "nullable_integer": pd.array([1, None, 3] * 4, dtype="Int64"),
    "nullable_boolean": pd.array([True, None, False] * 4, dtype="boolean"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    adata = anndata.AnnData(
        poisson_matrix(NUM_CELLS, 5), obs=pd.DataFrame(COLUMNS, index=[f"c{i}" for i in range(NUM_CELLS)])
    )
    adata.write_h5ad(tmp_path / "table.h5ad")
    return tmp_path / "table.h5ad"


def test_row_44_odd_columns_are_those_of_anndata(path: Path) -> None:
    expected = anndata.read_h5ad(path).obs
    source = read(path)
    pd.testing.assert_frame_equal(source.obs, expected)
    rows = [7, 0, 7]
    pd.testing.assert_frame_equal(source.select(rows).obs, expected.iloc[rows])


@pytest.mark.parametrize("name", COLUMNS)
def test_row_44_one_odd_column_alone(name: str, path: Path) -> None:
    expected = anndata.read_h5ad(path).obs[name]
    column = read(path).select([7, 0, 7]).obs_column(name)
    assert column is not None
    pd.testing.assert_series_equal(column, expected.iloc[[7, 0, 7]].reset_index(drop=True), check_names=False)


def test_row_44_a_missing_column_is_none(path: Path) -> None:
    source = read(path)
    assert source.obs_column("cell_type") is None
    assert set(source.obs_column_names) == set(COLUMNS)


def _tables(path: str, column: str) -> tuple[bool, list[Any]]:
    """Whether the whole table can be read, and one column of it."""
    source = read(path)
    try:
        _ = source.obs
        whole = True
    except ScfmError:
        whole = False
    return whole, read(path).obs_column(column).tolist()  # type: ignore[union-attr]


def _code_beyond(group: h5py.Group) -> None:
    group["codes"][4] = 77


def _code_below(group: h5py.Group) -> None:
    group["codes"][4] = -5


def _codes_missing(group: h5py.Group) -> None:
    del group["codes"]


def _categories_missing(group: h5py.Group) -> None:
    del group["categories"]


def _codes_too_few(group: h5py.Group) -> None:
    values = group["codes"][:-2]
    del group["codes"]
    group["codes"] = values


def _codes_of_text(group: h5py.Group) -> None:
    del group["codes"]
    group["codes"] = np.array([b"a"] * NUM_CELLS)


def _codes_of_fractions(group: h5py.Group) -> None:
    del group["codes"]
    group["codes"] = np.full(NUM_CELLS, 0.5)


def _categories_twice(group: h5py.Group) -> None:
    group["categories"][...] = group["categories"][0]


def _codes_in_two_dimensions(group: h5py.Group) -> None:
    values = group["codes"][()]
    del group["codes"]
    group["codes"] = values[:, None]


DAMAGES = [
    _code_beyond,
    _code_below,
    _codes_missing,
    _categories_missing,
    _codes_too_few,
    _codes_of_text,
    _codes_of_fractions,
    _categories_twice,
    _codes_in_two_dimensions,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_row_44_damaged_categories_are_refused_by_name(damage: Any, path: Path) -> None:
    with h5py.File(path, "r+") as file:
        damage(file["obs/ordered"])
    outcome = run_child(_tables, str(path), "ordered", memory=1 << 30)
    assert outcome.raised("FormatError"), outcome
    assert "obs" in outcome.message and "table.h5ad" in outcome.message
    with pytest.raises(FormatError, match="obs"):
        _ = read(path).obs
    # The counts and the other columns are as good as before.
    assert sum(block.num_cells for block in scfm.read(path).blocks()) == NUM_CELLS
    other = read(path).obs_column("text")
    assert other is not None and other.tolist() == COLUMNS["text"]
