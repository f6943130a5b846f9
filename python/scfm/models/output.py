"""What a model's forward gives back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor


class ModelOutput:
    """Hidden states and heads of one packed batch.

    hidden: float32 (T, hidden_size), after the last layer's norm.
    hidden_states: (h0, h1 .. hL), h0 the embedding output; None unless asked for.
    logits: float32 (T, vocab_size), masked-gene prediction; computed when first read, since a vocabulary-wide
    row for every token is the largest tensor of all and most callers never look at it.
    """

    def __init__(
        self,
        hidden: Tensor,
        *,
        hidden_states: tuple[Tensor, ...] | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.hidden = hidden
        self.hidden_states = hidden_states
        self._head = head
        self._with_gradients = torch.is_grad_enabled()

    @cached_property
    def logits(self) -> Tensor:
        if self._head is None:
            raise AttributeError("this model has no masked-gene head")
        with self.as_in_forward():
            return self._head(self.hidden)

    def as_in_forward(self) -> AbstractContextManager[None]:
        """Within: gradients are kept if the forward kept them, wherever a head is read."""
        manager: AbstractContextManager[None] = torch.set_grad_enabled(self._with_gradients)
        return manager
