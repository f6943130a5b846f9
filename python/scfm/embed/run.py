"""``embed_to_folder``: an atlas into a folder of shards that can be killed at any moment and resumed.

Each process that is pointed at the folder plans for itself, compares its plan with the one that stands there,
and works. Under torchrun or a Slurm array nothing else is needed; rank and size only let processes begin at
different shards, so that they seldom ask for the same one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from scfm.data.atomic_file import TEMPORARY_SUFFIX, storage_errors, temporary_name
from scfm.embed.commit import clear_leftovers
from scfm.embed.fingerprint import Stamp, fingerprint_of, stamp_of
from scfm.embed.manifest import Manifest
from scfm.embed.model_identity import model_identity
from scfm.embed.plan import PLAN_NAME, InputFile, Plan, settle_plan, shards_of
from scfm.embed.progress import Progress
from scfm.embed.shard_worker import ShardWorker
from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.engine import default_token_budget
from scfm.models.token_budget import TokenBudget

__all__ = ["DEFAULT_SHARD_SIZE", "RunSummary", "check_folder", "embed_to_folder"]

DEFAULT_SHARD_SIZE = 65_536


@dataclass(frozen=True)
class RunSummary:
    """complete: every shard is there. num_computed, cells_computed: by this process; the rest over all shards."""

    folder: str
    complete: bool
    num_shards: int
    num_done: int
    num_cells: int
    hidden_size: int
    num_computed: int
    cells_computed: int
    num_without_genes: int
    num_not_finite: int
    num_truncated: int
    num_tokens: int
    num_halvings: int
    seconds: float
    plan_sha256: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def embed_to_folder(
    data: Sequence[str | Path],
    model: FoundationModel,
    folder: str | Path,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    store_dtype: Literal["float32", "float16"] = "float32",
    layer: int | None = None,
    pooling: str | None = None,
    on_bad_cell: Literal["error", "nan", "skip"] = "error",
    keep_not_finite: bool = False,
    counts_layer: str | None = None,
    assume_counts: bool = False,
    species: str | None = None,
    token_budget: int | None = None,
    lease_seconds: float = 60.0,
    wait: bool = True,
    verify: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> RunSummary:
    """Embed every cell of the files into ``folder``, or go on where an earlier run stopped.

    shard_size: cells a shard; store_dtype: of the shards; on_bad_cell: a cell without any known gene stops the
    run ("error"), or stands as NaN in its shard and is listed, and exports keep it ("nan") or leave it out
    ("skip"). keep_not_finite: keep and list other embeddings with NaN or infinity instead of stopping. verify:
    read finished shards and compute damaged ones again. wait: stay until other processes' shards are done.
    Other arguments as in ``model.embed``. Raises IntegrityError for a folder begun with another plan.
    """
    started = time.perf_counter()
    folder = Path(folder)
    _check_choices(shard_size, store_dtype, on_bad_cell, lease_seconds)
    budget = TokenBudget(default_token_budget(model.device) if token_budget is None else token_budget)
    check_folder(folder)
    plan, stamps = _plan(
        [Path(path) for path in data],
        model,
        shard_size=shard_size,
        store_dtype=store_dtype,
        layer=model.default_layer if layer is None else layer,
        pooling=model.default_pooling if pooling is None else pooling,
        on_bad_cell=on_bad_cell,
        keep_not_finite=keep_not_finite,
        counts_layer=counts_layer,
        assume_counts=assume_counts,
        species=species or model.tokenizer.species,
    )
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    plan = settle_plan(folder, plan)
    clear_leftovers(folder, plan)
    worker = ShardWorker(
        folder,
        plan,
        model,
        stamps,
        budget,
        counts_layer=counts_layer,
        lease_seconds=lease_seconds,
        start=place_among_workers(os.environ),
        wait=wait,
        verify=verify,
        progress=progress,
    )
    done = worker.run()
    clear_leftovers(folder, plan)
    return _summary(folder, plan, worker, done, time.perf_counter() - started)


def check_folder(folder: Path) -> None:
    """Raise now, before any model is loaded, what would keep the folder from being written.

    It may be absent, empty, or hold a plan; a link to a folder is followed.
    """
    if folder.is_symlink() and not folder.is_dir():
        raise InvalidArgumentError("is a link that leads to no folder", path=folder)
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError("is a file; expected the name of a folder", path=folder)
    if not folder.exists():
        _probe(next(entry for entry in folder.absolute().parents if entry.exists()), folder)
        return
    names = [entry.name for entry in folder.iterdir() if not entry.name.endswith(TEMPORARY_SUFFIX)]
    if names and PLAN_NAME not in names:
        raise InvalidArgumentError(
            f"holds other things and no {PLAN_NAME}: {', '.join(sorted(names)[:5])}",
            path=folder,
            hint="Give a new or empty folder.",
        )
    _probe(folder, folder)


def _probe(place: Path, folder: Path) -> None:
    """Whether a file can be made in ``place``: the only way to know that works for every user and disk."""
    probe = temporary_name(place / f".{folder.name}")
    with storage_errors(folder):
        try:
            probe.touch(exist_ok=False)
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)


def place_among_workers(environment: Mapping[str, str]) -> float:
    """This process's place among its like, from 0 to below 1: torchrun's, a Slurm array's, a Slurm step's."""
    pairs = (
        ("RANK", "WORLD_SIZE", None),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("SLURM_PROCID", "SLURM_NTASKS", None),
    )
    place, width = 0.0, 1.0
    for number, count, first in pairs:
        try:
            rank = int(environment[number]) - (int(environment.get(first, "0")) if first else 0)
            size = int(environment[count])
        except (KeyError, ValueError):
            continue
        if 0 <= rank < size:
            place, width = place + width * rank / size, width / size
            if number == "RANK":
                break  # torchrun within Slurm has counted all of them already
    return place


def _plan(
    paths: list[Path],
    model: FoundationModel,
    *,
    shard_size: int,
    counts_layer: str | None,
    species: str,
    layer: int,
    pooling: str,
    store_dtype: str,
    on_bad_cell: str,
    keep_not_finite: bool,
    assume_counts: bool,
) -> tuple[Plan, list[Stamp]]:
    if not paths:
        raise InvalidArgumentError("no input files", where="data")
    model.check_embedding(layer, pooling)
    stamps = [stamp_of(path) for path in paths]
    files = []
    for path in paths:
        source = model.read_cells(path, counts_layer=counts_layer, assume_counts=assume_counts)
        # Before the first shard of the first file, not after days, when this file's turn comes.
        model.tokenizer.check_genes(source, species=species)
        prints = fingerprint_of(path)
        entry = InputFile(
            str(path.absolute()),
            path.name,
            prints.size,
            prints.mtime_ns,
            prints.crc32,
            len(source),
            source.counts_from,
        )
        files.append(entry)
    plan = Plan(
        files=tuple(files),
        shards=shards_of(files, shard_size),
        shard_size=shard_size,
        model=model_identity(model),
        hidden_size=model.embedding_size(pooling),
        layer=layer,
        pooling=pooling,
        compute_dtype=str(model.compute_dtype).removeprefix("torch."),
        store_dtype=store_dtype,
        on_bad_cell=on_bad_cell,
        species=species,
        assume_counts=assume_counts,
        keep_not_finite=keep_not_finite,
    )
    return plan, stamps


def _check_choices(shard_size: int, store_dtype: str, on_bad_cell: str, lease_seconds: float) -> None:
    if isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1:
        raise InvalidArgumentError(f"{shard_size!r}; expected a whole number from 1", where="shard_size")
    if store_dtype not in ("float32", "float16"):
        raise InvalidArgumentError(f'{store_dtype!r}; expected "float32" or "float16"', where="store_dtype")
    if on_bad_cell not in ("error", "nan", "skip"):
        raise InvalidArgumentError(f'{on_bad_cell!r}; expected "error", "nan" or "skip"', where="on_bad_cell")
    if not lease_seconds > 0:
        raise InvalidArgumentError(f"{lease_seconds!r}; expected more than 0", where="lease_seconds")


def _summary(
    folder: Path, plan: Plan, worker: ShardWorker, done: dict[int, Manifest], seconds: float
) -> RunSummary:
    manifests = list(done.values())
    return RunSummary(
        folder=str(folder),
        complete=len(done) == len(plan.shards),
        num_shards=len(plan.shards),
        num_done=len(done),
        num_cells=plan.num_cells,
        hidden_size=plan.hidden_size,
        num_computed=worker.num_computed,
        cells_computed=worker.num_cells,
        num_without_genes=sum(len(manifest.without_genes) for manifest in manifests),
        num_not_finite=sum(len(manifest.not_finite) for manifest in manifests),
        num_truncated=sum(manifest.num_truncated for manifest in manifests),
        num_tokens=sum(manifest.num_tokens for manifest in manifests),
        num_halvings=worker.token_budget.num_halvings,
        seconds=round(seconds, 3),
        plan_sha256=plan.sha256,
    )
