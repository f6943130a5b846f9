"""What scBERT's forward gives back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from scfm.errors import InvalidArgumentError
from scfm.models.output import ModelOutput


class ScbertOutput(ModelOutput):
    """hidden: (C * P, hidden_size), P = num_genes + 1 rows a cell, the slot last; hidden_states: (h0 .. hL) or None.

    logits: (C * P, num_token_ids), scores of the bins; cls: (C, num_classes), scores of the annotation head. Both are
    computed when first read; one that the model lacks raises.
    """

    def __init__(
        self,
        hidden: Tensor,
        *,
        num_positions: int,
        hidden_states: tuple[Tensor, ...] | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        annotation_head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(hidden, hidden_states=hidden_states, head=head)
        self.num_positions = num_positions
        self._annotation_head = annotation_head

    @property
    def by_cell(self) -> Tensor:
        """``hidden`` as (C, P, hidden_size)."""
        return self.hidden.view(-1, self.num_positions, self.hidden.shape[1])

    @cached_property
    def cls(self) -> Tensor:
        if self._annotation_head is None:
            raise InvalidArgumentError(
                "this model has no annotation head",
                where="cls",
                hint="Load a fine-tuned checkpoint, or add one: model.add_annotation_head(class_names).",
            )
        with self.as_in_forward():
            return self._annotation_head(self.hidden)
