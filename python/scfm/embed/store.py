"""``open_store``: a folder of embeddings as one long array, read from memory-mapped shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.embed.manifest import Manifest, sound_manifest
from scfm.embed.plan import Plan, Shard, read_plan
from scfm.errors import IntegrityError, InvalidArgumentError, MissingFileError

__all__ = ["EmbeddingStore", "open_store"]


class EmbeddingStore:
    """Rows are the cells of all inputs one after the other, in the plan's order.

    plan: how it was made; num_cells, hidden_size, dtype; shards: the planned pieces; missing: those not finished.
    A cell without known genes is a row of NaN whatever the policy was; ``without_genes`` lists them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.plan: Plan = read_plan(self.folder)
        self.shards = self.plan.shards
        self.num_cells = self.plan.num_cells
        self.hidden_size = self.plan.hidden_size
        self.dtype = np.dtype(self.plan.store_dtype)
        ends = np.cumsum([shard.num_cells for shard in self.shards], dtype=np.int64)
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), ends])
        self._manifests: dict[int, Manifest] = {}
        self._mapped: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.num_cells

    @property
    def missing(self) -> list[Shard]:
        """Shards that are not finished at this moment."""
        return [shard for shard in self.shards if self._find(shard) is None]

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def without_genes(self) -> NDArray[np.int64]:
        """Rows of this store whose cells have no gene that the model knows."""
        found = [
            np.asarray(self.manifest(shard).without_genes, dtype=np.int64)
            + (self._starts[shard.index] - shard.row_start)
            for shard in self.shards
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def manifest(self, shard: Shard) -> Manifest:
        """Raises MissingFileError if the shard is not finished, IntegrityError if it is damaged."""
        manifest = self._find(shard)
        if manifest is None:
            raise MissingFileError(
                f"{shard.name} is not finished",
                path=self.folder,
                hint="Run the same scfm embed command again to finish it.",
            )
        return manifest

    def shard_array(self, shard: Shard) -> np.ndarray:
        """(cells of the shard, hidden_size), mapped read-only; its size is checked, its bytes are not."""
        manifest = self.manifest(shard)
        path = self.folder / manifest.array
        try:
            mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise IntegrityError(f"cannot be opened ({error})", path=path) from error
        if mapped.shape != (shard.num_cells, self.hidden_size) or mapped.dtype != self.dtype:
            raise IntegrityError(
                f"holds {mapped.shape} {mapped.dtype}; expected {(shard.num_cells, self.hidden_size)} {self.dtype}",
                path=path,
            )
        return mapped

    def read(self, rows: slice | Any = slice(None)) -> np.ndarray:
        """The embeddings of these rows, in this order: a slice, positions or a mask. In memory, in ``dtype``."""
        chosen = self._positions(rows)
        out = np.empty((len(chosen), self.hidden_size), dtype=self.dtype)
        homes = np.searchsorted(self._starts, chosen, side="right") - 1
        for home in np.unique(homes):
            here = np.flatnonzero(homes == home)
            out[here] = self._mapping(int(home))[chosen[here] - self._starts[home]]
        return out

    def blocks(self) -> Iterator[tuple[Shard, np.ndarray]]:
        """Every shard with its mapped array, in order."""
        for shard in self.shards:
            yield shard, self.shard_array(shard)

    def __repr__(self) -> str:
        return (
            f"EmbeddingStore({str(self.folder)!r}: {self.num_cells:,} cells x {self.hidden_size}, {self.dtype}, "
            f"{len(self.shards)} shards)"
        )

    def _positions(self, rows: slice | Any) -> NDArray[np.int64]:
        if isinstance(rows, slice):
            return np.arange(*rows.indices(self.num_cells), dtype=np.int64)
        chosen = np.asarray(rows)
        if chosen.dtype == np.bool_ and chosen.shape == (self.num_cells,):
            return np.flatnonzero(chosen).astype(np.int64)
        if chosen.size == 0:
            return np.empty(0, dtype=np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise InvalidArgumentError(
                f"has shape {chosen.shape} and type {chosen.dtype}; expected a slice, positions or a mask of "
                f"{self.num_cells}",
                where="read(rows)",
            )
        low, high = int(chosen.min()), int(chosen.max())
        if low < -self.num_cells or high >= self.num_cells:
            raise InvalidArgumentError(
                f"positions from {low} to {high}; the store has {self.num_cells} cells", where="read(rows)"
            )
        chosen = chosen.astype(np.int64)
        return np.where(chosen < 0, chosen + self.num_cells, chosen)

    def _mapping(self, index: int) -> np.ndarray:
        if self._mapped is None or self._mapped[0] != index:
            self._mapped = (index, self.shard_array(self.shards[index]))
        return self._mapped[1]

    def _find(self, shard: Shard) -> Manifest | None:
        if shard.index not in self._manifests:
            manifest = sound_manifest(self.folder, shard, self.plan)
            if manifest is None:
                return None
            self._manifests[shard.index] = manifest
        return self._manifests[shard.index]


def open_store(folder: str | Path) -> EmbeddingStore:
    """The embeddings in a folder written by ``scfm embed``; it need not be complete to read what is there."""
    return EmbeddingStore(folder)
