"""``scfm embed``: cell embeddings of files, as .npy, as a copy of the .h5ad, or as a folder that can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from scfm.cli import options
from scfm.cli.console import cell_progress, emit, reporting, run_progress, say, stop_on_sigterm

if TYPE_CHECKING:
    from scfm.models.base import FoundationModel

_OTHER_FILES = (
    ".csv",
    ".tsv",
    ".txt",
    ".json",
    ".parquet",
    ".zarr",
    ".loom",
    ".h5",
    ".hdf5",
    ".pt",
    ".gz",
    ".npz",
)
Data = Annotated[list[Path], typer.Argument(help="Files with raw counts; several only into a folder.")]


def embed(
    data: Data,
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder, or a name ending in .npy or .h5ad.")],
    key: Annotated[str | None, typer.Option(help="obsm key in an .h5ad; default X_<family>.")] = None,
    layer: Annotated[int | None, typer.Option(help="0 = last layer, -1 = second to last (default).")] = None,
    pooling: Annotated[str | None, typer.Option(help='"cls" or "mean"; default the authors\'.')] = None,
    dtype: Annotated[str, typer.Option(help='"auto", "float32" or "bfloat16".')] = "auto",
    device: options.Device = "auto",
    token_budget: Annotated[int | None, typer.Option(help="Most tokens computed at once.")] = None,
    on_bad_cell: Annotated[
        str, typer.Option(help='Cells without known genes: "nan", "error", or (folders) "skip".')
    ] = "nan",
    dictionaries: options.Dictionaries = None,
    version: options.Version = None,
    family: options.Family = None,
    variant: options.Variant = None,
    genes: options.Genes = None,
    counts_layer: options.CountsLayer = None,
    assume_counts: options.AssumeCounts = False,
    species: options.Species = "human",
    shard_size: Annotated[int, typer.Option(help="Folders: cells a shard.")] = 65_536,
    store_dtype: Annotated[str, typer.Option(help='Folders: "float32" or "float16".')] = "float32",
    keep_not_finite: Annotated[
        bool, typer.Option("--keep-not-finite", help="Folders: keep NaN of good cells instead of stopping.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Folders: read finished shards, compute damaged ones again.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Folders: wait for shards that other processes hold.")
    ] = True,
    lease_seconds: Annotated[
        float, typer.Option(help="Folders: silence after which a worker counts as dead.")
    ] = 60.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of this process; default all.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Embed every cell of DATA: one row a cell, in the files' order.

    OUT ending in .npy gets the array (and OUT.json its provenance); ending in .h5ad, a copy of DATA with
    obsm[KEY]. Any other OUT is a folder of shards: killed at any moment, the same command goes on where it
    stopped; the same command run several times at once shares the work; scfm verify checks it, scfm export
    makes one file of it.
    """
    with reporting(as_json=as_json), stop_on_sigterm():
        from scfm.errors import InvalidArgumentError

        single = out.suffix in (".npy", ".h5ad")
        if out.suffix in _OTHER_FILES:
            raise InvalidArgumentError(
                "expected a folder's name, or one ending in .npy or .h5ad",
                where="--out",
                path=out,
                hint="For .zarr and .parquet embed into a folder, then run scfm export.",
            )
        if threads is not None:
            _set_threads(threads)

        def load_model() -> FoundationModel:
            from scfm.models.load import load

            loaded = load(
                model,
                family=family,
                variant=variant,
                dictionaries=dictionaries,
                genes=genes,
                version=version,
                dtype=dtype,
                device=device,
            )
            if loaded.load_report is not None:
                _ = loaded.load_report.weights_sha256  # read now: a changed file must not cost the embedding
            return loaded

        settings: dict[str, Any] = {
            "layer": layer,
            "pooling": pooling,
            "token_budget": token_budget,
            "counts_layer": counts_layer,
            "assume_counts": assume_counts,
            "species": species,
        }
        if single:
            _into_file(data, out, key, on_bad_cell, load_model, settings, as_json=as_json, quiet=quiet)
            return
        if key is not None:
            raise InvalidArgumentError("is for .h5ad only", where="--key", hint="Give it to scfm export.")
        sharding = {
            "shard_size": shard_size,
            "store_dtype": store_dtype,
            "on_bad_cell": on_bad_cell,
            "keep_not_finite": keep_not_finite,
            "verify": verify,
            "wait": wait,
            "lease_seconds": lease_seconds,
        }
        _into_folder(data, out, load_model, {**settings, **sharding}, as_json=as_json, quiet=quiet)


