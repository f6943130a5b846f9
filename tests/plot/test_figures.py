"""Figures are drawn without a display, hold what was given, and name what is missing."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest

from scfm.errors import FormatError, InvalidArgumentError, MissingDependencyError, MissingFileError
from scfm.plot import learning_curve, umap
from scfm.plot.umap import umap_coordinates


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], [30, 20, 10])
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(labels), "depth": np.arange(60.0)}, index=map(str, range(60))
    )
    points = rng.normal(size=(60, 2)).astype(np.float32)
    return anndata.AnnData(np.zeros((60, 1), np.float32), obs=obs, obsm={"X_geneformer": points})


def offsets(figure):
    return np.concatenate([np.asarray(part.get_offsets()) for part in figure.axes[0].collections])


def test_two_dimensions_are_drawn_as_they_are_and_saved(cells, tmp_path):
    path = tmp_path / "new" / "picture.png"
    figure = umap(cells, color="cell_type", title="cells", path=path)
    assert np.array_equal(
        offsets(figure), cells.obsm["X_geneformer"]
    )  # largest group first: already in that order
    assert path.read_bytes().startswith(b"\x89PNG")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["a (30)", "b (20)", "c (10)"]
    assert figure.axes[0].get_title(loc="left") == "cells"


def test_numbers_get_a_scale_and_arrays_need_no_anndata(cells):
    assert len(umap(cells, color="depth").axes) == 2
    points = cells.obsm["X_geneformer"]
    figure = umap(points, color=[None, *["x"] * 59])
    assert "unlabelled (1)" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert umap(points).axes[0].get_legend() is None


def test_up_to_sixty_groups_look_different():
    names = np.array([f"group {i}" for i in range(60)])
    figure = umap(np.random.default_rng(0).normal(size=(60, 2)), color=names)
    looks = {
        (tuple(part.get_facecolor()[0]), part.get_paths()[0].vertices.tobytes())
        for part in figure.axes[0].collections
    }
    assert len(looks) == 60
    with pytest.raises(InvalidArgumentError, match="61 groups"):
        umap(np.zeros((61, 2)), color=[str(i) for i in range(61)])


def test_umap_separates_planted_groups_and_is_repeatable(tmp_path):
    pytest.importorskip("umap")
    codes = np.repeat(np.arange(3), 40)
    points = 4.0 * np.eye(3, 10)[codes] + np.random.default_rng(0).normal(size=(120, 10)) * 0.3
    first = umap_coordinates(points, seed=1)
    centers = np.array([first[codes == code].mean(axis=0) for code in range(3)])
    nearest = np.linalg.norm(first[:, None] - centers[None], axis=2).argmin(axis=1)
    assert first.shape == (120, 2) and (nearest == codes).all()
    assert np.array_equal(first, umap_coordinates(points, seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "X_pca"}, "obsm has no 'X_pca'; it has \\['X_geneformer'\\]"),
        ({"color": "batch"}, "obs has no 'batch'; it has \\['cell_type', 'depth'\\]"),
        ({"color": ["a", "b"]}, "color has 2 entries for 60 cells"),
    ],
)
def test_missing_keys_are_named(cells, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        umap(cells, **options)


def test_bad_arrays_are_named():
    with pytest.raises(InvalidArgumentError, match="names a column, but an array has none"):
        umap(np.zeros((5, 2)), color="cell_type")
    with pytest.raises(InvalidArgumentError, match="shape"):
        umap(np.zeros(5))
    with pytest.raises(InvalidArgumentError, match="cell 1 has NaN"):
        umap_coordinates([[0.0] * 3, [np.nan] * 3, [1.0] * 3, [2.0] * 3])
    with pytest.raises(InvalidArgumentError, match="at least 4 cells"):
        umap_coordinates(np.zeros((3, 5)))


def test_learning_curve_draws_losses_baselines_and_held_out(tmp_path):
    records = [{"step": i, "loss": 10.0 - 0.1 * i} for i in range(40)]
    records[20]["held_out_loss"] = 9.0
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n")
    figure = learning_curve(file, baselines={"unigram": 6.4}, path=tmp_path / "curve.svg")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["unigram 6.40"]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["held out"].get_xydata().tolist() == [[20.0, 9.0]]
    # The running mean of a straight line is that line, save at its ends.
    assert lines["training"].get_ydata()[5:-5] == pytest.approx([10.0 - 0.1 * i for i in range(5, 35)])
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    same = learning_curve(records).axes[0].lines
    assert same[0].get_ydata().tolist() == axes.lines[0].get_ydata().tolist()


def test_bad_metrics_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="no such metrics file"):
        learning_curve(tmp_path / "none.jsonl")
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with pytest.raises(FormatError, match="line 2"):
        learning_curve(file)
    file.write_text("[1]\n")
    with pytest.raises(FormatError, match="line 1"):
        learning_curve(file)
    with pytest.raises(InvalidArgumentError, match="no record has 'step' and 'loss'"):
        learning_curve([{"step": 1}])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"scfm\[plot\]"):
        umap(np.zeros((5, 2)))


def test_importing_plot_loads_no_matplotlib_and_drawing_no_pyplot():
    code = (
        "import sys, numpy, scfm; pl = scfm.pl; assert 'matplotlib' not in sys.modules;"
        "pl.umap(numpy.zeros((5, 2))); assert 'matplotlib.pyplot' not in sys.modules;"
        "assert 'umap' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
