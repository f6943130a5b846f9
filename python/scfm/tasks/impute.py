"""``scfm.tl.impute``: expression as a deeper sequencing run would have measured it, predicted by scFoundation.

The model is told the depth that a cell has and a depth to aim at, and predicts all its genes there, those that were
measured and those that were missed. Cells go through the decoder one after the other, so memory is that of the result.
A prediction is a model's opinion: ``scfm.tl.imputation_report`` says on your own cells what it is worth.
Source: Hao et al. 2024 (read-depth enhancement); the authors' output "gene_expression".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scfm.data.available_memory import require_memory
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.embed.provenance import provenance
from scfm.errors import BadCellError, InvalidArgumentError, ScfmWarning
from scfm.models.base import FoundationModel
from scfm.models.engine import Progress
from scfm.models.scfoundation.model import Scfoundation

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["UNITS", "Imputation", "impute", "target_of"]

UNITS = "ln(1 + counts per 10,000) at the target's read depth"
_VARIANT = "gene"


def impute(
    adata: AnnData,
    model: FoundationModel,
    *,
    target_depth: str | float,
    genes: Sequence[str] | None = None,
    key_added: str | None = None,
    counts_layer: str | None = None,
    assume_counts: bool = False,
    species: str | None = None,
    token_budget: int | None = None,
    on_bad_cell: Literal["error", "nan"] = "error",
    progress: Progress | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Predict every gene of ``adata`` at another read depth, from its raw counts.

    model: scFoundation, variant "gene". target_depth: a number of counts (10_000), or as the authors write it: "t4"
    (10^4 counts), "f5" (5 times each cell's own), "a1" (10 times its own). Writes ``layers[key_added]`` (default
    "scfoundation_imputed"), float32, in ln(1 + CP10k), NaN for genes that the model does not know, and
    ``uns["scfm"][key_added]``. With genes, symbols of the model whether ``adata`` has them or not, a table of those in
    ``obsm[key_added]`` instead. on_bad_cell: cells without any known gene raise BadCellError or get a row of NaN.
    Warns of cells that are deeper than the target. Returns None, or the copy with ``copy=True``. Raises
    InvalidArgumentError, BadCellError, NotCountsError, GeneMappingError, ResourceError.
    """
    target = adata.copy() if copy else adata
    key = key_added or "scfoundation_imputed"
    if not isinstance(adata.uns.get("scfm", {}), Mapping):
        raise InvalidArgumentError(
            f"is a {type(adata.uns['scfm']).__name__}; expected a mapping to add provenance to",
            where="adata.uns['scfm']",
        )
    imputation = Imputation(model, target_depth, token_budget=token_budget, on_bad_cell=on_bad_cell)
    source = imputation.model.read_cells(adata, counts_layer=counts_layer, assume_counts=assume_counts)
    columns = (
        imputation.columns_of(read(adata, layer="X", assume_counts=True).genes, species)
        if genes is None
        else imputation.columns_named(genes)
    )
    require_memory(
        4 * len(source) * len(columns),
        purpose=f"a table of {len(source):,} cells x {len(columns):,} genes",
        name="AnnData",
        where="impute",
        hint="Give genes= for those of interest, or use scfm impute, which writes to disk.",
    )
    out = np.full((len(source), len(columns)), np.nan, dtype=np.float32)
    for cells, rows in imputation.rows(source, columns, species=species, progress=progress):
        out[cells] = rows
    if genes is None:
        target.layers[key] = out
    else:
        target.obsm[key] = pd.DataFrame(out, index=adata.obs_names, columns=list(genes))
    target.uns["scfm"] = {**target.uns.get("scfm", {}), key: imputation.facts("AnnData")}
    return target if copy else None


