"""What scGPT's forward gives back: hidden states, and every head of the model, each computed when first read."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.output import ModelOutput
from scfm.models.scgpt.decoders import Expression
from scfm.models.scgpt.inputs import Inputs
from scfm.models.scgpt.network import ScgptNetwork
from scfm.models.scgpt.padding import Padding


class ScgptOutput(ModelOutput):
    """hidden: float32 (T, hidden_size); hidden_states: (h0 .. hL) or None.

    expression, zero_probabilities: float32 (T,) from the hidden states; mvc, mvc_zero_probabilities: (T,) from the
    cell's embedding; cell_embeddings: (C, hidden_size), not made one long; cls: (C, num_classes) scores;
    batch_logits: (C, num_batch_labels) behind the gradient reversal. Expression is in the units of the values.
    "Zero probability" is the original's name for the probability that a gene is expressed.
    A head that the model lacks raises InvalidArgumentError. padding: in a padded reading, the states at padding.
    """

    def __init__(
        self,
        hidden: Tensor,
        *,
        model: ScgptNetwork,
        inputs: Inputs,
        cells: PackedCells,
        hidden_states: tuple[Tensor, ...] | None = None,
        padding: Padding | None = None,
        padding_states: tuple[Tensor, ...] | None = None,
    ) -> None:
        super().__init__(hidden, hidden_states=hidden_states)
        self.padding = padding
        self.padding_states = padding_states
        self._model = model
        self._inputs = inputs
        self._cells = cells

    @property
    def logits(self) -> Tensor:
        raise AttributeError("scGPT predicts expression, not masked genes: read .expression")

    @property
    def expression(self) -> Tensor:
        return self._expression.prediction

    @property
    def zero_probabilities(self) -> Tensor:
        return _required(self._expression.zero_probability, "zero_probabilities")

    @property
    def mvc(self) -> Tensor:
        return self._mvc.prediction

    @property
    def mvc_zero_probabilities(self) -> Tensor:
        return _required(self._mvc.zero_probability, "mvc_zero_probabilities")

    @cached_property
    def cell_embeddings(self) -> Tensor:
        with self.as_in_forward():
            return self._model.pool(self.hidden, self._inputs, padding=self.padding)

    @cached_property
    def cls(self) -> Tensor:
        with self.as_in_forward():
            return self._model.classify(self.cell_embeddings)

    @cached_property
    def batch_logits(self) -> Tensor:
        with self.as_in_forward():
            return self._model.batch_scores(self.cell_embeddings)

    @cached_property
    def _expression(self) -> Expression:
        with self.as_in_forward():
            return self._model.decode(self.hidden, self._inputs)

    @cached_property
    def _mvc(self) -> Expression:
        with self.as_in_forward():
            return self._model.decode_from_cells(self.cell_embeddings, self._inputs)

    def expression_at(self, rows: Tensor) -> Expression:
        """The decoder's answer for some tokens only. rows: int64 (M,), tokens of the pack; gives (M,) each."""
        with self.as_in_forward():
            return self._model.decode(self.hidden.index_select(0, rows), self._inputs.at(rows))

    def mvc_at(self, rows: Tensor, cells: Tensor | None = None) -> Expression:
        """The same from the cells' embeddings, or from others, (C, hidden_size), in their place."""
        with self.as_in_forward():
            cells = self.cell_embeddings if cells is None else cells
            return self._model.decode_from_cells(cells, self._inputs, rows)

    def sampled_expression(self, *, seed: int = 0) -> Tensor:
        """``expression`` where a draw of P(expressed) says so, else 0 (the original's do_sample).

        Draws are keyed by (seed, cell_id, token's place in its cell): the same in any batch.
        """
        return self._drawn(self.zero_probabilities, seed) * self.expression

    def sampled_mvc(self, *, seed: int = 0) -> Tensor:
        """``mvc`` sampled in the same way."""
        return self._drawn(self.mvc_zero_probabilities, seed) * self.mvc

    def _drawn(self, probabilities: Tensor, seed: int) -> Tensor:
        lengths, cell_ids = self._cells.lengths.tolist(), self._cells.cell_ids.tolist()
        draws = [
            np.random.Generator(np.random.Philox(key=[seed, cell % 2**64])).random(length, dtype=np.float32)
            for cell, length in zip(cell_ids, lengths, strict=True)
        ]
        uniform = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.float32), *draws]))
        return (uniform.to(probabilities.device) < probabilities).to(probabilities.dtype)


def _required(found: Tensor | None, what: str) -> Tensor:
    if found is None:
        raise InvalidArgumentError("this model has no decoder of zero probabilities", where=what)
    return found
