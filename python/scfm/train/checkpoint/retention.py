"""Which checkpoints stay: the newest few, every so many-th for good, and always one that is known to be whole.

Deleting is the only thing here that could lose a run, so it is done last and with the proof in hand: before anything
goes, a checkpoint that stays is read from its first byte to its last. Folders that look damaged count neither as
kept nor as a reason to delete others. It happens on rank 0, in a thread, while training goes on.
"""

from __future__ import annotations

import threading
from pathlib import Path

from scfm.errors import ScfmError
from scfm.train.checkpoint.folder import committed_steps, remove, step_folder
from scfm.train.checkpoint.verify import check_files, looks_whole, open_checkpoint

__all__ = ["Retention", "doomed_steps"]


def doomed_steps(whole: list[int], damaged: list[int], keep_last: int, keep_every: int | None) -> list[int]:
    """Steps to delete, oldest first. whole, damaged: steps on the disk, by the look of them.

    What is damaged goes when it is older than everything of the newest that stays.
    """
    newest = sorted(whole, reverse=True)[:keep_last]
    if len(newest) < keep_last:
        return []
    old = [step for step in (*whole, *damaged) if step < newest[-1]]
    return sorted(step for step in old if not (keep_every and step % keep_every == 0 and step in whole))


class Retention:
    """Deletes in a thread; ``wait`` gives what it could not do, in words."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None, owner: str) -> None:
        self._folder = folder
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._owner = owner
        self._problems: list[str] = []
        self._thread = threading.Thread(target=self._run, name="scfm-retention", daemon=True)
        self._thread.start()

    def wait(self) -> list[str]:
        self._thread.join()
        return self._problems

    def _run(self) -> None:
        try:
            steps = committed_steps(self._folder)
            whole = [step for step in steps if looks_whole(step_folder(self._folder, step))]
            damaged = [step for step in steps if step not in whole]
            doomed = doomed_steps(whole, damaged, self._keep_last, self._keep_every)
            if doomed and self._some_stay([step for step in whole if step not in doomed]):
                for step in doomed:
                    remove(self._folder, step, self._owner)
        except (ScfmError, OSError) as error:
            self._problems.append(f"older checkpoints could not be deleted: {error}")

    def _some_stay(self, kept: list[int]) -> bool:
        for step in kept:
            try:
                check_files(open_checkpoint(step_folder(self._folder, step), step))
                return True
            except (ScfmError, OSError) as error:
                self._problems.append(f"a checkpoint is damaged, older ones are kept for it: {error}")
        return False
