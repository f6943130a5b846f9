"""What an embedding was made from, so that it can be made again: stored beside it wherever it goes."""

from __future__ import annotations

from typing import Any

import torch

import scfm
from scfm.models.base import FoundationModel


def provenance(
    model: FoundationModel, *, layer: int, pooling: str, source: str, tokenization: dict[str, Any]
) -> dict[str, Any]:
    """Plain numbers and strings (AnnData's ``uns`` takes no None): model, revision, settings, versions."""
    report = model.load_report
    dtype = str(model.compute_dtype).removeprefix("torch.")
    facts: dict[str, Any] = {
        "family": model.family,
        "model": model.source or "in memory",
        "weights_sha256": "" if report is None else report.weights_sha256 or "",
        "revision": "" if report is None else report.revision or "",
        "layer": layer,
        "pooling": pooling,
        "dtype": dtype,
        "device": str(model.device),
        "source": source,
        "tokenization": _without_none(tokenization),
        "scfm_version": scfm.__version__,
        "torch_version": str(torch.__version__),
    }
    return facts


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
