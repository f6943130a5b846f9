"""Learning-rate schedules over the progress of a run, measured in [0, 1]."""

from __future__ import annotations

import math


def learning_rate_factor(progress: float, *, warmup_ratio: float, schedule: str) -> float:
    """Rises linearly to 1 over ``warmup_ratio`` of the run, then falls to 0 at its end ("constant": stays)."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if warmup_ratio >= 1.0 or schedule == "constant":
        return 1.0
    rest = (progress - warmup_ratio) / (1.0 - warmup_ratio)
    return 0.5 * (1.0 + math.cos(math.pi * rest)) if schedule == "cosine" else 1.0 - rest
