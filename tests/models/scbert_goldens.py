"""scBERT's goldens: the authors' dense tokens as packs, checkpoints with the genes they are of, float64 models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scfm
from scfm.models.nn.linear import Linear
from scfm.models.scbert.model import Scbert

FP32, FP64, GRADIENT = 5e-5, 1e-9, 1e-3


def panel(folder: Path) -> list[str]:
    return (folder / "panglao_gene_order_16906.txt").read_text(encoding="utf-8").split()


def genes_of(folder: Path, expected: Any) -> list[str]:
    """The genes of a small golden model."""
    order = panel(folder)
    return [order[place] for place in expected["gene_index_in_panglao"]]


def pack(tokens: np.ndarray | Tensor) -> scfm.PackedCells:
    """Dense (C, P) bins as a pack of those above 0."""
    dense = np.asarray(tokens)
    places = [np.flatnonzero(cell).astype(np.int32) for cell in dense]
    bins = [cell[chosen].astype(np.float32) for cell, chosen in zip(dense, places, strict=True)]
    return scfm.PackedCells.from_lists(places, bins)


def load(path: Path, genes: Any, **options: Any) -> Scbert:
    model = scfm.load(path, family="scbert", genes=genes, dtype="float32", **options)
    assert isinstance(model, Scbert)
    return model


def in_float64(model: Scbert) -> Scbert:
    model.double()
    for module in model.modules():
        if isinstance(module, Linear):
            module.compute_dtype = torch.float64
    return model


def largest(found: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    """max|difference| in float64."""
    a, b = (torch.as_tensor(x).detach().double() for x in (found, wanted))
    return float((a.reshape(b.shape) - b).abs().max())
