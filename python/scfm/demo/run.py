"""The demo from end to end: split real cells, pretrain a small Geneformer on some, score it on the others.

Everything a score depends on is fitted on training cells alone: the vocabulary and gene medians, the model,
the principal components, the counted baselines. The folder is complete or keeps what it held before:
results are made in a hidden folder inside it and moved into place at the end.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.demo.cells import demo_cells
from scfm.demo.scores import embedding_report, masked_gene_report
from scfm.demo.verdict import plain_verdict
from scfm.errors import InvalidArgumentError
from scfm.evaluate import Report, expression_baselines, stratified_split
from scfm.plot import learning_curve, umap

if TYPE_CHECKING:
    from anndata import AnnData
    from rich.console import Console

    from scfm.models.geneformer.model import Geneformer
    from scfm.train.config import PretrainConfig

__all__ = ["DemoResult", "run_demo"]

TEST_FRACTION = 0.2
NUM_EPOCHS_A_MINUTE = 12
QUICK_STEPS = 40
REPORT = "report.json"
FORMAT = "scfm-demo"
PRODUCTS = (
    "report.md",
    "model",
    "metrics.jsonl",
    "settings.json",
    "cells.h5ad",
    "umap.png",
    "umap_pca.png",
    "learning_curve.png",
    REPORT,  # last: its presence says that the rest is there
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it lies. seconds: wall time of each stage."""

    folder: Path
    masked: Report
    embedding: Report
    verdict: str
    seconds: dict[str, float]

    @property
    def text(self) -> str:
        """Both tables, the verdict and the files, as plain text."""
        files = "\n".join(f"  {self.folder / name}" for name in PRODUCTS)
        return f"{self.masked.to_text()}\n{self.embedding.to_text()}\n{self.verdict}\n\nSaved:\n{files}\n"


def run_demo(
    out: str | Path,
    *,
    minutes: float = 3.0,
    seed: int = 0,
    quick: bool = False,
    console: Console | None = None,
) -> DemoResult:
    """Run the demo and save model, tables, pictures and embedded cells in the folder ``out``.

    minutes: about how long the whole takes on 2 cores; it sets the number of epochs, so the same minutes give the
    same numbers on any machine. quick: a few steps only, for tests. console: a rich console for progress and the
    final text; silent without one.
    Raises InvalidArgumentError when ``out`` holds something other than an earlier demo,
    MissingDependencyError without the extra ``demo``.
    """
    if not minutes > 0:
        raise InvalidArgumentError(f"minutes is {minutes}, expected more than 0", where="run_demo")
    folder = _usable_folder(Path(out))
    clock = _Clock(console)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        result = _produce(Path(partial), folder, minutes, seed, quick, clock)
        for name in PRODUCTS:
            _move_into_place(Path(partial) / name, folder / name)
    if console is not None:
        console.print(result.text, markup=False, highlight=False, soft_wrap=True)
    return result


def _produce(work: Path, folder: Path, minutes: float, seed: int, quick: bool, clock: _Clock) -> DemoResult:
    from scfm.models.geneformer.model import Geneformer
    from scfm.train.objectives import evaluate_masked
    from scfm.train.pretrain import pretrain

    with clock.stage("reading the cells"):
        cells = demo_cells()
        labels = cells.obs["cell_type"].astype(str).to_numpy()
        train, test = stratified_split(labels, test_fraction=TEST_FRACTION, seed=seed)
    with clock.stage("pretraining", bar=True) as progress:
        config = _pretrain_config(cells[train].copy(), work, minutes, seed, quick)
        trained = pretrain(config, progress=progress)
        model = trained.model
        assert isinstance(model, Geneformer)
        untrained = Geneformer.from_config(model.config, model.vocab, seed=seed)
    with clock.stage("embedding"):
        ours, random = (_embed(each, cells) for each in (model, untrained))
        baselines = expression_baselines(
            cells.X.indptr,
            cells.X.indices,
            cells.X.data,
            cells.n_vars,
            train,
            library_size=cells.obs["n_counts"].to_numpy(),
        )
    with clock.stage("scoring"):
        test_cells = model.tokenize(cells[test].copy())
        masked = masked_gene_report(
            model=model,
            train_cells=model.tokenize(cells[train].copy()),
            evaluations={
                "ours": evaluate_masked(model, test_cells, seed=seed),
                "random": evaluate_masked(untrained, test_cells, seed=seed),
            },
            test_cells=test_cells,
            seed=seed,
        )
        embedding = embedding_report(ours, random, baselines, labels, train, test, seed=seed)
    with clock.stage("drawing"):
        _store_cells(cells, work, ours, baselines, train, seed)
        _draw(cells, work, masked, quick)
    text = plain_verdict(masked, embedding, num_parameters=model.num_parameters())
    result = DemoResult(folder, masked, embedding, text, clock.seconds)
    _write_reports(work, result, cells, config)
    return result


