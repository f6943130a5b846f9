"""Binning of values that are already in hand: packed cells, or a whole matrix as the authors' preprocessing does it.

The rules are the tokenizer's. A matrix is binned row by row over the columns it has, so a choice of variable genes
comes before; scanpy normalises, logs and chooses them. Source: the released scGPT Preprocessor and binning function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from scfm import _native
from scfm.data.packed import PackedCells
from scfm.errors import BadCellError, InvalidArgumentError
from scfm.tokenize.scgpt import Binning, bin_quantiles
from scfm.tokenize.scgpt_upstream import upstream_draws

__all__ = ["BinnedMatrix", "bin_matrix", "bin_packed"]

_RULES = {"seeded": "seeded", "pretrain": "left", "upstream": "given"}


@dataclass(frozen=True)
class BinnedMatrix:
    """bins: int64 CSR (cells, genes), 0 where the matrix is 0; edges: float64 (cells, num_bins), the authors'
    obsm["bin_edges"]: 0 and the quantiles of the row, or zeros for a row without values.
    """

    bins: sp.csr_matrix
    edges: np.ndarray


def bin_packed(
    packed: PackedCells,
    *,
    num_bins: int = 51,
    binning: Binning = "seeded",
    seed: int = 0,
    epoch: int = 0,
    num_spared: int = 1,
) -> PackedCells:
    """Packed values as bins; the first ``num_spared`` of each cell (<cls>) stay as they are, and so do zeros.

    Raises InvalidArgumentError for a pack without values, BadCellError for values below 0 or not finite.
    """
    if packed.values is None:
        raise InvalidArgumentError("has no values to bin", where="packed")
    starts = packed.cu_seqlens[:-1].to(torch.int64)
    places = torch.arange(packed.num_tokens) - torch.repeat_interleave(starts, packed.lengths)
    spared = places < num_spared
    bins = _bins(
        packed.values.masked_fill(spared, 0.0).numpy(),
        packed.cu_seqlens.numpy().astype(np.int64),
        packed.token_ids.numpy(),
        num_bins,
        binning,
        seed,
        epoch,
    )
    values = torch.where(spared, packed.values, torch.from_numpy(bins).to(torch.float32))
    return replace(packed, values=values)


def bin_matrix(
    matrix: Any, *, num_bins: int = 51, binning: Binning = "seeded", seed: int = 0, epoch: int = 0
) -> BinnedMatrix:
    """Each row's non-zero values as bins 1 to num_bins - 1. matrix: dense or sparse (cells, genes), from 0.

    Raises InvalidArgumentError for other arguments, BadCellError for values below 0 or not finite.
    """
    csr = sp.csr_matrix(matrix)
    if csr.dtype not in (np.float32, np.float64):
        csr = csr.astype(np.float64)
    csr.sum_duplicates()
    indptr = csr.indptr.astype(np.int64)
    columns = np.ascontiguousarray(csr.indices, dtype=np.int32)
    bins = _bins(csr.data, indptr, columns, num_bins, binning, seed, epoch)
    edges = np.zeros((csr.shape[0], num_bins))
    edges[:, 1:] = _native.value_edges(csr.data, indptr, bin_quantiles(num_bins))[0]
    return BinnedMatrix(
        sp.csr_matrix((bins.astype(np.int64), csr.indices, csr.indptr), shape=csr.shape), edges
    )


def _bins(
    values: np.ndarray,
    offsets: np.ndarray,
    token_ids: np.ndarray,
    num_bins: int,
    binning: Binning,
    seed: int,
    epoch: int,
) -> np.ndarray:
    if binning not in _RULES:
        raise InvalidArgumentError(f"{binning!r}; expected one of {tuple(_RULES)}", where="binning")
    if num_bins < 2:
        raise InvalidArgumentError(f"{num_bins}; expected at least 2", where="num_bins")
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
        row = int(np.searchsorted(offsets, bad[0], side="right")) - 1
        raise BadCellError(
            f"token or column {token_ids[bad[0]]} has value {values[bad[0]]:g}; expected finite numbers from 0",
            where=f"row {row}",
        )
    draws = upstream_draws(values, offsets)["draws"] if binning == "upstream" else None
    return _native.bin_values(
        values, offsets, token_ids, bin_quantiles(num_bins), _RULES[binning], draws, seed, epoch
    )
