"""A tensor worked out from weights, such as a table normalised once, kept for inference until a weight changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Derived:
    """One such tensor. Copies of a model do not share it: other memory means other weights."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[tuple[int, int], ...], Tensor] | None = None

    def of(self, weights: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave last time if no weight has been assigned or written to since then.

        Not to be called where a gradient could be needed: the result is detached.
        """
        version = tuple((weight.data_ptr(), weight._version) for weight in weights)
        if self._kept is None or self._kept[0] != version:
            # An inference tensor kept from inference_mode could enter no later graph.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (version, compute().detach())
        return self._kept[1]
