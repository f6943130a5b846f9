"""Cell types from scBERT's annotation head, as predict.py gives them: the likeliest class, or none where unlikely."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from scfm.data.packed import PackedCells
from scfm.errors import BadCellError, InvalidArgumentError
from scfm.models.engine import packed_batches
from scfm.models.scbert.model import Scbert

UNASSIGNED = "Unassigned"
AUTHORS_THRESHOLD = 0.5
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class CellTypes:
    """labels: str (C,); probabilities: float32 (C, num_classes), in the order of class_names."""

    labels: np.ndarray
    probabilities: np.ndarray
    class_names: list[str]


@torch.inference_mode()
def predict_cell_types(model: Scbert, data: Any, *, unassigned_below: float | None = None) -> CellTypes:
    """The class of every cell of ``data`` (whatever scfm.read accepts, or PackedCells), in its order.

    unassigned_below: cells whose likeliest class is less probable than this are "Unassigned" (the authors' novel_type,
    0.5); None never. Raises InvalidArgumentError without an annotation head, BadCellError for cells without any gene of
    the panel.
    """
    if model.annotation_head is None:
        raise InvalidArgumentError("this model has no annotation head", where="model")
    if unassigned_below is not None and not 0.0 <= unassigned_below <= 1.0:
        raise InvalidArgumentError(f"{unassigned_below}; expected 0 to 1", where="unassigned_below")
    if isinstance(data, PackedCells):
        num_cells, name = data.num_cells, "PackedCells"
        order = torch.arange(num_cells, dtype=torch.int64)
        stream = iter([PackedCells(data.token_ids, data.values, data.cu_seqlens, order)])
    else:
        source = model.read_cells(data)
        num_cells, name = len(source), source.name
        stream = model.tokenizer.packs(source, use_filter_pass=False)
    probabilities = np.full((num_cells, model.config.num_classes), np.nan, dtype=np.float32)
    for batch in chain.from_iterable(packed_batches(pack, _TOKENS_AT_ONCE) for pack in stream):
        scores = model.forward(batch).cls
        probabilities[batch.cell_ids.numpy()] = scores.softmax(dim=1).cpu().numpy()
    lost = np.flatnonzero(np.isnan(probabilities).any(axis=1))
    if lost.size:
        raise BadCellError(
            f"{lost.size:,} cells have no gene of the panel: rows {', '.join(map(str, lost[:5]))}", path=name
        )
    names = model.class_names
    labels = np.array(names, dtype=object)[probabilities.argmax(axis=1)]
    if unassigned_below is not None:
        labels[probabilities.max(axis=1) < unassigned_below] = UNASSIGNED
    return CellTypes(labels.astype(str), probabilities, names)
