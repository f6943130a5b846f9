"""Fixtures shared by all tests: where goldens and real cells lie, and a clean native state."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import pytest

from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.tokenize.dictionaries import GeneformerDictionaries
from tiny_cells import GENES, counts_of


def _folder(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value and Path(value).is_dir() else None


@pytest.fixture(scope="session")
def goldens() -> Callable[[str], Path]:
    """goldens("geneformer/tokenizer") -> that folder of the authors' outputs; skips without $SCFM_GOLDENS."""

    def find(sub: str) -> Path:
        root = _folder("SCFM_GOLDENS")
        if root is None:
            pytest.skip("SCFM_GOLDENS does not name a folder with the authors' outputs")
        if not (root / sub).exists():
            pytest.skip(f"{sub} is not in SCFM_GOLDENS")
        return root / sub

    return find


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """data_file("pbmc3k_labeled.h5ad") -> that set of real cells; skips without $SCFM_DATA."""

    def find(name: str) -> Path:
        root = _folder("SCFM_DATA")
        if root is None or not (root / name).exists():
            pytest.skip(f"SCFM_DATA does not hold {name}")
        return root / name

    return find


@pytest.fixture(scope="session")
def tiny_vocab() -> GeneformerDictionaries:
    """V2 dictionaries of 120 genes."""
    medians = {gene: 0.5 + (i * 37 % 101) / 10 for i, gene in enumerate(GENES)}
    return GeneformerDictionaries.from_vocabulary(GENES, medians, version="V2")


@pytest.fixture
def tiny_model(tiny_vocab: GeneformerDictionaries) -> Geneformer:
    """Two layers of width 32 with fresh weights, spread widely enough that every token matters."""
    config = GeneformerConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        ffn_size=64,
        max_tokens=96,
        vocab_size=len(GENES) + 4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.3,
    )
    return Geneformer.from_config(config, tiny_vocab, seed=1)


@pytest.fixture
def tiny_adata() -> ad.AnnData:
    """40 cells x 120 genes with Ensembl ids; obs["kind"] names the three kinds."""
    adata = ad.AnnData(counts_of(), var=pd.DataFrame(index=GENES))
    adata.obs["kind"] = pd.Categorical([f"kind{i % 3}" for i in range(adata.n_obs)])
    return adata


@pytest.fixture(scope="session")
def ranks() -> Iterator[Any]:
    """distributed/dist_run.py's Ranks, one server of them for all tests: torch is imported once."""
    sys.path.append(str(Path(__file__).parent / "distributed"))
    from dist_run import Ranks

    with Ranks() as started:
        yield started
