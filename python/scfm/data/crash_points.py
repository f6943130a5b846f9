"""Places where a run can be told to kill itself, so that tests can prove what survives.

``SCFM_CRASH_AT=before_link:3`` sends SIGKILL to this process when it reaches that point for the third time.
Without the variable a point costs one look-up.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

__all__ = ["CHECKPOINT_POINTS", "EMBED_POINTS", "crash_point"]

# In the order in which a shard of embeddings reaches them, and a checkpoint.
EMBED_POINTS = (
    "after_embed",
    "after_write",
    "before_link",
    "after_link",
    "before_manifest",
    "after_manifest",
)
CHECKPOINT_POINTS = (
    "checkpoint_begun",
    "after_write",
    "before_link",
    "after_link",
    "shard_written",
    "before_manifest",
    "before_committed",
    "before_rename",
    "after_rename",
    "before_delete",
)
_reached: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here, as suddenly as a power cut, if the environment says so."""
    wanted = os.environ.get("SCFM_CRASH_AT")
    if not wanted:
        return
    point, _, nth = wanted.partition(":")
    if point == name:
        _reached[name] += 1
        if _reached[name] >= int(nth or 1):
            os.kill(os.getpid(), signal.SIGKILL)
