"""Which module stands at each place of a scGPT, by its config."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from scfm.errors import InvalidArgumentError
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.decoders import AffineDecoder, ExpressionDecoder, MixtureDecoder
from scfm.models.scgpt.encoders import CategoryValues, ContinuousValues
from scfm.models.scgpt.mvc import MvcDecoder

Part = TypeVar("Part", bound=nn.Module)


def value_encoder(config: ScgptConfig) -> ContinuousValues | CategoryValues | None:
    """None for "scaling", where values multiply the gene's embedding."""
    if config.value_style == "continuous":
        return ContinuousValues(config.hidden_size, config.num_bins)
    if config.value_style == "category":
        pad = int(config.pad_value)
        frozen = pad if 0 <= pad < config.num_value_ids else None
        return CategoryValues(config.num_value_ids, config.hidden_size, frozen_row=frozen)
    return None


def expression_decoder(config: ScgptConfig) -> ExpressionDecoder | MixtureDecoder | AffineDecoder:
    size = config.hidden_size
    if config.num_experts:
        return MixtureDecoder(size, config.num_experts, config.experts_per_token)
    if config.perturbation:
        return AffineDecoder(
            size,
            explicit_zeros=config.explicit_zeros,
            activation=config.decoder_activation,
            adaptive_bias=config.adaptive_bias,
        )
    return ExpressionDecoder(size + config.context_size, size, explicit_zeros=config.explicit_zeros)


def mvc_decoder(config: ScgptConfig) -> MvcDecoder | None:
    if config.mvc_style is None:
        return None
    size = config.hidden_size
    cells = size + config.context_size
    return MvcDecoder(
        cells if config.joint_mvc else size,
        cells,
        style=config.mvc_style,
        explicit_zeros=config.explicit_zeros,
    )


def required(part: Part | None, where: str, what: str) -> Part:
    """The part, or InvalidArgumentError saying that the model lacks it."""
    if part is None:
        raise InvalidArgumentError(
            f"this model has no {what}", where=where, hint="model.load_report says what its file held."
        )
    return part
