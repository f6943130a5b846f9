"""A tensor worked out from weights, such as a table normalised once, kept for inference until a weight changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scfm.models.nn.weight_state import weight_state


class Derived:
    """One such tensor. Copies of a model do not share it: other memory means other weights."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def of(self, weights: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave last time if no weight has been assigned, written to or trained since then.

        Not to be called where a gradient could be needed: the result is detached.
        """
        state = weight_state(*weights)
        if self._kept is None or self._kept[0] != state:
            # An inference tensor kept from inference_mode could enter no later graph.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (state, compute().detach())
        return self._kept[1]
