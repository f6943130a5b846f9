"""Formulas of floating-point operations against torch's own counter, on forwards and backwards written in plain torch.

The counter cannot look inside our operators, so they are replaced by their formulas in torch, whose products it sees.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch.utils.flop_counter import FlopCounterMode

import scfm
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scfoundation.model import Scfoundation
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from scfm.ops.favor_attention import favor_attention_reference
from scfm.ops.masked_head_loss import masked_head_loss_reference
from scfm.ops.products import float32_path
from scfm.ops.varlen_attention import varlen_attention_reference
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.train.cost.flops import geneformer_flops, microbatch_flops
from scfm.train.objectives.geneformer_pretraining import GeneformerPretraining
from scfm.train.objectives.scbert_pretraining import ScbertPretraining
from scfm.train.objectives.scfoundation_pretraining import ScfoundationPretraining
from scfm.train.objectives.scgpt_pretraining import ScgptGenerative, ScgptMasked
from scfm.train.objectives.settings import (
    GeneformerSettings,
    ScbertSettings,
    ScfoundationSettings,
    ScgptSettings,
)

LENGTHS = np.array([3, 200, 91, 150, 64])


def generative_attention_by_parts(q, k, v, cu_seqlens, num_known, *, scale=None):
    """Known genes among themselves, unknown ones with the known and themselves: no pair more than there is."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for (start, stop), known in zip(itertools.pairwise(cu_seqlens.tolist()), num_known.tolist(), strict=True):
        queries, keys, values = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        scores = queries @ keys[:, :known].transpose(1, 2) * scale
        own = queries[:, known:].unsqueeze(2) @ keys[:, known:].unsqueeze(3) * scale
        p = torch.softmax(scores[:, :known], -1) @ values[:, :known]
        both = torch.softmax(torch.cat([scores[:, known:], own[..., 0]], -1), -1)
        rest = both[..., :-1] @ values[:, :known]
        rest = rest + (both[..., -1:].unsqueeze(2) @ values[:, known:].unsqueeze(2))[:, :, 0]
        out.append(torch.cat([p, rest], 1).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def plain(monkeypatch) -> None:
    monkeypatch.setattr("scfm.models.nn.encoder.varlen_attention", varlen_attention_reference)
    monkeypatch.setattr("scfm.models.nn.performer.favor_attention", favor_attention_reference)
    monkeypatch.setattr("scfm.models.geneformer.model.masked_head_loss", masked_head_loss_reference)
    monkeypatch.setattr("scfm.models.scgpt.layers.generative_attention", generative_attention_by_parts)
    float32_path(
        torch.device("cpu")
    )  # it tries some products at its first call, which are none of the model's


def counted(loss_of) -> float:
    with FlopCounterMode(display=False) as counter:
        loss_of().backward()
    return float(counter.get_total_flops())


def counted_of(objective, prepared) -> float:
    return counted(lambda: torch.stack([*objective.losses(prepared).values()]).sum())


def pack(lengths, high: int, *, values: bool = True) -> scfm.PackedCells:
    rng = np.random.default_rng(0)
    tokens = [np.sort(rng.permutation(high)[:n]).tolist() for n in lengths]
    bins = [rng.integers(1, 5, n).tolist() for n in lengths]
    return scfm.PackedCells.from_lists(tokens, bins if values else None)


def test_geneformer() -> None:
    config = replace(
        GeneformerConfig.preset("V1-10M", vocab_size=3000),
        num_layers=3, hidden_size=64, num_heads=2, ffn_size=160, max_tokens=256,
    )  # fmt: skip
    genes = [f"G{i}" for i in range(2998)]
    vocab = GeneformerDictionaries.from_vocabulary(genes, dict.fromkeys(genes, 1.0), version="V1")
    objective = GeneformerPretraining(
        Geneformer.from_config(config, vocab), GeneformerSettings(mask_ratio=0.2), seed=0
    )
    prepared = objective.prepare(pack(LENGTHS, 3000, values=False), epoch=0)
    found = microbatch_flops(objective, prepared)
    assert found.model == pytest.approx(counted_of(objective, prepared), rel=0.01)
    tokens, squares = LENGTHS.sum(), (LENGTHS**2).sum()
    layers = 3 * (4 * 64**2 + 2 * 64 * 160)
    by_hand = 6 * layers * tokens + 12 * 3 * 64 * squares + 6 * len(prepared.targets) * 64 * (64 + 3000)
    assert found.model == pytest.approx(by_hand)


def test_what_is_computed_again_is_in_the_hardwares_share_alone() -> None:
    config = GeneformerConfig.preset("V1-10M")
    found = geneformer_flops(config, [1000], num_masked=0)
    once = 2 * config.hidden_size * config.num_layers * 1000**2
    assert found.again == once and found.hardware() == found.model + once
    assert found.blocks == found.model / 3
    assert found.hardware(checkpoint_every=1) == found.hardware() + found.blocks
    assert found.hardware(checkpoint_every=2) == found.hardware() + found.blocks / 2
    assert (found + found).model == (found * 2).model == 2 * found.model


def scgpt(**parts) -> Scgpt:
    shape = {"hidden_size": 96, "num_heads": 3, "ffn_size": 96, "num_layers": 4, "dropout": 0.0}
    return Scgpt.from_config(ScgptConfig(vocab_size=500, **shape, **parts))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("style", [None, "inner product", "inner product, detach", "concat query"])
def test_scgpt_generates(passes: int, style: str | None) -> None:
    settings = ScgptSettings(mvc=float(style is not None), second_pass_after=0)
    objective = ScgptGenerative(scgpt(has_flags=True, mvc_style=style), settings, seed=0)
    objective.at_step(passes - 1)
    assert len(objective.weights) == passes + (style is not None)
    prepared = objective.prepare(pack(LENGTHS, 500), epoch=0)
    found = microbatch_flops(objective, prepared)
    assert found.model == pytest.approx(counted_of(objective, prepared), rel=0.01)


@pytest.mark.parametrize("parts", [{}, {"cce": 1.0}, {"cce": 1.0, "views": "random"}])
def test_scgpt_masked(parts: dict) -> None:
    model = scgpt(mvc_style="inner product", explicit_zeros=True)
    objective = ScgptMasked(model, ScgptSettings(kind="masked", **parts), seed=0)
    prepared = objective.prepare(pack(LENGTHS, 500), epoch=0)
    found = microbatch_flops(objective, prepared)
    assert found.model == pytest.approx(counted_of(objective, prepared), rel=0.01)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("attention", ["favor", "generalized", "unprojected"])
def test_scbert(attention: str, glu: bool) -> None:
    config = ScbertConfig(
        num_genes=399, hidden_size=48, num_layers=2, num_heads=4, head_dim=16, num_features=40, glu=glu,
        attention=attention,
    )  # fmt: skip
    objective = ScbertPretraining(Scbert.from_config(config), ScbertSettings(), seed=0)
    prepared = objective.prepare(pack([40, 7, 120], 399), epoch=0)
    found = microbatch_flops(objective, prepared)
    assert len(prepared.rows) and found.model == pytest.approx(counted_of(objective, prepared), rel=0.01)


def test_scfoundation() -> None:
    config = ScfoundationConfig(
        num_genes=300, hidden_size=64, num_layers=2, num_heads=2, ffn_size=256, decoder_size=48,
        decoder_layers=2, decoder_heads=3, decoder_head_dim=16, decoder_features=40, num_bins=20, dropout=0.0,
    )  # fmt: skip
    model = Scfoundation.from_config(config, ScfoundationGenes.of([f"G{i}" for i in range(300)]))
    objective = ScfoundationPretraining(model, ScfoundationSettings(), seed=0)
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(0.5, 2.0, (4, 300))).astype(np.float32))
    cells = ad.AnnData(counts, var=pd.DataFrame(index=[f"G{i}" for i in range(300)]))
    prepared = objective.prepare(model.tokenize(cells), epoch=0)
    found = microbatch_flops(objective, prepared)
    assert prepared.late.num_tokens and found.model == pytest.approx(
        counted_of(objective, prepared), rel=0.01
    )
