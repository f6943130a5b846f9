"""``scfm impute``: expression at another read depth, of files of any size: cells pass through one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scfm.cli import options
from scfm.cli.console import cell_progress, emit, reporting, say

if TYPE_CHECKING:
    import numpy as np

    from scfm.data.source import CellSource
    from scfm.models.engine import Progress
    from scfm.tasks.impute import Imputation


def impute(
    data: options.DataFile,
    model: options.Model,
    target_depth: Annotated[
        str, typer.Option("--target-depth", "-t", help='Counts a cell (10000), or "t4", "f5", "a1".')
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A name ending in .npy or .h5ad.")],
    key: Annotated[str, typer.Option(help="Name of the layer in an .h5ad.")] = "scfoundation_imputed",
    variant: Annotated[str, typer.Option(help="Which of the file's models; its authors use gene.")] = "gene",
    family: options.Family = None,
    genes: options.Genes = None,
    dtype: Annotated[str, typer.Option(help='"auto", "float32" or "bfloat16".')] = "auto",
    device: options.Device = "auto",
    token_budget: Annotated[int | None, typer.Option(help="Most tokens computed at once.")] = None,
    on_bad_cell: Annotated[str, typer.Option(help='Cells without known genes: "nan" or "error".')] = "nan",
    counts_layer: options.CountsLayer = None,
    assume_counts: options.AssumeCounts = False,
    species: options.Species = "human",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict the expression of every gene of DATA at another read depth, with scFoundation.

    OUT ending in .npy gets cells x genes of DATA in ln(1 + CP10k), float32, NaN where the model does not know the gene
    (and OUT.json its provenance); ending in .h5ad, a copy of DATA with the layer. It is written as cells pass, whole or
    not at all.
    """
    with reporting(as_json=as_json):
        from scfm.data.read import read
        from scfm.embed.files import check_h5ad_copy
        from scfm.errors import InvalidArgumentError
        from scfm.models.load import load
        from scfm.tasks.impute import Imputation

        if out.suffix not in (".npy", ".h5ad") or (out.suffix == ".h5ad" and data.suffix != ".h5ad"):
            raise InvalidArgumentError(
                "expected a name ending in .npy, or in .h5ad when the input is .h5ad", where="--out", path=out
            )
        if not out.parent.is_dir():
            raise InvalidArgumentError("the folder does not exist", where="--out", path=out.parent)
        if "/" in key or not key:
            raise InvalidArgumentError(f"{key!r} is no name of a layer", where="--key")
        if out.suffix == ".h5ad":
            check_h5ad_copy(data, out)
        loaded = load(model, family=family, variant=variant, genes=genes, dtype=dtype, device=device)
        imputation = Imputation(
            loaded, _depth(target_depth), token_budget=token_budget, on_bad_cell=on_bad_cell
        )
        source = imputation.model.read_cells(data, counts_layer=counts_layer, assume_counts=assume_counts)
        columns = imputation.columns_of(read(data, layer="X", assume_counts=True).genes, species)
        start = time.perf_counter()
        with cell_progress("imputing", quiet=quiet or as_json) as progress:
            fill = _filling(imputation, source, columns, species, progress)
            shape = (len(source), len(columns))
            _write(data, out, key, shape, fill, imputation)
        seconds = time.perf_counter() - start
        facts = imputation.facts(source.name)
        if as_json:
            emit({"ok": True, "out": str(out), "shape": list(shape), "seconds": seconds, **facts})
            return
        say(str(imputation.model.tokenizer.report))
        say(f"{shape[0]:,} cells x {shape[1]:,} genes, {facts['units']} ({facts['target_depth']}) -> {out}")
        say(f"{seconds:.1f} s, {shape[0] / max(seconds, 1e-9):,.2f} cells/s")


def _depth(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _filling(
    imputation: Imputation, source: CellSource, columns: np.ndarray, species: str, progress: Progress
) -> Callable[[Any], None]:
    """Writes the rows, as they are predicted, into whatever is indexed by cells."""

    def fill(target: Any) -> None:
        import numpy as np

        empty = np.full((1, len(columns)), np.nan, dtype=np.float32)
        expected = 0
        for cells, rows in imputation.rows(source, columns, species=species, progress=progress):
            for missing in range(expected, int(cells[0])):
                target[missing : missing + 1] = empty
            expected = int(cells[-1]) + 1
            target[int(cells[0]) : expected] = rows
        for missing in range(expected, len(source)):
            target[missing : missing + 1] = empty

    return fill


def _write(
    data: Path,
    out: Path,
    key: str,
    shape: tuple[int, int],
    fill: Callable[[Any], None],
    imputation: Imputation,
) -> None:
    import numpy as np

    from scfm.embed.files import write_h5ad_copy, write_npy_as_filled

    if out.suffix == ".npy":
        write_npy_as_filled(out, (shape, np.dtype(np.float32), fill), lambda: imputation.facts(str(data)))
        return
    filled = (shape, np.dtype(np.float32), fill)
    write_h5ad_copy(data, out, filled, key, lambda: imputation.facts(str(data)), room="layers")
