"""Fresh weights for a scGPT, from the original's distributions: torch's defaults, the gene table from -0.1 to 0.1."""

from __future__ import annotations

import math

import torch
from torch import nn

from scfm.models.nn.linear import Linear
from scfm.models.scgpt.decoders import ToOne
from scfm.models.scgpt.encoders import PlainTable
from scfm.models.scgpt.mvc import WithoutBias
from scfm.models.scgpt.norms import BatchNorm

GENE_RANGE = 0.1


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int) -> None:
    """Draw every weight of ``model`` anew; equal seeds give equal weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, Linear | ToOne | WithoutBias | nn.Linear):
            _linear(module, name, generator)
        elif isinstance(module, nn.Embedding | PlainTable):
            if name == "encoder.embedding":
                nn.init.uniform_(module.weight, -GENE_RANGE, GENE_RANGE, generator=generator)
            else:
                nn.init.normal_(module.weight, generator=generator)
            if isinstance(module, PlainTable) and module.frozen_row is not None:
                module.weight[module.frozen_row] = 0
        elif isinstance(module, nn.LayerNorm | BatchNorm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, 0.25)


def _linear(module: nn.Module, name: str, generator: torch.Generator) -> None:
    """torch's Linear; query, key and value as its MultiheadAttention has them."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    bias = getattr(module, "bias", None)
    in_features = weight.shape[1]
    if name.endswith(".qkv"):
        nn.init.xavier_uniform_(weight, generator=generator)
        nn.init.zeros_(bias)  # type: ignore[arg-type]
        return
    nn.init.uniform_(weight, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
    if bias is None:
        return
    if name.endswith(".attention_out"):
        nn.init.zeros_(bias)
    else:
        nn.init.uniform_(bias, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
