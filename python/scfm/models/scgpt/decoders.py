"""scGPT's decoders of expression, each from a token's hidden state to one number (and the chance that it is not zero).

    plain:    fc(h) = W3 leaky(W2 leaky(W1 h))            zero probability: sigmoid of another such network
    mixture:  sum over the two best of four fc's, weighted by a gate (scGPT-spatial)
    affine:   coefficient(h) * value + bias(h)            (the perturbation generator)

The original calls "zero probability" what is the probability that a gene is expressed: P(value > 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scfm.models.nn.linear import Linear


@dataclass(frozen=True)
class Expression:
    """prediction: float32 (T,), in the units of the values (bins, or log1p); zero_probability: (T,) or None."""

    prediction: Tensor
    zero_probability: Tensor | None = None


class ToOne(nn.Module):
    """A linear layer with one output, in float32. (N, in_features) -> (N,).

    A sum of products row by row: matrix libraries choose other orders of summation for other numbers of rows.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, in_features))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * self.weight).sum(-1) + self.bias


class ExpressionDecoder(nn.Module):
    """in_size is twice the hidden size where batch or modality enter beside the hidden state."""

    def __init__(self, in_size: int, hidden_size: int, *, explicit_zeros: bool) -> None:
        super().__init__()
        self.fc = _to_one_number(in_size, hidden_size)
        self.zero_logit = _to_one_number(in_size, hidden_size) if explicit_zeros else None

    def forward(self, hidden: Tensor, values: Tensor | None = None) -> Expression:
        """hidden: (T, in_size)."""
        zeros = None if self.zero_logit is None else row_stable(torch.sigmoid, self.zero_logit(hidden))
        return Expression(self.fc(hidden), zeros)


class Gate(nn.Module):
    """How much each expert counts for each token: softmax, the best few, made to sum to one."""

    def __init__(self, hidden_size: int, num_experts: int, num_chosen: int) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, num_experts)
        self.num_chosen = num_chosen

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts of each token, float32 and int64 (T, num_chosen)."""
        weights, experts = torch.softmax(self.gate(hidden).float(), dim=-1).topk(self.num_chosen, dim=-1)
        return weights / weights.sum(-1, keepdim=True), experts


class Experts(nn.Module):
    """Each token's number from its chosen experts only; the original computes all four."""

    def __init__(self, hidden_size: int, num_experts: int, num_chosen: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            ExpressionDecoder(hidden_size, hidden_size, explicit_zeros=False) for _ in range(num_experts)
        )
        self.gate = Gate(hidden_size, num_experts, num_chosen)

    def forward(self, hidden: Tensor) -> Tensor:
        weights, chosen = self.gate(hidden)
        parts = hidden.new_zeros(chosen.shape, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            parts = parts.index_put((rows, places), expert(hidden.index_select(0, rows)).prediction)
        mixed: Tensor = (parts * weights).sum(-1)
        return mixed


class MixtureDecoder(nn.Module):
    """scGPT-spatial's decoder."""

    def __init__(self, hidden_size: int, num_experts: int, num_chosen: int) -> None:
        super().__init__()
        self.moe = Experts(hidden_size, num_experts, num_chosen)

    def forward(self, hidden: Tensor, values: Tensor | None = None) -> Expression:
        return Expression(self.moe(hidden))


class AffineDecoder(nn.Module):
    """The perturbation generator's: how the unperturbed value is scaled and shifted.

    activation: name of a torch.nn module applied to both; adaptive_bias: the shift is multiplied by the mean of the
    cell's non-zero values.
    """

    def __init__(
        self, hidden_size: int, *, explicit_zeros: bool, activation: str | None, adaptive_bias: bool
    ) -> None:
        super().__init__()
        self.coeff_decoder = ExpressionDecoder(hidden_size, hidden_size, explicit_zeros=explicit_zeros)
        # Its zero probabilities are never read, but the released files hold them.
        self.bias_decoder = ExpressionDecoder(hidden_size, hidden_size, explicit_zeros=explicit_zeros)
        self.activation: nn.Module = nn.Identity() if activation is None else getattr(nn, activation)()
        self.adaptive_bias = adaptive_bias

    def forward(self, hidden: Tensor, values: Tensor, cell_of_token: Tensor, num_cells: int) -> Expression:
        """values: float32 (T,) unperturbed expression; cell_of_token: int64 (T,)."""
        coefficient = self.coeff_decoder(hidden)
        bias = row_stable(self.activation, self.bias_decoder.fc(hidden))
        if self.adaptive_bias:
            zeros = values.new_zeros(num_cells)
            sums = zeros.index_add(0, cell_of_token, values)
            counts = zeros.index_add(0, cell_of_token, (values != 0).to(values.dtype))
            bias = bias * (sums / counts)[cell_of_token]
        prediction = row_stable(self.activation, coefficient.prediction) * values + bias
        return Expression(prediction, coefficient.zero_probability)


def row_stable(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function of a few numbers, through float64.

    torch computes what is left over at the end of a vector by other means than the rest, and the last bit of a
    number would depend on where it stands.
    """
    return function(x.double()).float()


def _to_one_number(in_size: int, hidden_size: int) -> nn.Sequential:
    return nn.Sequential(
        Linear(in_size, hidden_size),
        nn.LeakyReLU(),
        Linear(hidden_size, hidden_size),
        nn.LeakyReLU(),
        ToOne(hidden_size),
    )
