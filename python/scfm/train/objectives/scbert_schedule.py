"""The learning rate of scBERT's authors, epoch by epoch: linear warm-up and cosine in cycles that grow and sink.

Source: CosineAnnealingWarmupRestarts as pretrain.py and finetune.py call it.
"""

from __future__ import annotations

import math

FIRST_CYCLE, WARMUP, CYCLE_GROWTH, PEAK_DECAY = 15, 5, 2.0, 0.9
HIGHEST, LOWEST = 1e-4, 1e-6


def learning_rate(epoch: int, *, highest: float = HIGHEST, lowest: float = LOWEST) -> float:
    """Of an epoch counted from 1: ``lowest`` in the first, ``highest`` in the sixth, a restart before the sixteenth."""
    step, length, peak = epoch - 1, FIRST_CYCLE, highest
    while step >= length:
        step -= length
        length = int((length - WARMUP) * CYCLE_GROWTH) + WARMUP
        peak *= PEAK_DECAY
    if step < WARMUP:
        return lowest + (peak - lowest) * step / WARMUP
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * (step - WARMUP) / (length - WARMUP))) / 2
