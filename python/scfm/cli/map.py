"""``scfm map``: labels of a reference for the cells of a file, as a table with what they rest on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scfm.cli import options
from scfm.cli.console import cell_progress, emit, reporting, say

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.models.base import FoundationModel

KEY = "label"
REP = "X_embedding"


def map_cells(
    query: Annotated[Path, typer.Argument(help="The cells: a file, or a folder written by scfm embed.")],
    reference: Annotated[Path, typer.Argument(help="The labelled cells: the same.")],
    labels: Annotated[str, typer.Option("--labels", "-l", help="Column of the reference's obs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A table, ending in .csv or .tsv.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Embeds what is no folder of embeddings.")
    ] = None,
    neighbors: Annotated[int, typer.Option(help="Reference cells that vote.")] = 10,
    metric: Annotated[str, typer.Option(help='"l2" or "cosine".')] = "l2",
    weights: Annotated[
        str, typer.Option(help='A vote counts: "uniform", "distance" or "frequency".')
    ] = "uniform",
    max_distance: Annotated[float | None, typer.Option(help="Farther cells stay Unassigned.")] = None,
    min_confidence: Annotated[float | None, typer.Option(help="With a smaller share of votes, too.")] = None,
    truth: Annotated[
        str | None, typer.Option(help="True labels in the query's obs: a score, beside plain expression.")
    ] = None,
    backend: Annotated[str, typer.Option(help='Search: "auto", "exact" or "faiss"; same result.')] = "auto",
    dictionaries: options.Dictionaries = None,
    counts_layer: options.CountsLayer = None,
    species: options.Species = "human",
    dtype: Annotated[str, typer.Option(help='"auto", "float32" or "bfloat16".')] = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Give every cell of QUERY the label that most of its nearest cells in REFERENCE have.

    OUT gets a line a cell: label, its share of the votes, distance and row of the nearest reference cell. A cell
    without an embedding is Unassigned.
    """
    with reporting(as_json=as_json):
        from scfm.errors import InvalidArgumentError
        from scfm.tasks.map_to_reference import map_to_reference
        from scfm.tasks.mapping_report import mapping_report

        if out.suffix not in (".csv", ".tsv"):
            raise InvalidArgumentError("expected a name ending in .csv or .tsv", where="--out", path=out)
        if not out.parent.is_dir():
            raise InvalidArgumentError("the folder does not exist", where="--out", path=out.parent)
        folders = [path for path in (query, reference) if _is_store(path)]
        if truth is not None and folders:
            raise InvalidArgumentError(
                "needs counts for its baselines, and this is a folder of embeddings",
                where="--truth",
                path=folders[0],
                hint="Give the files themselves, with --model.",
            )
        loaded = None
        if len(folders) < 2:
            if model is None:
                raise InvalidArgumentError(
                    "give the model that embeds the cells", where="--model", hint="Or folders of scfm embed."
                )
            from scfm.models.load import load

            loaded = load(model, dictionaries=dictionaries, dtype=dtype, device=device)
        settings = {"counts_layer": counts_layer, "species": species}
        with cell_progress("embedding", quiet=quiet or as_json) as progress:
            cells = _embedded(query, loaded, progress, settings)
            known = reference if _is_store(reference) else _embedded(reference, loaded, progress, settings)
        map_to_reference(
            cells,
            known,
            labels=labels,
            use_rep=REP,
            num_neighbors=neighbors,
            metric=metric,  # type: ignore[arg-type]  # checked there, with the allowed names
            weights=weights,  # type: ignore[arg-type]
            max_distance=max_distance,
            min_confidence=min_confidence,
            backend=backend,  # type: ignore[arg-type]
            on_bad_cell="nan",
            key_added=KEY,
        )
        report = None
        if truth is not None:
            assert not isinstance(known, Path)
            report = mapping_report(
                cells, known, labels=labels, truth=truth, key=KEY, counts=query, reference_counts=reference
            )
        _write_table(cells, out)
        counts = {str(name): int(count) for name, count in cells.obs[KEY].value_counts().items() if count}
        if as_json:
            facts = {**cells.uns["scfm"][KEY], "reference": str(reference)}
            found = {"ok": True, "out": str(out), "num_cells": cells.n_obs, "cells_of_label": counts, **facts}
            emit({**found, **({} if report is None else {"report": report.to_dict()})})
            return
        for name, count in counts.items():
            say(f"{count:>10,}  {name}")
        say(f"{cells.n_obs:,} cells -> {out}")
        if report is not None:
            say(report.to_text())


def _is_store(path: Path) -> bool:
    from scfm.embed.plan import PLAN_NAME

    return (path / PLAN_NAME).is_file()


def _embedded(path: Path, model: FoundationModel | None, progress: Any, settings: dict[str, Any]) -> AnnData:
    """The cells with their embedding and what made it, without their counts."""
    import pandas as pd
    from anndata import AnnData

    from scfm.embed.provenance import provenance
    from scfm.embed.store import open_store

    if _is_store(path):
        store = open_store(path)
        made_by = {**store.plan.model, "layer": store.plan.layer, "pooling": store.plan.pooling}
        obs = pd.DataFrame(index=pd.RangeIndex(store.num_cells).astype(str))
        return AnnData(obs=obs, obsm={REP: store.read()}, uns={"scfm": {REP: made_by}})
    assert model is not None
    source = model.tokenizer.read(path, layer=settings["counts_layer"])
    rows = model.embed(source, on_bad_cell="nan", progress=progress, species=settings["species"])
    made_by = provenance(
        model, layer=model.default_layer, pooling=model.default_pooling, source=path.name, tokenization={}
    )
    return AnnData(obs=source.obs.copy(), obsm={REP: rows}, uns={"scfm": {REP: made_by}})


def _write_table(cells: AnnData, out: Path) -> None:
    import pandas as pd

    from scfm.data.atomic_file import whole_file

    table = pd.DataFrame(
        {
            "label": cells.obs[KEY].astype(str),
            "confidence": cells.obs[f"{KEY}_confidence"],
            "nearest_distance": cells.obsm[f"{KEY}_distances"][:, 0],
            "nearest_row": cells.obsm[f"{KEY}_neighbors"][:, 0],
        },
        index=cells.obs_names,
    )
    with whole_file(out) as temporary:
        table.to_csv(temporary, sep="\t" if out.suffix == ".tsv" else ",", index_label="cell")
