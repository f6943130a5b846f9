"""When Performers draw new random projections: by microbatches of the whole run, not by what this rank has seen.

The original redraws at every 1,001st forward of a process. Ranks that share a step see fewer forwards each, a decoder
that runs once a cell sees more, so here every microbatch of every rank counts one. Draws happen between steps, alike on
all ranks and for any number of them. Which numbers are drawn depends on the matrix that they replace.
"""

from __future__ import annotations

import torch
from torch import nn

from scfm.models.nn.performer import Performer

__all__ = ["ProjectionRedraw"]


class ProjectionRedraw:
    """Takes the counting over from the model's Performers, if it has any, until ``release``."""

    def __init__(self, model: nn.Module) -> None:
        self._performers = [part for part in model.modules() if isinstance(part, Performer)]
        self._intervals = [performer.redraw_interval for performer in self._performers]
        for performer in self._performers:
            performer.redraw_interval = None

    @torch.no_grad()
    def before_step(self, num_microbatches: int) -> None:
        """Redraw where more than the interval's microbatches have gone by since, then count the step's."""
        for performer, interval in zip(self._performers, self._intervals, strict=True):
            if interval is None or performer.shape.attention == "unprojected":
                continue
            if int(performer.calls_since_last_redraw) > interval:
                performer.redraw()
            performer.calls_since_last_redraw += num_microbatches

    def release(self) -> None:
        for performer, interval in zip(self._performers, self._intervals, strict=True):
            performer.redraw_interval = interval
