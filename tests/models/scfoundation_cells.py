"""Small scFoundations with fresh weights, cells for them, the authors' file, and the goldens' cells."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import scfm
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scfoundation.model import Scfoundation
from scfm.models.scfoundation.names import their_name
from scfm.tokenize.scfoundation_genes import GENES_FILE, ScfoundationGenes

NUM_GENES = 90
GENES = [f"GENE{i}" for i in range(NUM_GENES)]
ATOL = 5e-5  # the goldens' own tolerance in float32


def config(**changed) -> ScfoundationConfig:
    shape = {
        "num_genes": NUM_GENES,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_size": 128,
        "decoder_size": 24,
        "decoder_layers": 2,
        "decoder_heads": 3,
        "decoder_head_dim": 16,
        "decoder_features": 44,
        "num_bins": 20,
        "variant": "cell",
    }
    return ScfoundationConfig(**{**shape, **changed})


def model(*, seed: int = 0, **changed) -> Scfoundation:
    return Scfoundation.from_config(config(**changed), ScfoundationGenes.of(GENES), seed=seed)


def counts(num_cells: int = 12, *, seed: int = 0, num_genes: int = NUM_GENES) -> ad.AnnData:
    """Raw counts of cells of very different depths; each has some."""
    generator = np.random.default_rng(seed)
    depth = np.geomspace(0.05, 3.0, num_cells)
    x = generator.poisson(generator.gamma(0.5, 2.0, size=(num_cells, num_genes)) * depth[:, None])
    x[:, :2] += 3
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(num_genes)])
    return ad.AnnData(sp.csr_matrix(x.astype(np.float32)), var=var)


def authors_config(shape: ScfoundationConfig) -> dict:
    """The configuration of such a model as models.ckpt keeps it."""
    both = {"seq_len": shape.vocab_size, "norm_first": False}
    encoder = {
        "hidden_dim": shape.hidden_size,
        "depth": shape.num_layers,
        "heads": shape.num_heads,
        "dim_head": 64,
        "module_type": "transformer",
    }
    decoder = {
        "hidden_dim": shape.decoder_size,
        "depth": shape.decoder_layers,
        "heads": shape.decoder_heads,
        "dim_head": shape.decoder_head_dim,
        "module_type": "performer",
    }
    inner = {
        "seq_len": shape.vocab_size,
        "encoder": {**encoder, **both},
        "decoder": {**decoder, **both},
        "pad_token_id": 103,
        "mask_token_id": 102,
        "bin_num": 7,
        "bin_alpha": 1.0,
        "model": "mae_autobin",
    }
    data = {"bin_num": shape.num_bins, "value_mask_prob": 0.3, "zero_mask_prob": 0.03}
    return {
        "model": "mae_autobin",
        "model_config": {"mae_autobin": inner},
        "dataset_config": {"rnaseq": data},
    }


def authors_entry(made: Scfoundation) -> dict:
    state = {f"model.{their_name(name)}": tensor for name, tensor in made.state_dict().items()}
    return {"config": authors_config(made.config), "state_dict": state}


def released(folder: Path, **models: Scfoundation) -> Path:
    """models.ckpt of these variants, and the genes beside it."""
    folder.mkdir(exist_ok=True)
    torch.save({name: authors_entry(made) for name, made in models.items()}, folder / "models.ckpt")
    (folder / GENES_FILE).write_text(ScfoundationGenes.of(GENES).to_tsv())
    return folder / "models.ckpt"


class Goldens:
    """The authors' outputs and the cells that they were made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with np.load(folder / "expected.npz", allow_pickle=False) as found:
            self.arrays = {name: found[name] for name in found.files}
        self.genes = [str(name) for name in self.arrays["gene_names"]]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def load(self, variant: str) -> Scfoundation:
        return scfm.load(self.folder / "models.ckpt", variant=variant, dtype="float32")

    def matrix(self, name: str) -> sp.csr_matrix:
        parts = (self[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
        return sp.csr_matrix(tuple(parts), shape=self[f"{name}_shape"])

    def adata(self, x: sp.csr_matrix) -> ad.AnnData:
        return ad.AnnData(x.astype(np.float64), var=pd.DataFrame(index=self.genes))

    def counts(self) -> ad.AnnData:
        return self.adata(self.matrix("counts"))

    def normalized(self) -> ad.AnnData:
        """ln(1 + CP10k) of the counts, as the authors' norm.csv holds it."""
        x = self.matrix("counts").astype(np.float64)
        totals = np.asarray(x.sum(1)).ravel()
        x.data = np.log1p(x.data / np.repeat(totals, np.diff(x.indptr)) * 1e4)
        return self.adata(x)

    def appended(self) -> ad.AnnData:
        """Normalised values with each cell's raw total in obs."""
        whole = self.matrix("append").tocsc()
        cells = self.adata(whole[:, :-1].tocsr())
        cells.X = cells.X.astype(np.float32)
        cells.obs["total"] = whole[:, -1].toarray().ravel()
        return cells

    def bulk(self) -> ad.AnnData:
        return self.adata(self.matrix("bulk"))

    def padded(self) -> tuple[scfm.PackedCells, np.ndarray]:
        """The four cells of the padded batch, and bool (4, L), what is no padding."""
        real = ~self["batch4/pad"]
        lists = [
            [a[cell][real[cell]].tolist() for cell in range(4)]
            for a in (self["batch4/pos"], self["batch4/x"])
        ]
        return scfm.PackedCells.from_lists(*lists), real
