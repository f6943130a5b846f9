"""Small scGPTs with fresh weights, and cells for them."""

from __future__ import annotations

import numpy as np

import scfm
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from scfm.tokenize.scgpt_vocab import ScgptVocab

NUM_GENES = 120
GENES = [f"GENE{i}" for i in range(NUM_GENES)]
PAD, CLS, EOC = NUM_GENES, NUM_GENES + 1, NUM_GENES + 2
# One of each part, in as few models as they fit together.
PARTS = {
    "released": {"mvc_style": "inner product", "has_flags": True},
    "batches": {
        "mvc_style": "inner product",
        "explicit_zeros": True,
        "num_classes": 4,
        "adversary": True,
        "use_batch_labels": True,
        "num_batch_labels": 3,
        "batch_norm": "domain",
    },
    "plain norm": {"batch_norm": "plain", "cell_style": "avg-pool", "num_classes": 2},
    "weighted": {"cell_style": "w-pool", "mvc_style": "inner product, detach", "explicit_zeros": True},
    "category": {"value_style": "category", "num_value_ids": 53, "pad_value": 51.0, "mask_value": 52.0},
    "scaling": {"value_style": "scaling", "mvc_style": "concat query"},
    "multi-omic": {
        "num_modalities": 5,
        "joint_mvc": True,
        "mvc_style": "inner product",
        "use_batch_labels": True,
        "num_batch_labels": 3,
    },
    "sum query": {"mvc_style": "sum query", "pre_norm": True, "has_flags": True},
    "spatial": {"num_experts": 4, "has_imputation": True, "mvc_style": "inner product"},
    "generator": {
        "perturbation": True,
        "pert_pad_id": 0,
        "explicit_zeros": True,
        "adaptive_bias": True,
        "decoder_activation": "Sigmoid",
    },
}


def vocab() -> ScgptVocab:
    return ScgptVocab.from_dict({gene: i for i, gene in enumerate([*GENES, "<pad>", "<cls>", "<eoc>"])})


def config(**parts) -> ScgptConfig:
    shape = {"hidden_size": 32, "num_heads": 2, "ffn_size": 48, "num_layers": 2, "max_tokens": 100}
    return ScgptConfig(vocab_size=NUM_GENES + 3, **shape, **parts)


def model(name: str = "released", *, seed: int = 0, **parts) -> Scgpt:
    """Weights spread widely enough that every token matters."""
    made = Scgpt.from_config(config(**{**PARTS[name], **parts}), vocab(), seed=seed)
    generator = np.random.default_rng(seed)
    for buffer in made.buffers():
        buffer.copy_(buffer.new_tensor(generator.uniform(0.5, 1.5, size=buffer.shape)))
    return made


def cells(num_cells: int, *, seed: int = 0, longest: int = 94, cls_value: float = -2.0) -> scfm.PackedCells:
    """<cls> and some genes with bins 1 to 50 in each; the first cell has <cls> alone."""
    generator = np.random.default_rng(seed)
    lengths = [0, *generator.integers(1, longest, size=num_cells - 1)]
    genes = [[CLS, *generator.permutation(NUM_GENES)[:n].tolist()] for n in lengths]
    values = [[cls_value, *generator.integers(1, 51, size=n).tolist()] for n in lengths]
    return scfm.PackedCells.from_lists(genes, values)


def beside(made: Scgpt, packed: scfm.PackedCells) -> dict:
    """What forward of this model takes beside the pack, by each cell's id and each token's gene."""
    found = {}
    tokens = packed.token_ids.numpy()
    if made.config.use_batch_labels or made.config.batch_norm == "domain":
        found["batch_labels"] = packed.cell_ids.numpy() % 3
    if made.config.num_modalities:
        found["modalities"] = tokens.astype(np.int64) % 2
    if made.config.perturbation:
        found["pert_flags"] = (tokens.astype(np.int64) % 7) == 0
        found["pert_flags"] = found["pert_flags"].astype(np.int64)
    return found
