"""``scfm.tl.annotate``: cell types from a model's annotation head into ``adata.obs``, none where they are unlikely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.scbert.annotate import UNASSIGNED, predict_cell_types
from scfm.models.scbert.model import Scbert

if TYPE_CHECKING:
    from anndata import AnnData


def annotate(
    adata: AnnData,
    model: FoundationModel,
    *,
    key_added: str = "cell_type_scbert",
    unassigned_below: float | None = None,
    copy: bool = False,
) -> AnnData | None:
    """The likeliest cell type of every cell, by a fine-tuned scBERT's annotation head.

    Writes ``obs[key_added]`` (categorical), ``obs[key_added + "_probability"]`` (float32, of that type) and
    ``obsm[key_added + "_probabilities"]`` (a column a type). unassigned_below: cells whose likeliest type is less
    probable than this become "Unassigned"; the authors' predict.py takes 0.5 where new types are expected. Returns
    None, or the copy with ``copy=True``. Raises InvalidArgumentError for models without such a head, BadCellError for
    cells without any gene of the panel.
    """
    if not isinstance(model, Scbert):
        raise InvalidArgumentError(
            f"is a {type(model).__name__}; expected a fine-tuned scBERT", where="model"
        )
    found = predict_cell_types(model, adata, unassigned_below=unassigned_below)
    target = adata.copy() if copy else adata
    names = [*found.class_names, *([] if unassigned_below is None else [UNASSIGNED])]
    target.obs[key_added] = pd.Categorical(found.labels, categories=list(dict.fromkeys(names)))
    target.obs[f"{key_added}_probability"] = found.probabilities.max(axis=1)
    target.obsm[f"{key_added}_probabilities"] = pd.DataFrame(
        found.probabilities, index=adata.obs_names, columns=found.class_names
    )
    return target if copy else None