def _pretrain_config(cells: AnnData, work: Path, minutes: float, seed: int, quick: bool) -> PretrainConfig:
    from scfm.train.config import PretrainConfig

    # Two layers of width 128 with a high learning rate learn far more in minutes than a deeper, slower model.
    return PretrainConfig(
        data=[cells],
        out=work,
        num_layers=2,
        hidden_size=128,
        num_heads=4,
        ffn_size=256,
        max_tokens=512,
        special_tokens=True,
        # About 16 cells a step.
        token_budget=16 * 512,
        microbatches_per_step=1,
        learning_rate=3e-3,
        weight_decay=1e-3,
        warmup_ratio=0.05,
        schedule="linear",
        num_epochs=max(round(NUM_EPOCHS_A_MINUTE * minutes), 1),
        max_steps=QUICK_STEPS if quick else None,
        precision="float32",
        checkpoint_every=None,
        held_out_fraction=0.0,
        dropout=0.0,
        seed=seed,
    )


def _embed(model: Geneformer, cells: AnnData) -> NDArray[np.float32]:
    # The mean over genes: with so little training <cls> has hardly learned to summarise. The layer is the
    # authors' default.
    return model.embed(cells, pooling="mean")


def _store_cells(
    cells: AnnData,
    work: Path,
    ours: NDArray[np.float32],
    baselines: dict[str, NDArray[np.float32]],
    train: NDArray[np.int64],
    seed: int,
) -> None:
    in_train = np.zeros(cells.n_obs, dtype=bool)
    in_train[train] = True
    cells.obs["split"] = np.where(in_train, "train", "test")
    cells.obsm["X_geneformer"] = ours
    cells.obsm["X_pca"] = baselines["PCA-50"]
    cells.uns["demo"]["seed"] = seed
    cells.write_h5ad(work / "cells.h5ad")


def _draw(cells: AnnData, work: Path, masked: Report, quick: bool) -> None:
    pictures = {
        "X_geneformer": ("the small Geneformer of this demo", "umap.png"),
        "X_pca": ("PCA-50 of the same cells", "umap_pca.png"),
    }
    for basis, (title, name) in pictures.items():
        # umap-learn compiles itself for 20 seconds at first use; a quick run draws two dimensions as is.
        points = cells.obsm[basis][:, :2] if quick else cells.obsm[basis]
        umap(points, color=cells.obs["cell_type"].to_numpy(), title=title, path=work / name)
    metric = masked.metrics[1].name
    lines = (work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    held_out = {"step": records[-1]["step"], "held_out_loss": masked.ours.values[metric]}
    learning_curve(
        [*records, held_out],
        baselines={row.name: row.values[metric] for row in masked.rows if row.role == "baseline"},
        title="masked-gene prediction; dashed: baselines on held-out cells",
        path=work / "learning_curve.png",
    )


def _write_reports(work: Path, result: DemoResult, cells: AnnData, config: PretrainConfig) -> None:
    content: dict[str, Any] = {
        "format": FORMAT,
        "cells": dict(cells.uns["demo"]),
        "settings": config.to_dict() | {"out": str(result.folder)},
        "masked_genes": result.masked.to_dict(),
        "embedding": result.embedding.to_dict(),
        "verdict": result.verdict,
        "seconds": result.seconds,
    }
    # The run's own settings name the folder it was made in; what stays must name the one it stands in.
    settings = json.loads((work / "settings.json").read_text(encoding="utf-8")) | {"out": str(result.folder)}
    (work / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (work / REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (work / "report.md").write_text(
        f"# scfm demo\n\n{result.verdict}\n\n"
        f"{result.masked.to_markdown()}\n{result.embedding.to_markdown()}\n"
        "![UMAP of the model's embedding](umap.png)\n![UMAP of PCA](umap_pca.png)\n"
        "![learning curve](learning_curve.png)\n",
        encoding="utf-8",
    )


def _usable_folder(folder: Path) -> Path:
    """The folder, made if needed; one that holds anything but an earlier demo is refused, not overwritten."""
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError("is a file, expected a folder", path=folder, where="out")
    if folder.is_dir():
        found = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".partial-")]
        if found and not _is_demo(folder / REPORT):
            raise InvalidArgumentError(
                f"holds {len(found)} files and is no earlier demo",
                path=folder,
                hint="Give a new or empty folder.",
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_demo(report: Path) -> bool:
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _move_into_place(made: Path, final: Path) -> None:
    if final.is_dir() and made.is_dir():
        shutil.rmtree(final)
    made.replace(final)


class _Clock:
    """Times each stage and, with a console, says what runs."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, *, bar: bool = False) -> Iterator[Callable[[dict[str, Any]], None] | None]:
        start = time.perf_counter()
        if self.console is None:
            yield None
        elif bar:
            with self._bar(name) as update:
                yield update
        else:
            with self.console.status(f"{name} ..."):
                yield None
        self.seconds[name] = round(time.perf_counter() - start, 2)
        if self.console is not None:
            self.console.print(f"{name}: {self.seconds[name]:.1f} s", markup=False, highlight=False)

    @contextmanager
    def _bar(self, name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.2f}, {task.fields[rate]:,.0f} cells/s, left:"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=1.0, loss=float("nan"), rate=0.0)

            def advance(metrics: dict[str, Any]) -> None:
                if "event" not in metrics:
                    loss, rate = metrics["loss"], metrics["cells_per_s"]
                    progress.update(task, completed=metrics["progress"], loss=loss, rate=rate)

            yield advance
