"""One process of a run: claims a shard, embeds its rows, commits it, and goes on until nothing is left.

Any number of these work on one folder, started at any time, killed at any time. A file is opened and planned
once as long as shards of it follow each other; each shard is then a selection of its rows.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scfm
from scfm.data.crash_points import crash_point
from scfm.data.lease import Lease, LeaseWatcher
from scfm.data.process_name import host_name
from scfm.data.source import CellSource
from scfm.embed.commit import commit_shard, set_aside
from scfm.embed.fingerprint import Stamp, check_unchanged
from scfm.embed.manifest import Manifest, sound_manifest
from scfm.embed.plan import Plan, Shard
from scfm.embed.progress import Progress, RunProgress
from scfm.embed.verify import checked_shard
from scfm.errors import BadCellError, ScfmError, ScfmWarning
from scfm.models.base import FoundationModel
from scfm.models.engine import EmbeddedCells, embed_source
from scfm.models.token_budget import TokenBudget

__all__ = ["ShardWorker"]

_LOOK_EVERY = 2.0


@dataclass
class ShardWorker:
    """stamps: of the input files, taken before their fingerprints; start: share of the shards to begin after;
    wait: stay until shards that others hold are finished, or take them over; verify: read finished shards too.
    """

    folder: Path
    plan: Plan
    model: FoundationModel
    stamps: list[Stamp]
    token_budget: TokenBudget
    counts_layer: str | None = None
    lease_seconds: float = 60.0
    start: float = 0.0
    wait: bool = True
    verify: bool = False
    progress: Callable[[Progress], None] | None = None
    num_computed: int = 0
    num_cells: int = 0
    _open: tuple[int, CellSource] | None = None
    _told: set[str] = field(default_factory=set)
    _looked: float = 0.0
    _speed: float = 0.0

    def run(self) -> dict[int, Manifest]:
        """Work until nothing is left to claim; the manifests of all shards finished by anyone by then."""
        watcher = LeaseWatcher(self.lease_seconds)
        view = RunProgress(self.folder, self.plan)
        done: dict[int, Manifest] = {}
        while True:
            claimed = False
            held = 0
            for shard in self._order():
                if shard.index in done or self._is_done(shard, done, view):
                    continue
                lease = self._claim(shard, watcher)
                if lease is None:
                    held += 1
                    continue
                with lease:
                    # It may have been finished between the look and the claim.
                    if not self._is_done(shard, done, view):
                        self._compute(shard, lease, view)
                        claimed = True
                        self._is_done(shard, done, view)
            self._show(view, always=True)
            if len(done) == len(self.plan.shards) or (held and not self.wait and not claimed):
                return done
            if not claimed:
                time.sleep(min(self.lease_seconds / 10, 1.0))

    def _order(self) -> list[Shard]:
        shards = self.plan.shards
        first = int(len(shards) * self.start)
        return [*shards[first:], *shards[:first]]

    def _claim(self, shard: Shard, watcher: LeaseWatcher) -> Lease | None:
        path = self.folder / shard.lease_name
        lease = Lease.take(path, self.lease_seconds)
        if lease is None and watcher.is_stale(path):
            watcher.clear(path)
            lease = Lease.take(path, self.lease_seconds)
        return lease

    def _is_done(self, shard: Shard, done: dict[int, Manifest], view: RunProgress) -> bool:
        """Whether the shard is finished and sound; one that is not sound is moved out of the way, aloud."""
        check = checked_shard if self.verify else sound_manifest
        try:
            manifest = check(self.folder, shard, self.plan)
        except ScfmError:
            manifest = self._second_look(shard, check)
        if manifest is not None:
            done[shard.index] = manifest
            view.note(shard, manifest)
        return manifest is not None

    def _second_look(
        self, shard: Shard, check: Callable[[Path, Shard, Plan], Manifest | None]
    ) -> Manifest | None:
        # On a network file system the two files of a shard may come into sight one after the other.
        time.sleep(0.2)
        try:
            return check(self.folder, shard, self.plan)
        except ScfmError as error:
            for name in (shard.manifest_name, shard.array_name):
                set_aside(self.folder, self.folder / name)
            warnings.warn(f"{shard.name} is set aside and computed again: {error}", ScfmWarning, stacklevel=4)
            return None

    def _compute(self, shard: Shard, lease: Lease, view: RunProgress) -> None:
        started = time.perf_counter()

        def advance(done: int, total: int, tokens: int) -> None:
            took = max(time.perf_counter() - started, 1e-9)
            lease.report(cells=done, tokens=tokens, speed=round(self._speed or done / took, 1))
            self._show(view)

        entry = self.plan.files[shard.file]
        with self._collected(entry.path) as notes:
            source = self._source(shard.file).select(np.arange(shard.row_start, shard.row_end))
            found = embed_source(
                self.model,
                source,
                layer=self.plan.layer,
                pooling=self.plan.pooling,
                token_budget=self.token_budget,
                stop_at_bad_cell=self.plan.on_bad_cell == "error",
                keep_not_finite=self.plan.keep_not_finite,
                progress=advance,
                species=self.plan.species,
            )
        check_unchanged(Path(entry.path), self.stamps[shard.file])
        crash_point("after_embed")
        seconds = time.perf_counter() - started
        self._speed = shard.num_cells / max(seconds, 1e-9)
        facts = self._facts(shard, found, seconds, notes)
        values = self._stored(found, shard)
        if commit_shard(
            self.folder, shard, values, lambda crc, size: Manifest(crc32=crc, num_bytes=size, **facts)
        ):
            self.num_computed += 1
            self.num_cells += shard.num_cells

    def _source(self, number: int) -> CellSource:
        """The input file, opened once while its shards follow each other; then let go for the next one."""
        if self._open is None or self._open[0] != number:
            self._open = None
            entry = self.plan.files[number]
            check_unchanged(Path(entry.path), self.stamps[number])
            source = self.model.read_cells(
                entry.path, counts_layer=self.counts_layer, assume_counts=self.plan.assume_counts
            )
            self._open = (number, source)
        return self._open[1]

    def _stored(self, found: EmbeddedCells, shard: Shard) -> np.ndarray:
        values = found.values
        if self.plan.store_dtype == "float32":
            return values
        with np.errstate(over="ignore"):
            small = values.astype(np.float16)
        lost = np.flatnonzero((np.isinf(small) & np.isfinite(values)).any(axis=1))
        if lost.size:
            raise BadCellError(
                f"the embedding of row {shard.row_start + lost[0]} ({lost.size} such rows in {shard.name}) holds "
                "numbers beyond 65,504, which float16 cannot store",
                path=self.plan.files[shard.file].path,
                hint="Start a new folder with --store-dtype float32.",
            )
        return small

    def _facts(self, shard: Shard, found: EmbeddedCells, seconds: float, notes: list[str]) -> dict[str, Any]:
        report = self.model.tokenizer.report
        return {
            "array": shard.array_name,
            "file": self.plan.files[shard.file].name,
            "row_start": shard.row_start,
            "row_end": shard.row_end,
            "num_cells": shard.num_cells,
            "plan_sha256": self.plan.sha256,
            "model_sha256": self.plan.model["sha256"],
            "num_tokens": found.num_tokens,
            "num_truncated": getattr(report, "num_truncated", 0),
            "without_genes": (found.without_genes + shard.row_start).tolist(),
            "not_finite": (found.not_finite + shard.row_start).tolist(),
            "seconds": round(seconds, 3),
            "notes": notes,
            "provenance": {
                "reader": self._source(shard.file).reader,
                "model": self.model.source or "in memory",
                "device": str(self.model.device),
                "threads": torch.get_num_threads(),
                "token_budget": self.token_budget.tokens,
                "num_halvings": self.token_budget.num_halvings,
                "host": host_name(),
                "pid": os.getpid(),
                "scfm_version": scfm.__version__,
                "torch_version": str(torch.__version__),
            },
        }

    @contextmanager
    def _collected(self, path: str) -> Iterator[list[str]]:
        """Warnings go into the manifest; of each kind the first is shown too, or every shard would repeat it."""
        notes: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("always", ScfmWarning)
            show = warnings.showwarning

            def collect(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
                text = str(message).removeprefix(f"{path}: ")
                kind = re.sub(r"[\d,.]+", "#", str(message))
                if not issubclass(category, ScfmWarning) or kind not in self._told:
                    self._told.add(kind)
                    show(message, category, *place, **more)
                if issubclass(category, ScfmWarning):
                    notes.append(text)

            warnings.showwarning = collect
            yield notes

    def _show(self, view: RunProgress, *, always: bool = False) -> None:
        now = time.monotonic()
        if self.progress is not None and (always or now - self._looked >= _LOOK_EVERY):
            self._looked = now
            self.progress(view.look(live_seconds=self.lease_seconds))
