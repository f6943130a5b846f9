"""Memory formulas against what autograd really keeps, and what sharing and recomputing save."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.models.nn.encoder import EncoderLayer
from scfm.models.nn.linear import Linear
from scfm.models.nn.performer import PerformerBlock, PerformerShape
from scfm.train.cost.training_memory import RESERVE, bytes_a_token, training_memory

NUM_TOKENS = 1000


def kept_a_token(block: nn.Module, size: int) -> float:
    """Bytes of the tensors with a row a token that a forward keeps, weights and their copies left out."""
    storages: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        if tensor.dim() and tensor.shape[0] == NUM_TOKENS:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    states = torch.randn(NUM_TOKENS, size, requires_grad=True) * 1.0
    offsets = torch.tensor([0, 400, NUM_TOKENS], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(states, offsets)
    return sum(storages.values()) / NUM_TOKENS


def ready(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in block.modules():
        if isinstance(module, Linear):
            module.compute_dtype = dtype
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    for buffer in block.buffers():
        nn.init.normal_(buffer)
    return block.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"dropout": 0.1, "inner_dropout": True}])
def test_encoder_block(dtype: torch.dtype, options: dict) -> None:
    block = ready(EncoderLayer(64, 4, 160, **options), dtype)
    # A CPU keeps its dropout masks in the dtype of the states.
    found = bytes_a_token(block, element_size=dtype.itemsize, mask_size=dtype.itemsize)
    assert found == kept_a_token(block, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("glu", [False, True])
def test_performer_block(dtype: torch.dtype, glu: bool) -> None:
    shape = PerformerShape(hidden_size=64, num_heads=3, num_layers=1, head_dim=16, num_features=40, glu=glu)
    block = ready(PerformerBlock(shape), dtype)
    assert bytes_a_token(block, element_size=dtype.itemsize) == kept_a_token(block, 64)


def memory(**changes):
    with torch.device("meta"):
        model = Geneformer.from_config(GeneformerConfig.preset("V2-104M"))
    facts = {"element_size": 2, "shards": 1, "microbatches_per_rank": 1, "block_tokens": {EncoderLayer: 8192}}
    return sum(p.numel() for p in model.parameters()), training_memory(model, **(facts | changes))


def test_what_sharing_saves() -> None:
    weights, whole = memory()
    assert whole.weights == whole.gradients == 4 * weights and whole.optimizer == 8 * weights
    assert (
        whole.gathered == 0
        and whole.total == 16 * weights + whole.working_copies + whole.activations + RESERVE
    )
    _, shared = memory(shards=8)
    assert shared.weights == weights // 2 and shared.activations == whole.activations
    assert 0 < shared.gathered < 4 * weights
    _, adding_up = memory(shards=8, microbatches_per_rank=4)
    assert adding_up.gradients - shared.gradients == 4 * weights
    assert memory(element_size=4)[1].working_copies == 0


def test_what_recomputing_saves() -> None:
    num_layers = GeneformerConfig.preset("V2-104M").num_layers
    kept = memory()[1].activations
    block = kept / (num_layers + 1)  # one block more stands for embedding and heads
    every, second = (memory(checkpoint_every=k)[1].activations for k in (1, 2))
    assert every == pytest.approx(4 * 768 * 8192 * num_layers + 2 * block, rel=1e-6)
    assert every < second < kept
