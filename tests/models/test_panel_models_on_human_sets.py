"""The two families that are one checkpoint file and a gene list, from the command line on every set of human cells."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
from typer.testing import CliRunner

from models.human_sets import HUMAN_SETS
from scfm.cli.main import app

# family: (checkpoint, gene list, hidden numbers a cell)
FILES = {
    "scbert": ("scbert/full16907.pth", "scbert/panglao_gene_order_16906.txt", 20),
    "scfoundation": ("scfoundation/models.ckpt", "scfoundation/OS_scRNA_gene_index.19264.tsv", 4 * 32),
}


@pytest.mark.golden
@pytest.mark.data
@pytest.mark.parametrize("name", HUMAN_SETS)
@pytest.mark.parametrize("family", FILES)
def test_every_human_set(goldens, data_file, tmp_path, family: str, name: str) -> None:
    checkpoint, genes, size = FILES[family]
    some, out = tmp_path / name, tmp_path / "out.npy"
    ad.read_h5ad(data_file(name), backed="r")[:12].to_memory().write_h5ad(some)
    model = ["--model", str(goldens(checkpoint)), "--family", family, "--genes", str(goldens(genes))]
    done = CliRunner().invoke(app, ["embed", str(some), *model, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.splitlines()[-1])
    found = np.load(out)
    assert facts["shape"] == list(found.shape) == [12, size]
    assert np.isfinite(found).all()
    assert facts["tokenization"]["report"]["coverage"]["share_of_genes"] > 0.4
