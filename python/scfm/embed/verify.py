"""``scfm verify``: whether a folder of embeddings is whole, and every byte still the one that was written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from scfm.data.atomic_file import TEMPORARY_SUFFIX
from scfm.data.checksum import file_crc32
from scfm.embed.commit import ASIDE
from scfm.embed.manifest import Manifest, sound_manifest
from scfm.embed.plan import PLAN_NAME, Plan, Shard, read_plan
from scfm.errors import IntegrityError, ScfmError

__all__ = ["Problem", "VerifyReport", "checked_shard", "verify_store"]


@dataclass(frozen=True)
class Problem:
    """shard: "part-00042"; kind: "missing" (not computed yet) or "damaged"."""

    shard: str
    kind: Literal["missing", "damaged"]
    message: str


@dataclass
class VerifyReport:
    """problems: empty if every planned shard is there and sound. leftovers: files of no use any more or of
    workers still busy; harmless. unknown: files that are none of the plan's.
    """

    folder: str
    plan_sha256: str
    num_shards: int
    num_cells: int
    num_good: int = 0
    num_without_genes: int = 0
    num_not_finite: int = 0
    num_truncated: int = 0
    problems: list[Problem] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify_store(folder: str | Path) -> VerifyReport:
    """Reads every byte. Raises what read_plan raises; everything else is in the report."""
    folder = Path(folder)
    plan = read_plan(folder)
    report = VerifyReport(str(folder), plan.sha256, len(plan.shards), plan.num_cells)
    for shard in plan.shards:
        try:
            manifest = checked_shard(folder, shard, plan)
        except (ScfmError, OSError) as error:
            report.problems.append(Problem(shard.name, "damaged", str(error)))
            continue
        if manifest is None:
            report.problems.append(Problem(shard.name, "missing", "not finished: resume the run"))
            continue
        report.num_good += 1
        report.num_without_genes += len(manifest.without_genes)
        report.num_not_finite += len(manifest.not_finite)
        report.num_truncated += manifest.num_truncated
    _look_around(folder, plan, report)
    return report


def checked_shard(folder: Path, shard: Shard, plan: Plan) -> Manifest | None:
    """The manifest of a shard whose every byte was compared; None if it is not finished.

    Raises IntegrityError or FormatError saying what is damaged.
    """
    manifest = sound_manifest(folder, shard, plan)
    if manifest is None:
        return None
    array = folder / shard.array_name
    crc32 = file_crc32(array)
    if crc32 != manifest.crc32:
        raise IntegrityError(
            f"its bytes have changed since they were written (CRC-32 {crc32:08x}, expected {manifest.crc32:08x})",
            path=array,
            hint="Resume with --verify to compute it again.",
        )
    return manifest


def _look_around(folder: Path, plan: Plan, report: VerifyReport) -> None:
    done = {shard.manifest_name for shard in plan.shards} | {PLAN_NAME, ASIDE}
    arrays = {shard.array_name: shard for shard in plan.shards}
    for entry in sorted(folder.iterdir()):
        if entry.name in done:
            continue
        if entry.name in arrays:
            if not (folder / arrays[entry.name].manifest_name).exists():
                report.leftovers.append(entry.name)
        elif entry.name.endswith((TEMPORARY_SUFFIX, ".lease", ".guard")):
            report.leftovers.append(entry.name)
        else:
            report.unknown.append(entry.name)
