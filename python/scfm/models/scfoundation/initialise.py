"""Fresh weights for a scFoundation, as the original's modules draw theirs: torch's defaults for every kind of module.

Source: torch.nn's Linear, Embedding, MultiheadAttention and LayerNorm, of which MaeAutobin consists.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from scfm.models.nn.encoder import EncoderLayer
from scfm.models.nn.linear import Linear
from scfm.models.scfoundation.model import Scfoundation
from scfm.models.scfoundation.value_embedding import Affine, Table


@torch.no_grad()
def initialise(model: Scfoundation, *, seed: int) -> None:
    """Equal seeds give equal weights, whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Table):
            module.weight.normal_(generator=generator)
        elif isinstance(module, Linear | Affine):
            bound = module.weight.shape[1] ** -0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            module.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for layer in model.layers:
        assert isinstance(layer, EncoderLayer)
        # MultiheadAttention draws its joined projection as one matrix and begins without biases.
        bound = math.sqrt(6.0 / sum(layer.qkv.weight.shape))
        layer.qkv.weight.uniform_(-bound, bound, generator=generator)
        layer.qkv.bias.zero_()
        layer.attention_out.bias.zero_()
    model.decoder.performer.initialise(generator, seed=seed)
