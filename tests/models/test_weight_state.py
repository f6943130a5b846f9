"""What is kept for inference follows the weights, also those that a fused optimiser writes without telling torch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from scfm.data.packed import PackedCells
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.models.nn.derived import Derived
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt


def geneformer() -> Geneformer:
    shape = GeneformerConfig(
        num_layers=1, hidden_size=32, num_heads=2, ffn_size=32, max_tokens=16, vocab_size=40
    )
    return Geneformer.from_config(shape, seed=1)


def scgpt() -> Scgpt:
    shape = ScgptConfig(
        vocab_size=40, hidden_size=32, num_heads=2, ffn_size=32, num_layers=1, dropout=0.0, max_tokens=16
    )
    return Scgpt.from_config(shape, seed=1)


def cells() -> PackedCells:
    rng = np.random.default_rng(0)
    tokens = [rng.permutation(30)[:n] + 3 for n in (5, 9)]
    return PackedCells.from_lists(tokens, [np.arange(1.0, len(t) + 1) for t in tokens])


def hidden(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.forward(cells()).hidden.clone()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [geneformer, scgpt])
def test_inference_between_steps_uses_the_weights_of_the_moment(make, dtype: str, fused: bool) -> None:
    model = make().set_compute_dtype(dtype).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    before = hidden(model)
    model.forward(cells()).hidden.square().sum().backward()
    optimizer.step()
    now = hidden(model)
    assert not torch.equal(now, before)
    # A copy has kept nothing: other memory.
    assert torch.equal(now, hidden(copy.deepcopy(model)))


def test_nothing_is_worked_out_twice_between_steps() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    calls = []
    kept = Derived()

    def compute() -> torch.Tensor:
        calls.append(1)
        return weight * 2

    for _ in range(3):
        kept.of([weight], compute)
    assert len(calls) == 1
    with torch.no_grad():
        weight.add_(1)
    assert float(kept.of([weight], compute)[0]) == 4.0 and len(calls) == 2
