"""Whether weights are still what they were when something was worked out from them.

torch counts the writes to a tensor, except those of fused optimisers, which leave the count as it was. So every step of
any optimiser counts as well: what was kept for inference is worked out anew after training went on.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["weight_state"]

_steps = itertools.count(1)
_last_step = 0


def weight_state(*weights: Tensor) -> tuple[object, ...]:
    """Equal to an earlier answer only if none of these was assigned, written to or could have been trained since."""
    return (_last_step, *((weight.data_ptr(), weight._version) for weight in weights))


def _count_step(*_: Any) -> None:
    global _last_step
    _last_step = next(_steps)


register_optimizer_step_post_hook(_count_step)