def _set_threads(threads: int) -> None:
    import torch

    from scfm import _native
    from scfm.errors import InvalidArgumentError

    if not 1 <= threads <= 1024:
        raise InvalidArgumentError(f"{threads}; expected 1 to 1,024", where="--threads")
    torch.set_num_threads(threads)
    _native.set_num_threads(threads)


def _into_folder(
    data: list[Path],
    out: Path,
    load_model: Callable[[], FoundationModel],
    settings: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from scfm.embed.run import check_folder, embed_to_folder

    check_folder(out)
    loaded = load_model()
    with run_progress(quiet=quiet or as_json) as progress:
        summary = embed_to_folder(data, loaded, out, **settings, progress=progress)
    if as_json:
        emit({"ok": True, **summary.to_dict()})
        return
    say(
        f"{summary.num_done:,} of {summary.num_shards:,} shards are done ({summary.num_computed:,} by this "
        f"process): {summary.num_cells:,} cells x {summary.hidden_size} -> {out}"
    )
    say(
        f"{summary.num_without_genes:,} cells without known genes, {summary.num_truncated:,} truncated, "
        f"{summary.num_not_finite:,} not finite, {summary.num_tokens:,} tokens"
    )
    speed = summary.cells_computed / max(summary.seconds, 1e-9)
    say(f"{summary.seconds:.1f} s, {speed:,.1f} cells/s by this process")
    if summary.complete:
        say(f"complete. Next: scfm verify {out}; scfm export {out} OUT")
    else:
        say("not complete: other processes still hold shards, or run this again")


def _into_file(
    data: list[Path],
    out: Path,
    key: str | None,
    on_bad_cell: str,
    load_model: Callable[[], FoundationModel],
    settings: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from scfm.embed.files import check_h5ad_copy, write_h5ad_copy, write_npy
    from scfm.embed.provenance import provenance
    from scfm.errors import InvalidArgumentError

    source = _one_input(data, out)
    if on_bad_cell not in ("nan", "error"):
        raise InvalidArgumentError(f'{on_bad_cell!r}; expected "nan" or "error"', where="--on-bad-cell")
    if not out.parent.is_dir():
        raise InvalidArgumentError("the folder does not exist", where="--out", path=out.parent)
    if "/" in (key or ""):
        raise InvalidArgumentError(f"{key!r} may not contain '/'", where="--key")
    if out.suffix == ".h5ad":
        check_h5ad_copy(source, out)
    loaded = load_model()
    start = time.perf_counter()
    with cell_progress("embedding", quiet=quiet or as_json) as progress:
        embedding = loaded.embed(
            source, on_bad_cell=cast(Literal["nan", "error"], on_bad_cell), progress=progress, **settings
        )
    seconds = time.perf_counter() - start
    report = loaded.tokenizer.report
    layer, pooling = settings["layer"], settings["pooling"]
    facts = provenance(
        loaded,
        layer=loaded.default_layer if layer is None else layer,
        pooling=pooling or loaded.default_pooling,
        source=source.name,
        tokenization={**loaded.tokenizer.describe(), "report": report.to_dict()},
    )
    if out.suffix == ".npy":
        write_npy(out, embedding, facts)
    else:
        write_h5ad_copy(source, out, embedding, key or f"X_{loaded.family}", facts)
    if as_json:
        emit({"ok": True, "out": str(out), "shape": list(embedding.shape), "seconds": seconds, **facts})
    else:
        say(str(report))
        say(f"{embedding.shape[0]:,} cells x {embedding.shape[1]} in {facts['dtype']} -> {out}")
        say(f"{seconds:.1f} s, {embedding.shape[0] / max(seconds, 1e-9):,.1f} cells/s")


def _one_input(data: list[Path], out: Path) -> Path:
    from scfm.errors import InvalidArgumentError

    if len(data) != 1:
        raise InvalidArgumentError(
            f"{len(data)} input files for one {out.suffix}",
            where="DATA",
            hint="Give --out a folder's name, then scfm export makes one file of it.",
        )
    if out.suffix == ".h5ad" and data[0].suffix != ".h5ad":
        raise InvalidArgumentError(
            "expected a name ending in .npy, or in .h5ad when the input is .h5ad", where="--out", path=out
        )
    return data[0]
