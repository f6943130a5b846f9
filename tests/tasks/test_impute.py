"""Imputation writes predictions in their units, names what it cannot do, and is scored against hidden counts."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from typer.testing import CliRunner

import scfm
from models import scfoundation_cells
from models.scfoundation_cells import GENES, NUM_GENES
from scfm.cli.main import app
from scfm.errors import BadCellError, InvalidArgumentError, NotCountsError, ScfmWarning
from scfm.evaluate.depth_baselines import (
    cell_correlations,
    cell_errors,
    log_profiles,
    shares_of,
    smoothed_over_neighbors,
)
from scfm.tasks.impute import Imputation, target_of

pytestmark = pytest.mark.filterwarnings("ignore::scfm.ScfmWarning")


@pytest.fixture(scope="module")
def model():
    return scfoundation_cells.model(variant="gene")


@pytest.fixture
def cells() -> ad.AnnData:
    """Six cells; one gene in three is unknown to the model, and the order is another."""
    adata = scfoundation_cells.counts(6, seed=3)
    names = [name if i % 3 else f"UNKNOWN{i}" for i, name in enumerate(adata.var_names)]
    adata.var_names = names
    return adata[:, ::-1].copy()


def test_a_layer_in_stated_units(model, cells, tmp_path) -> None:
    before = cells.X.copy()
    assert scfm.tl.impute(cells, model, target_depth=10_000) is None
    layer = cells.layers["scfoundation_imputed"]
    packed = model.with_input(target="t4").tokenize(cells)
    with torch.inference_mode():
        prediction = model.forward(packed).prediction.numpy()
    for column, name in enumerate(cells.var_names):
        if name.startswith("UNKNOWN"):
            assert np.isnan(layer[:, column]).all()
        else:
            np.testing.assert_array_equal(layer[:, column], prediction[:, GENES.index(name)])
    assert (before != cells.X).nnz == 0
    facts = cells.uns["scfm"]["scfoundation_imputed"]
    assert facts["task"] == "impute" and facts["target_depth"] == "t4.0" and "ln(1 +" in facts["units"]
    cells.write_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "a.h5ad").layers["scfoundation_imputed"], layer)


def test_chosen_genes_measured_or_not(model, cells) -> None:
    wanted = ["GENE3", "GENE7"]  # GENE3 is not in the data
    copy = scfm.tl.impute(cells, model, target_depth="a1", genes=wanted, key_added="deep", copy=True)
    assert "deep" not in cells.obsm
    table = copy.obsm["deep"]
    assert list(table.columns) == wanted and list(table.index) == list(cells.obs_names)
    whole = scfm.tl.impute(cells, model, target_depth="a1", copy=True).layers["scfoundation_imputed"]
    column = list(cells.var_names).index("GENE7")
    np.testing.assert_array_equal(table["GENE7"], whole[:, column])
    assert np.isfinite(table["GENE3"]).all()
    with pytest.raises(InvalidArgumentError, match="NOT_A_GENE"):
        scfm.tl.impute(cells, model, target_depth="a1", genes=["NOT_A_GENE"])


def test_company_and_batches_change_nothing(model, cells) -> None:
    whole = scfm.tl.impute(cells, model, target_depth="f5", copy=True).layers["scfoundation_imputed"]
    some = cells[[4, 1]].copy()
    scfm.tl.impute(some, model, target_depth="f5", token_budget=1)
    np.testing.assert_array_equal(some.layers["scfoundation_imputed"], whole[[4, 1]])


@pytest.mark.parametrize(
    ("target", "text"), [(10_000, "t4.0"), (1e5, "t5.0"), ("a1", "a1"), (np.float32(100), "t2.0")]
)
def test_targets(target, text: str) -> None:
    assert target_of(target) == text


@pytest.mark.parametrize(
    "target", ["4", "t", "t-1", "t0", "f0", "x4", "tnan", 1, -5, True, np.inf, None, [4]]
)
def test_no_targets(model, cells, target) -> None:
    with pytest.raises(InvalidArgumentError, match="target"):
        scfm.tl.impute(cells, model, target_depth=target)


def test_what_is_wrong_is_said(model, cells, tiny_model) -> None:
    with pytest.raises(InvalidArgumentError, match="geneformer"):
        scfm.tl.impute(cells, tiny_model, target_depth="t4")
    logged = cells.copy()
    logged.X = np.log1p(logged.X.toarray() * 0.7)
    with pytest.raises(NotCountsError):
        scfm.tl.impute(logged, model, target_depth="t4")
    empty = cells.copy()
    empty.X = sp.csr_matrix(np.where(np.arange(6)[:, None] == 2, 0, empty.X.toarray()))
    with pytest.raises(BadCellError, match="rows 2"):
        scfm.tl.impute(empty, model, target_depth="t4")
    scfm.tl.impute(empty, model, target_depth="t4", on_bad_cell="nan")
    rows = np.isnan(empty.layers["scfoundation_imputed"]).all(axis=1)
    assert rows.tolist() == [False, False, True, False, False, False]
    last = cells[[0, 1, 2]].copy()
    last.X = sp.csr_matrix(np.where(np.arange(3)[:, None] == 2, 0, last.X.toarray()))
    with pytest.raises(BadCellError, match="rows 2"):
        scfm.tl.impute(last, model, target_depth="t4")
    with pytest.warns(ScfmWarning, match="deeper than the target"):
        scfm.tl.impute(cells, model, target_depth=2)
    with pytest.warns(ScfmWarning, match='variant="gene"'):
        scfm.tl.impute(cells, scfoundation_cells.model(variant="rde"), target_depth="t4")


@pytest.mark.parametrize("ending", ["npy", "h5ad"])
def test_the_command_line_equals_the_function(model, cells, tmp_path, ending: str) -> None:
    cells.X = sp.csr_matrix(np.where(np.isin(np.arange(6), [0, 5])[:, None], 0, cells.X.toarray()))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    folder = model.save(tmp_path / "model")
    out = tmp_path / f"out.{ending}"
    arguments = ["impute", tmp_path / "cells.h5ad", "--model", folder, "-t", "10000", "--out", out]
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--dtype", "float32", "--json"]])
    assert result.exit_code == 0, (result.output, result.exception)
    facts = json.loads(result.stdout)
    assert facts["ok"] and facts["shape"] == [6, NUM_GENES] and facts["target_depth"] == "t4.0"
    scfm.tl.impute(cells, model, target_depth=10_000, on_bad_cell="nan")
    want = cells.layers["scfoundation_imputed"]
    if ending == "npy":
        np.testing.assert_array_equal(np.load(out), want)
        assert (
            json.loads(out.with_name("out.npy.json").read_text())["tokenization"]["report"]["num_empty"] == 2
        )
    else:
        copied = ad.read_h5ad(out)
        np.testing.assert_array_equal(copied.layers["scfoundation_imputed"], want)
        assert copied.uns["scfm"]["scfoundation_imputed"]["units"] == facts["units"]
    wrong = CliRunner().invoke(app, [str(a) for a in [*arguments[:-1], tmp_path / "out.csv"]])
    assert wrong.exit_code == 3


# ---- the report -------------------------------------------------------------------------------------------------


def test_report_stands_beside_baselines(model) -> None:
    adata = scfoundation_cells.counts(30, seed=1)
    adata.X = adata.X * 20
    report = scfm.tl.imputation_report(adata, model, seen_share=0.4, num_neighbors=4)
    rows = {row.name: row for row in report.rows}
    assert report.ours.name == "scfoundation" and len(rows) == 5
    # random weights know nothing: the report must say that the counts themselves are better
    assert rows["scfoundation"].values["squared error"] > rows["seen counts, scaled"].values["squared error"]
    scaled, raw = rows["seen counts, scaled"], rows["seen counts as they are"]
    assert scaled.values["squared error"] < raw.values["squared error"]
    assert report.gains["seen counts, scaled", "correlation"].high < 0
    again = scfm.tl.imputation_report(adata, model, seen_share=0.4, num_neighbors=4)
    assert again.to_dict() == report.to_dict()
    other = scfm.tl.imputation_report(adata, model, seen_share=0.4, num_neighbors=4, seed=1)
    assert other.to_dict() != report.to_dict()


def test_report_would_find_a_better_method(model, monkeypatch) -> None:
    """A prediction that knows the cells' true rates wins over their noisy counts."""
    generator = np.random.default_rng(0)
    rates = (5 + 20 * generator.gamma(0.5, 1.0, size=(1, NUM_GENES))) * np.ones((40, 1))
    adata = ad.AnnData(sp.csr_matrix(generator.poisson(rates)).astype(np.float32))
    adata.var = pd.DataFrame(index=GENES)
    profile = np.log1p(rates[:1] / rates[0].sum() * 1e4)

    def known(self, source, columns, **options):
        for cell in range(len(source)):
            yield np.array([cell]), profile[:, columns].astype(np.float32)

    monkeypatch.setattr(Imputation, "rows", known)
    report = scfm.tl.imputation_report(adata, model)
    assert report.gains["seen counts, scaled", "squared error"].low > 0
    assert report.gains["seen counts, scaled", "correlation"].low > 0


