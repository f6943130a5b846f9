"""What a scFoundation's forward gives back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from scfm.models.output import ModelOutput


class ScfoundationOutput(ModelOutput):
    """hidden: float32 (T, hidden_size), the encoder's states after its last norm; hidden_states as asked for.

    prediction: float32 (C, vocab_size), ln(1 + CP10k) of every gene at the target's read depth, and behind the genes
    two numbers for T and S that mean nothing. The decoder computes it when it is first read. There are no logits.
    """

    def __init__(
        self, hidden: Tensor, *, predict: Callable[[Tensor], Tensor], hidden_states: tuple[Tensor, ...] | None
    ) -> None:
        super().__init__(hidden, hidden_states=hidden_states)
        self._predict = predict

    @cached_property
    def prediction(self) -> Tensor:
        with self.as_in_forward():
            return self._predict(self.hidden)
