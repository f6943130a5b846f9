"""``scfm.tl.embed``: cell embeddings into ``adata.obsm``, with provenance in ``adata.uns["scfm"]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from scfm.embed.provenance import provenance
from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.engine import BadCellPolicy, Progress

if TYPE_CHECKING:
    from anndata import AnnData


def embed(
    adata: AnnData,
    model: FoundationModel,
    *,
    key_added: str | None = None,
    layer: int | None = None,
    pooling: str | None = None,
    counts_layer: str | None = None,
    assume_counts: bool = False,
    species: str | None = None,
    token_budget: int | None = None,
    on_bad_cell: BadCellPolicy = "error",
    progress: Progress | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Embed every cell of ``adata``: raw counts in ``raw.X``, ``layers["counts"]`` or ``X``; for scGPT ``X`` as it is.

    Writes float32 ``obsm[key_added]`` (default "X_geneformer", "X_scgpt", by family), one row a cell, and
    ``uns["scfm"][key_added]``. ``on_bad_cell="nan"`` gives cells without any known gene a row of NaN; rows
    cannot be skipped here. Other arguments as in ``model.embed``. Returns None, or the copy with ``copy=True``.
    """
    if on_bad_cell == "skip":
        raise InvalidArgumentError(
            '"skip" would leave rows out of adata',
            where="on_bad_cell",
            hint='Use "nan", or filter adata first.',
        )
    target = adata.copy() if copy else adata
    key = key_added or f"X_{model.family}"
    layer = model.default_layer if layer is None else layer
    pooling = model.default_pooling if pooling is None else pooling
    if not isinstance(adata.uns.get("scfm", {}), Mapping):
        raise InvalidArgumentError(
            f"is a {type(adata.uns['scfm']).__name__}; expected a mapping to add provenance to",
            where="adata.uns['scfm']",
        )
    if model.load_report is not None:
        _ = model.load_report.weights_sha256  # read now: a file that changed must not cost the embedding
    embedding = model.embed(
        adata,
        layer=layer,
        pooling=pooling,
        token_budget=token_budget,
        on_bad_cell=on_bad_cell,
        progress=progress,
        counts_layer=counts_layer,
        assume_counts=assume_counts,
        species=species,
    )
    target.obsm[key] = embedding
    facts = provenance(
        model,
        layer=layer,
        pooling=pooling,
        source="AnnData",
        tokenization={**model.tokenizer.describe(), "report": model.tokenizer.report.to_dict()},
    )
    target.uns["scfm"] = {**target.uns.get("scfm", {}), key: facts}
    return target if copy else None
