"""How many tokens are computed at once, and what happens when that was too many.

Running out of memory is an answer, not an accident: the same cells are computed again in smaller batches, and
since a cell's result does not depend on its batch, the embedding is the same. The budget may grow back, for the
cells that did not fit may have been unusually long, but never to a size that has failed.
"""

from __future__ import annotations

import warnings

import torch

from scfm.errors import InvalidArgumentError, ScfmError, ScfmWarning

_PATIENCE = 64
_CPU_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


class TokenBudget:
    """tokens: the most that one batch may hold (a longer cell goes alone). Keep one for a whole run."""

    def __init__(self, tokens: int) -> None:
        if isinstance(tokens, bool) or tokens < 1:
            raise InvalidArgumentError(f"{tokens}; expected at least 1", where="token_budget")
        self.tokens = int(tokens)
        self.num_halvings = 0
        self._most = self.tokens  # what was asked for, then always less than what last failed
        self._patience = _PATIENCE
        self._good = 0

    def succeeded(self) -> None:
        """A batch went through; after many, try half the way back to what failed."""
        self._good += 1
        if self._good >= self._patience and self.tokens < self._most:
            self._good = 0
            self.tokens = (self.tokens + self._most + 1) // 2

    def halve(self, failed: int) -> None:
        """A batch of ``failed`` tokens did not fit in memory."""
        self.tokens = max(failed // 2, 1)
        self._most = max(failed - 1, 1)
        self.num_halvings += 1
        self._good = 0
        self._patience *= 2
        warnings.warn(
            f"out of memory with {failed:,} tokens at once: computing the same cells again with at most "
            f"{self.tokens:,} (results do not change; token_budget={self.tokens} starts that way)",
            ScfmWarning,
            stacklevel=3,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a computation means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, ScfmError):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _CPU_TEXTS)
