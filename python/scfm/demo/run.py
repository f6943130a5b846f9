"""The demo from end to end: real cells, an embedding, its scores beside the baselines', a verdict.

Two kinds. By default scfm-mini, which comes with the package, embeds the cells at once (with_mini.py). With
``pretrain`` a small Geneformer is trained from nothing on some of them and scored on the others (from_scratch.py).
Either way the folder is complete or keeps what it held before: results are made in a hidden folder inside it and moved
into place at the end.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scfm.demo import from_scratch, with_mini
from scfm.demo.clock import Clock
from scfm.demo.folder import put_in_place, usable_folder
from scfm.errors import InvalidArgumentError
from scfm.evaluate import Report

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DemoResult", "run_demo"]

OFFER = "To train a small model from nothing on these cells instead (about 3 minutes): scfm demo --pretrain"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it lies. masked: of hidden genes, where a model was pretrained; products: the
    files' names; seconds: wall time of each stage.
    """

    folder: Path
    products: tuple[str, ...]
    masked: Report | None
    embedding: Report
    verdict: str
    seconds: dict[str, float]

    @property
    def text(self) -> str:
        """The tables, the verdict and the files, as plain text."""
        tables = [report.to_text() for report in (self.masked, self.embedding) if report is not None]
        files = "\n".join(f"  {self.folder / name}" for name in self.products)
        offer = f"\n{OFFER}\n" if self.masked is None else ""
        return "\n".join(tables) + f"\n{self.verdict}\n\nSaved:\n{files}\n{offer}"


def run_demo(
    out: str | Path,
    *,
    pretrain: bool = False,
    minutes: float = 3.0,
    seed: int = 0,
    quick: bool = False,
    console: Console | None = None,
) -> DemoResult:
    """Run the demo and save tables, pictures and embedded cells in the folder ``out``.

    pretrain: train a small Geneformer first and judge that; minutes: about how long this takes on 2 cores; it sets the
    number of epochs, so the same minutes give the same numbers on any machine. quick: a few steps only and no UMAP, for
    tests. console: a rich console for progress and the final text; silent without one.
    Raises InvalidArgumentError when ``out`` holds something other than an earlier demo, MissingDependencyError without
    the extra ``demo``.
    """
    if not minutes > 0:
        raise InvalidArgumentError(f"minutes is {minutes}, expected more than 0", where="run_demo")
    folder = usable_folder(Path(out))
    clock = Clock(console)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        work = Path(partial)
        if pretrain:
            masked, embedding, verdict = from_scratch.produce(work, folder, minutes, seed, quick, clock)
            products, others = from_scratch.PRODUCTS, with_mini.PRODUCTS
        else:
            embedding, verdict = with_mini.produce(work, seed, quick, clock)
            masked, products, others = None, with_mini.PRODUCTS, from_scratch.PRODUCTS
        stale = [name for name in others if name not in products]
        put_in_place(work, folder, products, others=stale)
    result = DemoResult(folder, products, masked, embedding, verdict, clock.seconds)
    if console is not None:
        console.print(result.text, markup=False, highlight=False, soft_wrap=True)
    return result
