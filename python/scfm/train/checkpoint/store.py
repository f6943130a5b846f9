"""The checkpoints of one run: save beside the training, commit at a step boundary, find the newest that is whole.

    rank       at a boundary                        in the background            at a later boundary
    every one  copies its chunks to host memory     writes its file, syncs       tells whether it is done
    rank 0                                          ... and train_state.json     manifest, COMMITTED, rename

Only the first and the last happen in the thread that trains, and only there do ranks talk. A save that any rank
could not finish is given up by all; what was committed before is not touched by it.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from scfm.errors import (
    IntegrityError,
    InvalidArgumentError,
    ScfmError,
    ScfmWarning,
    StorageError,
    VersionError,
)
from scfm.train.checkpoint.agreement import all_tell, first_error, rank_and_size
from scfm.train.checkpoint.background_write import BackgroundWrite
from scfm.train.checkpoint.folder import (
    Manifest,
    clear_leftovers,
    commit,
    committed_steps,
    discard,
    new_owner,
    partial_folder,
    step_folder,
)
from scfm.train.checkpoint.named_tensors import model_tensors, optimizer_tensors
from scfm.train.checkpoint.ownership import owned_chunks
from scfm.train.checkpoint.restore import restore
from scfm.train.checkpoint.retention import Retention
from scfm.train.checkpoint.snapshot import Snapshot, shard_name
from scfm.train.checkpoint.train_state import TRAIN_STATE_FILE, TrainState
from scfm.train.checkpoint.verify import FoundCheckpoint, check_files, open_checkpoint

__all__ = ["CheckpointStore"]


class CheckpointStore:
    """folder: of the checkpoints, made if need be, on storage that all ranks share. Every method is called by all ranks
    alike, at the same step boundary.

    keep_last (2 or more) newest checkpoints and every ``keep_every``-th step stay. on_storage_error: when a save fails
    for want of room or a failing disk, "warn" and train on, or "stop" with the StorageError. ``last``: the checkpoint
    that this run committed or loaded last.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 2,
        keep_every: int | None = None,
        *,
        on_storage_error: Literal["warn", "stop"] = "warn",
    ) -> None:
        if keep_last < 2:
            raise InvalidArgumentError(
                f"{keep_last}; expected 2 or more: the newest may turn out to be damaged", where="keep_last"
            )
        if keep_every is not None and keep_every < 1:
            raise InvalidArgumentError(f"{keep_every}; expected 1 or more", where="keep_every")
        if on_storage_error not in ("warn", "stop"):
            raise InvalidArgumentError(
                f"{on_storage_error!r}; expected 'warn' or 'stop'", where="on_storage_error"
            )
        self.folder = Path(folder)
        self.last: Path | None = None
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._stops = on_storage_error == "stop"
        self._rank, self._world_size = rank_and_size()
        self._owner = ""
        self._snapshot = Snapshot()
        self._writing: BackgroundWrite | None = None
        self._manifest = Manifest(-1, 0, "", {})
        self._retention: Retention | None = None
        self._cleared = False

    def save(self, state: TrainState, model: nn.Module, optimizer: Optimizer) -> None:
        """Begin to save; training may go on as soon as this returns. Waits for a save that is still under way.

        A step that was committed last is not saved again. Raises CheckpointError, and what ``finish`` raises.
        """
        self.finish()
        self._clear_leftovers()
        if self.last == step_folder(self.folder, state.step):
            return
        told = all_tell({"step": state.step, "owner": new_owner()})
        if any(rank["step"] != state.step for rank in told):
            raise InvalidArgumentError(
                f"ranks are at steps {[rank['step'] for rank in told]}", where="state.step"
            )
        self._owner = told[0]["owner"]
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
        self._manifest = Manifest(
            state.step, sum(t.numel() > 0 for t in tensors.values()), type(optimizer).__name__, {}
        )
        text = state.to_json().encode()
        self._snapshot.take(owned_chunks(tensors, self._rank, self._world_size))
        files: dict[str, list[bytes | memoryview]] = {
            shard_name(self._rank, self._world_size): self._snapshot.pieces()
        }
        if self._rank == 0:
            files[TRAIN_STATE_FILE] = [text]
        self._writing = BackgroundWrite(partial_folder(self.folder, state.step, self._owner), files)

    def poll(self) -> Path | None:
        """Commit the save under way if every rank has written its part; the checkpoint then, else None.

        Without a save under way this costs nothing. Raises StorageError under on_storage_error="stop".
        """
        if self._writing is None:
            return None
        told = all_tell(self._progress(self._writing))
        return self._conclude(told) if all(rank["is_done"] for rank in told) else None

    def finish(self) -> Path | None:
        """Wait for the save under way and commit it; the checkpoint, or None if there was none or it failed."""
        path = None
        if self._writing is not None:
            self._writing.wait()
            path = self._conclude(all_tell(self._progress(self._writing)))
        self._wait_for_retention()
        return path

    def newest(self) -> FoundCheckpoint | None:
        """The highest step that verifies to the last byte; None if there is no checkpoint at all.

        Newer ones that do not verify are named in a warning. Raises IntegrityError naming each if none does, and
        VersionError if one was written by a newer scfm.
        """
        self._clear_leftovers()
        skipped: list[str] = []
        below: int | None = None
        while True:
            steps = committed_steps(self.folder) if self._rank == 0 else []
            step = max((s for s in steps if below is None or s < below), default=-1)
            step = below = int(all_tell({"step": step})[0]["step"])
            if step < 0:
                break
            found, problem = self._examine(step)
            if found is not None:
                self._warn(f"resuming from step {step}; newer checkpoints cannot be used: ", skipped)
                return FoundCheckpoint(found.path, found.state, found.manifest, found.tensors, tuple(skipped))
            skipped.append(problem)
        if skipped:
            raise IntegrityError(
                f"none of {len(skipped)} checkpoints can be used: {' | '.join(skipped)}",
                path=self.folder,
                hint="Restore one from a copy, or start anew in another folder.",
            )
        return None

    def load(self, found: FoundCheckpoint, model: nn.Module, optimizer: Optimizer | None) -> TrainState:
        """Fill model and optimiser (None: the model alone) from a checkpoint of any world size and way of sharding.

        Hyper-parameters of the optimiser stay as they are. Raises CheckpointError naming what does not fit, on every
        rank.
        """
        error: Exception | None = None
        try:
            restore(found, model, optimizer)
        except ScfmError as problem:
            error = problem
        error = first_error(error)
        if error is not None:
            raise error
        self.last = found.path
        return found.state

    def _progress(self, writing: BackgroundWrite) -> dict[str, Any]:
        return {"is_done": writing.is_done, "files": {} if writing.error else writing.written}

    def _conclude(self, told: list[dict[str, Any]]) -> Path | None:
        """Commit what all ranks have written, or give it up if one of them could not."""
        writing, self._writing = self._writing, None
        assert writing is not None
        files = {name: (facts[0], facts[1]) for rank in told for name, facts in rank["files"].items()}
        error = first_error(writing.error)
        if error is None:
            error = first_error(self._commit(writing.folder, files) if self._rank == 0 else None)
        if error is None:
            self.last = step_folder(self.folder, self._manifest.step)
            return self.last
        if self._rank == 0:
            discard(writing.folder)
        if self._stops or not isinstance(error, StorageError):
            raise error
        self._warn(f"step {self._manifest.step} was not checkpointed; training goes on: ", [str(error)])
        return None

    def _commit(self, partial: Path, files: dict[str, tuple[int, int]]) -> Exception | None:
        try:
            _, set_aside = commit(self.folder, partial, replace(self._manifest, files=files), self._owner)
        except StorageError as error:
            return error
        self._warn("a checkpoint of another course of the run was set aside: ", [str(p) for p in set_aside])
        self._wait_for_retention()
        self._retention = Retention(self.folder, self._keep_last, self._keep_every, self._owner)
        return None

    def _examine(self, step: int) -> tuple[FoundCheckpoint | None, str]:
        """The checkpoint if all ranks, each reading its share, find it whole; else what is wrong with it."""
        path = step_folder(self.folder, step)
        found: FoundCheckpoint | None = None
        error: Exception | None = None
        try:
            found = open_checkpoint(path, step)
            check_files(found, self._rank, self._world_size)
        except (ScfmError, OSError) as problem:
            error = problem
        error = first_error(error)
        if isinstance(error, VersionError):
            raise error
        return (None, str(error)) if error is not None else (found, "")

    def _clear_leftovers(self) -> None:
        if not self._cleared and self._rank == 0:
            clear_leftovers(self.folder)
        self._cleared = True

    def _wait_for_retention(self) -> None:
        if self._retention is not None:
            self._warn("", self._retention.wait())
        self._retention = None

    def _warn(self, begin: str, problems: list[str]) -> None:
        """Once for all ranks."""
        if problems and self._rank == 0:
            warnings.warn(f"{begin}{' | '.join(problems)}", ScfmWarning, stacklevel=3)
