"""What the ranks of a step tell each other in numbers: once before the forward, once after the backward.

Whole numbers are added up exactly. Losses are added up as float64, so that how they were shared out between ranks
shows in no digit that matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scfm.train.distributed.launch import World
from scfm.train.objectives.prepared import Prepared

__all__ = ["StepLosses", "StepTotals"]


@dataclass(frozen=True)
class StepTotals:
    """Of all microbatches of all ranks. counts: units of each term; stops: ranks that noted each reason to stop;
    planned_tokens: what the plan counted for them; flops: what the model's mathematics needs.
    """

    counts: dict[str, int]
    num_cells: int
    num_tokens: int
    planned_tokens: int
    flops: int
    stops: list[int]

    @classmethod
    def agreed(
        cls,
        world: World,
        microbatches: Sequence[Prepared],
        terms: Sequence[str],
        *,
        flops: float,
        stops: Sequence[int],
    ) -> StepTotals:
        """The sum of what each rank has; every rank must name the same terms in the same order."""
        here = [sum(prepared.counts.get(term, 0) for prepared in microbatches) for term in terms]
        here += [sum(p.num_cells for p in microbatches), sum(p.num_tokens for p in microbatches)]
        here += [sum(p.planned_tokens for p in microbatches), int(flops)]
        found = world.sum(torch.tensor([*here, *stops], dtype=torch.int64)).tolist()
        counts, (cells, tokens, planned, operations), stops = (
            found[: len(terms)],
            found[len(terms) : len(here)],
            found[len(here) :],
        )
        return cls(dict(zip(terms, counts, strict=True)), cells, tokens, planned, operations, list(stops))


@dataclass(frozen=True)
class StepLosses:
    """sums: each term's over the step, of all ranks; norm: of the gradient. bad: a sentence a rank on what was not
    finite there; empty where the step can be applied.
    """

    sums: dict[str, float]
    norm: float
    bad: list[str]

    @classmethod
    def agreed(cls, world: World, sums: Mapping[str, Tensor], norm: Tensor) -> StepLosses:
        """sums: this rank's, float64 0-dim, on the device; norm: the same on every rank. One wait for the device."""
        here = torch.stack([*sums.values(), norm.double()]).cpu()
        terms = list(sums)
        # A column a rank, so that all learn what was not finite where.
        wrong = torch.zeros(len(here), world.size, dtype=torch.float64)
        wrong[:, world.rank] = (~torch.isfinite(here)).double()
        total = here[:-1].where(torch.isfinite(here[:-1]), torch.zeros(()))
        everywhere = world.sum(torch.cat([total, wrong.flatten()]))
        flags = everywhere[len(terms) :].view(len(here), world.size).bool()
        found = {
            term: float(everywhere[i]) if not flags[i].any() else math.nan for i, term in enumerate(terms)
        }
        return cls(found, float(here[-1]), _told(terms, flags))


def _told(terms: Sequence[str], flags: Tensor) -> list[str]:
    """On each rank with a loss that is not finite, which; of the gradient, which is everyone's, once."""
    told = []
    for rank in range(flags.shape[1]):
        wrong = [term for i, term in enumerate(terms) if flags[i, rank]]
        if wrong:
            told.append(f"loss {', '.join(wrong)} on rank {rank}")
    if flags[-1].any():
        told.append("norm of the gradient")
    return told
