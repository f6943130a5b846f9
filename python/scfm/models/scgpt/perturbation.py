"""The perturbation generator: what cells would express if genes were perturbed.

Every gene is a token whose value is the unperturbed cell's expression (log1p) and whose flag says whether it is
perturbed; the affine decoder scales and shifts the values. Genes that the vocabulary lacks enter as <pad>, with their
values, as in the original. Source: TransformerGenerator.pred_perturb and GEARS's names of conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.engine import default_token_budget
from scfm.models.scgpt.model import Scgpt

CONTROL = "ctrl"


def perturbation_flags(conditions: Sequence[str], genes: Sequence[str], *, control: str = CONTROL) -> Tensor:
    """int64 (C, G): 1 where a condition ("A+ctrl", "A+B", "ctrl") perturbs a gene.

    genes: names of the columns. Raises InvalidArgumentError naming a condition and its unknown gene.
    """
    column = {gene: number for number, gene in enumerate(genes)}
    flags = torch.zeros(len(conditions), len(genes), dtype=torch.int64)
    for row, condition in enumerate(conditions):
        for gene in condition.split("+"):
            if gene == control:
                continue
            if gene not in column:
                like = get_close_matches(gene, column, 1)
                raise InvalidArgumentError(
                    f"condition {condition!r} perturbs {gene!r}, which is none of the {len(column):,} genes",
                    where="conditions",
                    hint=f"Did you mean {like[0]!r}?" if like else "Conditions name genes as the columns do.",
                )
            flags[row, column[gene]] = 1
    return flags


@torch.inference_mode()
def predict_perturbation(
    model: Scgpt,
    expression: Any,
    flags: Any,
    gene_ids: Any,
    *,
    genes: Literal["all", "batch-wise"] = "all",
    sample: bool = False,
    seed: int = 0,
    token_budget: int | None = None,
) -> np.ndarray:
    """Expression after the perturbation, float32 (C, G), in the units of ``expression``.

    expression: (C, G) of the unperturbed cells; flags: (C, G), see ``perturbation_flags``; gene_ids: (G,) token ids,
    the pad's for genes that the vocabulary lacks. genes: "all" as tokens, or only those that some of the given cells
    express ("batch-wise"), the others staying 0. sample: of models with zero probabilities, draw from them, as the
    original always does, keyed by (seed, row). Raises InvalidArgumentError.
    """
    if model.pert_encoder is None:
        raise InvalidArgumentError("is not a perturbation generator (it has no pert_encoder)", where="model")
    values, marks, ids = _checked(expression, flags, gene_ids)
    if genes not in ("all", "batch-wise"):
        raise InvalidArgumentError(f'{genes!r}; expected "all" or "batch-wise"', where="genes")
    columns = np.arange(len(ids)) if genes == "all" else np.flatnonzero((values != 0).any(axis=0))
    out = np.zeros(values.shape, dtype=np.float32)
    if not len(columns):
        return out
    at_once = max((token_budget or default_token_budget(model.device)) // len(columns), 1)
    for start in range(0, len(values), at_once):
        rows = np.arange(start, min(start + at_once, len(values)))
        chosen = np.ix_(rows, columns)
        packed = PackedCells(
            torch.from_numpy(np.tile(ids[columns], len(rows))),
            torch.from_numpy(values[chosen].ravel()),
            torch.from_numpy(np.arange(len(rows) + 1, dtype=np.int32) * np.int32(len(columns))),
            torch.from_numpy(rows),
        )
        result = model.forward(packed, pert_flags=marks[chosen].ravel())
        predicted = result.sampled_expression(seed=seed) if sample else result.expression
        out[chosen] = predicted.cpu().numpy().reshape(len(rows), -1)
    return out


def _checked(expression: Any, flags: Any, gene_ids: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.ascontiguousarray(_array(expression), dtype=np.float32)
    marks, ids = _array(flags), _array(gene_ids)
    if values.ndim != 2 or marks.shape != values.shape or ids.shape != values.shape[1:]:
        raise InvalidArgumentError(
            f"expression {values.shape}, flags {marks.shape}, gene_ids {ids.shape}; expected (C, G), (C, G) and (G,)",
            where="predict_perturbation",
        )
    if marks.dtype.kind not in "iub" or ids.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"flags of {marks.dtype} and gene_ids of {ids.dtype}; expected whole numbers",
            where="predict_perturbation",
        )
    return values, marks.astype(np.int64), ids.astype(np.int32)


def _array(given: Any) -> np.ndarray:
    return given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
