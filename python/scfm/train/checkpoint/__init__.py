"""Checkpoints of a training run: sharded, written beside the training, never half there, without a pickle inside.

    runs/a/checkpoints/
        step-00001200/
            shard-00000-of-00002.safetensors    what rank 0 wrote: chunks of the model's and the optimiser's tensors
            shard-00001-of-00002.safetensors
            train_state.json                    where the run stands (TrainState)
            MANIFEST.json                       size and CRC-32 of each of these files
            COMMITTED                           CRC-32 of the manifest; written last
        .tmp-step-00001300-<owner>/             being written; counts as nothing
        set-aside-step-00001300-<owner>/        damaged, or of another course of the run; counts as nothing

A folder takes its name by one rename when every byte of it is on the disk. Nothing is ever written into it again.
"""

from __future__ import annotations

from scfm.train.checkpoint.resume_checks import compare_settings, expect_same_data
from scfm.train.checkpoint.store import CheckpointStore
from scfm.train.checkpoint.train_state import TrainState
from scfm.train.checkpoint.verify import FoundCheckpoint

__all__ = ["CheckpointStore", "FoundCheckpoint", "TrainState", "compare_settings", "expect_same_data"]
