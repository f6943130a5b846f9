"""``scfm.tl.attention``: which genes scBERT attends to, for all cells or for each group of them, into ``adata.uns``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.engine import packed_batches
from scfm.models.scbert.attention_sums import attention_sums
from scfm.models.scbert.model import Scbert

if TYPE_CHECKING:
    from anndata import AnnData

_TOKENS_AT_ONCE = 8192
_ALL = "all"


def attention(
    adata: AnnData,
    model: FoundationModel,
    *,
    groupby: str | None = None,
    key_added: str = "attention_scbert",
    counts_layer: str | None = None,
    assume_counts: bool = False,
    species: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Each panel gene's share of attention, averaged over cells: a table of genes by groups in ``uns[key_added]``.

    Over layers, heads and query positions as the authors' attn_sum_save.py averages it, in time linear in the panel. A
    cell's shares add up to 1, the slot's among them, which is left out of the table. groupby: a column of obs; cells
    without a group count nowhere; None for one column "all". Cells without any gene of the panel count nowhere. Other
    arguments as in ``scfm.tl.embed``. Returns None, or the copy with ``copy=True``. Raises InvalidArgumentError for
    models that are no scBERT.
    """
    if not isinstance(model, Scbert):
        raise InvalidArgumentError(f"is a {type(model).__name__}; expected a scBERT", where="model")
    if groupby is not None and groupby not in adata.obs:
        raise InvalidArgumentError(f"no column {groupby!r} in adata.obs", where="groupby")
    groups = np.full(adata.n_obs, _ALL, dtype=object)
    if groupby is not None:
        column = adata.obs[groupby]
        groups = column.astype(str).to_numpy(dtype=object)
        groups[column.isna().to_numpy()] = None
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    source = model.read_cells(adata, counts_layer=counts_layer, assume_counts=assume_counts)
    for pack in model.tokenizer.packs(source, species=species, use_filter_pass=False):
        known = pack.select(
            [place for place, row in enumerate(pack.cell_ids.tolist()) if groups[row] is not None]
        )
        for batch in packed_batches(known, _TOKENS_AT_ONCE):
            shares = attention_sums(model, batch).double().cpu().numpy()
            for row, share in zip(batch.cell_ids.tolist(), shares, strict=True):
                group = str(groups[row])
                sums[group] = sums.get(group, 0.0) + share
                counts[group] = counts.get(group, 0) + 1
    if not sums:
        raise InvalidArgumentError("there is no cell with a group and a gene of the panel", where="adata")
    genes = [model.token_names()[position] for position in range(model.config.num_genes)]
    table = {group: sums[group][:-1] / counts[group] for group in sorted(sums)}
    target = adata.copy() if copy else adata
    target.uns[key_added] = pd.DataFrame(table, index=pd.Index(genes, name="gene"))
    return target if copy else None
