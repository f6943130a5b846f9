"""Every output of the authors' get_embedding.py, layer and masked prediction, from their file on their inputs."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch

import scfm
from models.scfoundation_cells import ATOL, Goldens

pytestmark = [pytest.mark.golden, pytest.mark.filterwarnings("ignore::scfm.ScfmWarning")]

# name of the run: variant, the tokenizer's options, pooling, which cells
RUNS = {
    "cell_all_t4_F_ce": ("cell", {}, "all", Goldens.counts),
    "cell_max_f1_F_ce": ("cell", {"target": "f1"}, "max", Goldens.counts),
    "cell_all_a5_F_rde": ("rde", {"target": "a5"}, "all", Goldens.counts),
    "cell_all_f4_F_rde": ("rde", {"target": "f4"}, "all", Goldens.counts),
    "cell_all_t4_T_ce": ("cell", {"pre_normalized": "T"}, "all", Goldens.normalized),
    "cell_all_f1_A_ce": (
        "cell",
        {"pre_normalized": "A", "total_counts": "total", "target": "f1"},
        "all",
        Goldens.appended,
    ),
    "bulk_cell_all_F": ("cell", {"input_type": "bulk"}, "all", Goldens.bulk),
    "bulk_cell_max_T": ("cell", {"input_type": "bulk", "pre_normalized": "T"}, "max", Goldens.bulk),
}
APPENDED = {"pre_normalized": "A", "total_counts": "total", "target": "f1"}


@pytest.fixture(scope="module")
def stored(goldens) -> Goldens:
    return Goldens(goldens("scfoundation"))


@pytest.fixture(scope="module")
def gene_model(stored):
    return stored.load("gene")


def close(ours, want, atol: float = ATOL) -> None:
    np.testing.assert_allclose(np.asarray(ours), want, rtol=0, atol=atol)


@pytest.mark.parametrize("name", RUNS)
def test_cell_embeddings(stored, name: str) -> None:
    variant, options, pooling, cells = RUNS[name]
    args = str(stored[f"args/{name}"]).split()
    model = stored.load(variant).with_input(**options)
    assert (args[2], args[4]) == (pooling, model.tokenizer.options.pre_normalized)
    data = cells(stored)
    together = model.embed(data, pooling=pooling)
    close(together, stored[f"out/{name}"])
    alone = model.embed(model.tokenize(data), pooling=pooling, token_budget=1)
    np.testing.assert_array_equal(alone, together)


def test_fewer_genes_in_another_order(stored) -> None:
    shuffled = stored.counts()[:, stored["sub_columns"].astype(str)].copy()
    close(stored.load("cell").embed(shuffled), stored["out/cell_all_t4_F_ce_15k"])


def test_float64(stored) -> None:
    model = stored.load("cell").double().set_compute_dtype(torch.float64)
    with torch.inference_mode():
        found = model.embed_batch(model.tokenize(stored.counts()), layer=0, pooling="all")
    assert found.dtype == torch.float64
    # values are float32 here and float64 there
    close(found, stored["out_f64/cell_all_t4_F_ce"], atol=1e-7)


def test_tokens_and_layers(stored) -> None:
    model = stored.load("cell")
    packed, real = stored.padded()
    tokens = model.tokenize(stored.counts())
    assert torch.equal(tokens.token_ids, packed.token_ids) and torch.equal(tokens.values, packed.values)
    with torch.inference_mode():
        close(model.token_emb(packed.values), stored["batch4/token_emb"][real])
        first = torch.cat([packed.values[start : start + 8] for start in packed.cu_seqlens[:-1].tolist()])
        close(model.token_emb.bin_weights(first), stored["batch4/bin_weight_first8"].reshape(-1, 100))
        close(model.forward(packed).hidden, stored["batch4/enc"][real])
        alone = model.forward(packed.select([0]), output_hidden_states=True).hidden_states
    for ours, want in zip(alone, stored["cell0/layers"], strict=True):
        close(ours, want[0])


def test_predicted_expression(stored, gene_model) -> None:
    packed = gene_model.tokenize(stored.counts())
    with torch.inference_mode():
        found = gene_model.forward(packed).prediction[:, :-2]
    close(found, stored["out/geneexpr_t4_F"])
    one_by_one = np.concatenate(list(gene_model.predictions(packed.select([3, 0]))))
    np.testing.assert_array_equal(one_by_one, found.numpy()[[3, 0]])


@pytest.mark.parametrize(("scope", "name"), [("cell", "gene_f1_A"), ("batch", "genebatch_f1_A")])
def test_gene_embeddings(stored, gene_model, scope: str, name: str) -> None:
    model = gene_model.with_input(**APPENDED)
    genes, found = model.gene_embeddings(stored.appended(), per_cell=True, kmax_scope=scope)
    assert genes == stored.genes
    close(found[:, ::7], stored[f"out/{name}/every7"])
    close(found.mean(1), stored[f"out/{name}/mean"])


def test_gene_embeddings_tell_the_two_readings_apart(stored) -> None:
    apart = np.abs(stored["out/gene_f1_A/every7"] - stored["out/genebatch_f1_A/every7"]).max()
    assert apart > 100 * ATOL


def test_masked_prediction(stored, gene_model) -> None:
    cells = gene_model.tokenize(stored.counts()).select([0, 1])
    rows, columns = stored["masked/mask_rc"]
    cell = np.repeat([0, 1], cells.lengths.numpy())
    ids, values = cells.token_ids.numpy(), cells.values.numpy()
    kept = ~np.isin(cell * 20_000 + ids, rows * 20_000 + columns)
    shown = [[of[kept & (cell == c)].tolist() for c in (0, 1)] for of in (ids, values)]
    masked = [columns[rows == c].tolist() for c in (0, 1)]
    late = scfm.PackedCells.from_lists(masked, [[gene_model.config.mask_value] * len(one) for one in masked])
    with torch.inference_mode():
        out = gene_model.forward(scfm.PackedCells.from_lists(*shown), late=late, kmax_scope="batch")
    close(out.prediction, stored["masked/pred"])
    truth = np.zeros(out.prediction.shape)
    truth[cell, ids] = values
    loss = (out.prediction.numpy()[rows, columns] - truth[rows, columns]) ** 2
    assert loss.mean() == pytest.approx(float(stored["masked/mse_masked"]), abs=1e-5)


def test_every_array_is_accounted_for(stored) -> None:
    """What the tests above compare, and what they read their cells from."""
    inputs = {"cell_names", "gene_names", "sub_columns"}
    inputs |= {
        f"{m}_{p}" for m in ("counts", "append", "bulk") for p in ("data", "indices", "indptr", "shape")
    }
    compared = {f"out/{name}" for name in RUNS} | {"out/cell_all_t4_F_ce_15k", "out/geneexpr_t4_F"}
    compared |= {
        f"out/{name}/{part}" for name in ("gene_f1_A", "genebatch_f1_A") for part in ("every7", "mean")
    }
    compared |= {f"batch4/{part}" for part in ("x", "pad", "pos", "token_emb", "bin_weight_first8", "enc")}
    compared |= {
        "cell0/layers",
        "out_f64/cell_all_t4_F_ce",
        "masked/mask_rc",
        "masked/pred",
        "masked/mse_masked",
    }
    rest = set(stored.arrays) - inputs - compared
    assert all(name.startswith("args/") for name in rest), sorted(rest)


@pytest.mark.parametrize("name", ["pancreas_human_mouse_baron350.h5ad", "citeseq_ctcl_500.h5ad"])
def test_the_command_line_embeds_real_cells(stored, data_file, tmp_path, name: str) -> None:
    from typer.testing import CliRunner

    from scfm.cli.main import app

    few = ad.read_h5ad(data_file(name))[::15].copy()
    few.write_h5ad(tmp_path / name)
    arguments = ["embed", tmp_path / name, "--model", stored.folder / "models.ckpt", "--variant", "rde"]
    arguments += ["--out", tmp_path / "x.npy", "--dtype", "float32", "--quiet"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    found = np.load(tmp_path / "x.npy")
    assert found.shape == (few.n_obs, 128)
    assert np.isfinite(found).all()
