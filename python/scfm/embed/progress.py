"""How far a run is, over all processes that work on it: from finished shards and live leases, no coordinator."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from scfm.data.lease import lease_facts, read_lease
from scfm.embed.manifest import Manifest, sound_manifest
from scfm.embed.plan import Plan, Shard
from scfm.errors import ScfmError

__all__ = ["Progress", "RunProgress"]


@dataclass(frozen=True)
class Progress:
    """cells and shards done, of how many; speeds are those of all live workers together, 0 before any is known.

    cells include what live workers have done of shards not yet finished; tokens_per_second is an estimate from
    the cells' speed and the tokens a cell has had so far. seconds_left: None while it cannot be said.
    """

    cells: int
    num_cells: int
    shards: int
    num_shards: int
    workers: int
    cells_per_second: float
    tokens_per_second: float

    @property
    def share(self) -> float:
        return 1.0 if self.num_cells == 0 else self.cells / self.num_cells

    @property
    def seconds_left(self) -> float | None:
        if self.cells >= self.num_cells:
            return 0.0
        return (self.num_cells - self.cells) / self.cells_per_second if self.cells_per_second > 0 else None


@dataclass
class RunProgress:
    """Looks at the folder of a run again and again; finished shards are read once each."""

    folder: Path
    plan: Plan
    _done: dict[int, tuple[int, int]] = field(default_factory=dict)
    _beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)

    def note(self, shard: Shard, manifest: Manifest) -> None:
        """A shard known to be finished."""
        self._done[shard.index] = (manifest.num_cells, manifest.num_tokens)

    def look(self, *, live_seconds: float = 60.0) -> Progress:
        cells = tokens = workers = 0
        speed = 0.0
        for shard in self.plan.shards:
            if shard.index not in self._done:
                self._look_for(shard)
            if shard.index in self._done:
                cells += self._done[shard.index][0]
                tokens += self._done[shard.index][1]
                continue
            facts = self._live(shard, live_seconds)
            if facts is not None:
                workers += 1
                cells += min(int(facts[0]), shard.num_cells)
                tokens += int(facts[1])
                speed += facts[2]
        return Progress(
            cells=cells,
            num_cells=self.plan.num_cells,
            shards=len(self._done),
            num_shards=len(self.plan.shards),
            workers=workers,
            cells_per_second=speed,
            tokens_per_second=speed * tokens / cells if cells else 0.0,
        )

    def _look_for(self, shard: Shard) -> None:
        if not (self.folder / shard.manifest_name).exists():
            return
        try:
            manifest = sound_manifest(self.folder, shard, self.plan)
        except ScfmError:
            return  # whoever comes to compute it will say what is wrong
        if manifest is not None:
            self.note(shard, manifest)

    def _live(self, shard: Shard, live_seconds: float) -> tuple[float, float, float] | None:
        """Cells, tokens and speed of the worker on this shard, if its lease has changed lately."""
        content = read_lease(self.folder / shard.lease_name)
        if not content:
            return None
        now = time.monotonic()
        before = self._beats.get(shard.index)
        if before is None or before[0] != content:
            before = self._beats[shard.index] = (content, now)
        if now - before[1] > live_seconds:
            return None
        facts = lease_facts(content)
        try:
            return float(facts["cells"]), float(facts["tokens"]), float(facts["speed"])
        except (KeyError, TypeError, ValueError):
            return 0.0, 0.0, 0.0
