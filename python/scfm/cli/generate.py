"""``scfm generate``: expression of genes that a file does not hold, from those that it holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from scfm.cli import options
from scfm.cli.console import cell_progress, emit, reporting, say


def generate(
    data: Annotated[Path, typer.Argument(help="The cells; the genes that they express are known.")],
    model: options.Model,
    genes: Annotated[
        str, typer.Option("--genes", "-g", help="Symbols with commas between, or a file of one a line.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; ends in .h5ad.")],
    iterations: Annotated[int, typer.Option(help="K: the most confident 1/K become known each time.")] = 1,
    confidence: Annotated[
        str, typer.Option(help='"auto", "zeros", "bounded", "agreement" or "none".')
    ] = "auto",
    counts_layer: options.CountsLayer = None,
    species: options.Species = "human",
    dtype: Annotated[str, typer.Option(help='"auto", "float32" or "bfloat16".')] = "auto",
    device: options.Device = "auto",
    token_budget: Annotated[int | None, typer.Option(help="Most tokens computed at once.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate GENES for every cell of DATA with a scGPT of generative pretraining.

    What a cell expresses of GENES is hidden from the model, so that it can be compared with OUT: predictions in X, and
    as layers the values given to later iterations, the confidence and the iteration of each.
    """
    with reporting(as_json=as_json):
        from scfm.data.atomic_file import whole_file
        from scfm.models.load import load
        from scfm.tasks.generate import KEY
        from scfm.tasks.generate import generate as run

        _check_out(data, out)
        asked = _asked(genes)
        loaded = load(model, dtype=dtype, device=device)
        start = time.perf_counter()
        with cell_progress("generating", quiet=quiet or as_json) as progress:
            found = run(
                loaded,
                data,
                genes=asked,
                num_iterations=iterations,
                confidence=confidence,  # type: ignore[arg-type]  # checked there, with the allowed names
                counts_layer=counts_layer,
                species=species,
                token_budget=token_budget,
                progress=progress,
            )
        seconds = time.perf_counter() - start
        with whole_file(out) as temporary:
            found.write_h5ad(temporary)
        if as_json:
            emit(
                {
                    "ok": True,
                    "out": str(out),
                    "shape": list(found.shape),
                    "seconds": seconds,
                    **found.uns["scfm"][KEY],
                }
            )
        else:
            say(f"{found.n_obs:,} cells x {found.n_vars:,} genes in {seconds:.1f} s -> {out}")


def _asked(genes: str) -> list[str]:
    """The named genes, or the lines of the file of that name."""
    from scfm.errors import FormatError, InvalidArgumentError

    path = Path(genes)
    if "," in genes or not path.is_file():
        found = genes.split(",")
    else:
        try:
            found = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise FormatError(f"is no text in UTF-8: {error}", path=path, where="--genes") from error
    named = [name.strip() for name in found if name.strip()]
    if not named:
        raise InvalidArgumentError("names no gene", where="--genes")
    return named


def _check_out(data: Path, out: Path) -> None:
    from scfm.embed.files import check_h5ad_copy
    from scfm.errors import InvalidArgumentError

    if out.suffix != ".h5ad":
        raise InvalidArgumentError("expected a name ending in .h5ad", where="--out", path=out)
    if not out.parent.is_dir():
        raise InvalidArgumentError("the folder does not exist", where="--out", path=out.parent)
    if data.suffix == ".h5ad" and data.exists():
        check_h5ad_copy(data, out)  # never over somebody's counts
    elif out.exists():
        raise InvalidArgumentError("exists already", where="--out", path=out, hint="Remove it first.")