def test_report_refuses_what_cannot_be_split(model, cells) -> None:
    for share in (0.0, 1.0, 2.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="seen_share"):
            scfm.tl.imputation_report(cells, model, seen_share=share)
    one = cells.copy()
    one.X = sp.csr_matrix((one.X.toarray() > 0) & (np.arange(one.n_vars) == 1)).astype(np.float32)
    with warnings.catch_warnings(), pytest.raises(InvalidArgumentError, match="both sides"):
        warnings.simplefilter("ignore")
        scfm.tl.imputation_report(one, model)


def test_baselines_by_hand() -> None:
    counts = sp.csr_matrix(np.array([[2.0, 0.0, 2.0], [0.0, 3.0, 1.0], [4.0, 0.0, 0.0], [0.0, 5.0, 0.0]]))
    np.testing.assert_allclose(shares_of(counts).toarray()[0], [0.5, 0, 0.5])
    np.testing.assert_allclose(log_profiles(shares_of(counts)).toarray()[3], [0, np.log1p(1e4), 0])
    alone = smoothed_over_neighbors(counts, num_neighbors=1)
    np.testing.assert_allclose(alone.toarray(), shares_of(counts).toarray())
    everyone = smoothed_over_neighbors(counts, num_neighbors=9).toarray()
    np.testing.assert_allclose(everyone, np.tile(shares_of(counts).toarray().mean(0), (4, 1)))
    with pytest.raises(InvalidArgumentError, match="cell 1"):
        shares_of(np.array([[1.0], [0.0]]))
    truth = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(cell_errors(truth + np.array([[2.0], [0.0]]), truth), [4.0, 0.0])
    np.testing.assert_allclose(cell_correlations(-truth, truth), [-1.0, 0.0])
