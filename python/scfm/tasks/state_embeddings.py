"""``scfm.tl.state_embeddings``: one vector for each cell state, the mean or median over its cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from scfm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from anndata import AnnData


def state_embeddings(
    adata: AnnData,
    state_key: str,
    *,
    basis: str = "X_geneformer",
    statistic: Literal["mean", "median"] = "mean",
) -> dict[str, np.ndarray]:
    """State name to float32 (hidden_size,), over the cells whose ``obs[state_key]`` has that value.

    basis: the ``obsm`` key of the embedding. Cells without a state, or with a NaN embedding, count nowhere.
    Median is dimension by dimension, the lower of the two middle values for an even number, as torch and the
    authors' exact_median take it. Source: EmbExtractor.get_state_embs (exact_mean, exact_median).
    """
    if state_key not in adata.obs:
        raise InvalidArgumentError(f"no column {state_key!r} in adata.obs", where="state_key")
    if basis not in adata.obsm:
        raise InvalidArgumentError(
            f"no {basis!r} in adata.obsm", where="basis", hint="Run scfm.tl.embed(adata, model) first."
        )
    if statistic not in ("mean", "median"):
        raise InvalidArgumentError(f'{statistic!r}; expected "mean" or "median"', where="statistic")
    embedding = np.asarray(adata.obsm[basis], dtype=np.float32)
    good = ~np.isnan(embedding).any(axis=1)
    states = adata.obs[state_key]
    out: dict[str, np.ndarray] = {}
    for state in states.dropna().unique():
        cells = embedding[good & (states == state).to_numpy()]
        if not len(cells):
            continue
        if statistic == "mean":
            out[str(state)] = cells.mean(axis=0, dtype=np.float64).astype(np.float32)
        else:
            out[str(state)] = np.sort(cells, axis=0)[(len(cells) - 1) // 2]
    return out