class Imputation:
    """One model at one target, cells streamed through it. Raises InvalidArgumentError."""

    def __init__(
        self,
        model: FoundationModel,
        target_depth: str | float,
        *,
        token_budget: int | None = None,
        on_bad_cell: str = "error",
    ) -> None:
        if not isinstance(model, Scfoundation):
            raise InvalidArgumentError(
                f"is a {model.family} model; only scFoundation predicts expression at another read depth",
                where="model",
            )
        if on_bad_cell not in ("error", "nan"):
            raise InvalidArgumentError(f'{on_bad_cell!r}; expected "error" or "nan"', where="on_bad_cell")
        if model.config.variant not in (_VARIANT, ""):
            warnings.warn(
                f"these are the weights of scFoundation's variant {model.config.variant!r}; its authors predict "
                f'expression with variant="{_VARIANT}"',
                ScfmWarning,
                stacklevel=3,
            )
        self.model = model.with_input(target=target_of(target_depth))
        self.token_budget = token_budget
        self.stop_at_bad_cell = on_bad_cell == "error"

    def columns_of(self, genes: pd.DataFrame, species: str | None) -> np.ndarray:
        """int64 (genes,): the model's position of each gene of a table (var), -1 where it has none."""
        return self.model.tokenizer.positions_of(genes, species=species)

    def columns_named(self, genes: Sequence[str]) -> np.ndarray:
        """int64 (genes,): the positions of these symbols of the model."""
        known = self.model.vocab.token
        missing = [gene for gene in genes if gene not in known]
        if isinstance(genes, str) or missing or not len(genes):
            raise InvalidArgumentError(
                f"{missing[:5] or genes!r} not among the model's {len(known):,} symbols", where="genes"
            )
        return np.array([known[gene] for gene in genes], dtype=np.int64)

    def rows(
        self,
        source: CellSource,
        columns: np.ndarray,
        *,
        species: str | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions of cells in the source, float32 (cells, columns)), in its order, without cells of no token."""
        known = columns >= 0
        tokenizer = self.model.tokenizer
        expected = num_tokens = 0
        for pack in tokenizer.packs(
            source, species=species, use_filter_pass=False, empty_bad_cells=not self.stop_at_bad_cell
        ):
            cells = pack.cell_ids.numpy()
            self._expect_all(source, expected, cells)
            for place, whole in enumerate(self.model.predictions(pack, token_budget=self.token_budget)):
                row = np.full((1, len(columns)), np.nan, dtype=np.float32)
                row[:, known] = whole[:, columns[known]]
                expected = int(cells[place]) + 1
                num_tokens += int(pack.lengths[place])
                yield cells[place : place + 1], row
                if progress is not None:
                    progress(expected, len(source), num_tokens)
        self._expect_all(source, expected, np.array([len(source)]))

    def _expect_all(self, source: CellSource, expected: int, cells: np.ndarray) -> None:
        """Raise for the first cell between those done and these that is missing, unless such cells are to be NaN."""
        wanted = np.arange(expected, int(cells[-1]) if len(cells) else expected)
        missing = np.setdiff1d(wanted, cells)
        if self.stop_at_bad_cell and missing.size:
            raise BadCellError(
                f"{missing.size} cells so far have no gene that the model knows: rows "
                f"{', '.join(source.row_labels(missing[:5]))}",
                path=source.name,
                hint='Pass on_bad_cell="nan" for rows of NaN.',
            )

    def facts(self, source: str) -> dict[str, Any]:
        """Provenance: the model, what was predicted and in which units."""
        tokenizer = self.model.tokenizer
        report = {} if tokenizer.report is None else {"report": tokenizer.report.to_dict()}
        facts = provenance(
            self.model,
            layer=0,
            pooling="",
            source=source,
            tokenization={**tokenizer.describe(), **report},
        )
        return {**facts, "task": "impute", "target_depth": tokenizer.options.target, "units": UNITS}


def target_of(target_depth: str | float) -> str:
    """The authors' spelling of a target: a number of counts n is "t" and log10(n). Raises InvalidArgumentError."""
    if isinstance(target_depth, str):
        return target_depth
    number = isinstance(target_depth, int | float | np.number) and not isinstance(target_depth, bool)
    if not number or not 1 < target_depth < math.inf:
        raise InvalidArgumentError(
            f"{target_depth!r}; expected a number of counts above 1, or text such as 't4', 'f5', 'a1'",
            where="target_depth",
        )
    return f"t{math.log10(target_depth)!r}"
