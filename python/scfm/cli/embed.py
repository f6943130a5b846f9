"""``scfm embed``: cell embeddings of a file, as .npy or as a copy of the .h5ad."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from scfm.cli import options
from scfm.cli.console import cell_progress, emit, reporting, say


def embed(
    data: options.DataFile,
    model: options.Model,
    out: options.Out,
    key: Annotated[str | None, typer.Option(help="obsm key in an .h5ad; default X_<family>.")] = None,
    layer: Annotated[int | None, typer.Option(help="0 = last layer, -1 = second to last (default).")] = None,
    pooling: Annotated[str | None, typer.Option(help='"cls" or "mean"; default the authors\'.')] = None,
    dtype: Annotated[str, typer.Option(help='"auto", "float32" or "bfloat16".')] = "auto",
    device: options.Device = "auto",
    token_budget: Annotated[int | None, typer.Option(help="Most tokens computed at once.")] = None,
    on_bad_cell: Annotated[str, typer.Option(help='Cells without known genes: "nan" or "error".')] = "nan",
    dictionaries: options.Dictionaries = None,
    version: options.Version = None,
    counts_layer: options.CountsLayer = None,
    assume_counts: options.AssumeCounts = False,
    species: options.Species = "human",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Embed every cell of DATA: one float32 row a cell, in the file's order.

    OUT ending in .npy gets the array (and OUT.json its provenance); ending in .h5ad, a copy of DATA with
    obsm[KEY].
    """
    with reporting(as_json=as_json):
        from scfm.embed.files import check_h5ad_copy, write_h5ad_copy, write_npy
        from scfm.embed.provenance import provenance
        from scfm.errors import InvalidArgumentError
        from scfm.models.load import load

        suffix = out.suffix
        if suffix not in (".npy", ".h5ad") or (suffix == ".h5ad" and data.suffix != ".h5ad"):
            raise InvalidArgumentError(
                "expected a name ending in .npy, or in .h5ad when the input is .h5ad", where="--out", path=out
            )
        policy: Literal["nan", "error"]
        if on_bad_cell == "nan":
            policy = "nan"
        elif on_bad_cell == "error":
            policy = "error"
        else:
            raise InvalidArgumentError(f'{on_bad_cell!r}; expected "nan" or "error"', where="--on-bad-cell")
        if not out.parent.is_dir():
            raise InvalidArgumentError("the folder does not exist", where="--out", path=out.parent)
        if "/" in (key or ""):
            raise InvalidArgumentError(f"{key!r} may not contain '/'", where="--key")
        if suffix == ".h5ad":
            check_h5ad_copy(data, out)
        loaded = load(model, dictionaries=dictionaries, version=version, dtype=dtype, device=device)
        if loaded.load_report is not None:
            _ = loaded.load_report.weights_sha256  # read now: a file that changed must not cost the embedding
        start = time.perf_counter()
        with cell_progress("embedding", quiet=quiet or as_json) as progress:
            embedding = loaded.embed(
                data,
                layer=layer,
                pooling=pooling,
                token_budget=token_budget,
                on_bad_cell=policy,
                progress=progress,
                counts_layer=counts_layer,
                assume_counts=assume_counts,
                species=species,
            )
        seconds = time.perf_counter() - start
        report = loaded.tokenizer.report
        facts = provenance(
            loaded,
            layer=loaded.default_layer if layer is None else layer,
            pooling=pooling or loaded.default_pooling,
            source=Path(data).name,
            tokenization={**loaded.tokenizer.describe(), "report": report.to_dict()},
        )
        if suffix == ".npy":
            write_npy(out, embedding, facts)
        else:
            write_h5ad_copy(data, out, embedding, key or f"X_{loaded.family}", facts)
        if as_json:
            emit({"ok": True, "out": str(out), "shape": list(embedding.shape), "seconds": seconds, **facts})
        else:
            say(str(report))
            say(f"{embedding.shape[0]:,} cells x {embedding.shape[1]} in {facts['dtype']} -> {out}")
            say(f"{seconds:.1f} s, {embedding.shape[0] / max(seconds, 1e-9):,.1f} cells/s")
