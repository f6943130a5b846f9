"""scBERT's objectives: hidden bins in pretraining, cell types in fine-tuning, and which weights the latter trains.

Of a cell's genes with a bin above 0, 15 % (rounded up, and never more than 15 % of all positions) must be predicted;
nine tenths of these are hidden, the others seen as they are. Zeros are never asked for. Draws are keyed by (seed,
epoch, cell), so a cell hides the same genes in any batch. The loss is a mean cross-entropy, over hidden genes or over
cells. Source: pretrain.py (data_mask) and finetune.py of the released scBERT code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfm import _native
from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.nn.performer import KmaxScope
from scfm.models.scbert.model import Scbert

__all__ = [
    "HiddenBins",
    "annotation_loss",
    "annotation_losses",
    "balanced_class_weights",
    "class_numbers",
    "freeze",
    "hidden_bin_accuracy",
    "hidden_bin_loss",
    "hide_bins",
]

MASK_RATIO, REPLACED = 0.15, 0.9
# Keeps these draws apart from others of the same seed: "bins" and "seen".
_CHOOSE, _REPLACE = 0x62696E73, 0x7365656E

Trained = Literal["authors", "head", "last", "all"]


@dataclass(frozen=True)
class HiddenBins:
    """packed: the cells as the model sees them; rows: int64 (M,), which of the C * P positions are asked for; targets:
    int64 (M,), their bins.
    """

    packed: PackedCells
    rows: Tensor
    targets: Tensor


def hide_bins(
    packed: PackedCells,
    model: Scbert,
    *,
    seed: int,
    epoch: int = 0,
    mask_ratio: float = MASK_RATIO,
    replaced: float = REPLACED,
) -> HiddenBins:
    """Hide bins of each cell as the authors do, by draws of (seed, epoch, cell id). Raises InvalidArgumentError."""
    for name, share in (("mask_ratio", mask_ratio), ("replaced", replaced)):
        if not 0.0 <= share <= 1.0:
            raise InvalidArgumentError(f"{share}; expected 0 to 1", where=name)
    if packed.values is None:
        raise InvalidArgumentError("has no bins to hide", where="packed")
    config = model.config
    values, lengths = packed.values, packed.lengths.to(torch.int64)
    cell_of_token = torch.repeat_interleave(torch.arange(packed.num_cells), lengths)
    eligible = ((values > 0) & (values < config.mask_bin)).nonzero().flatten()
    counts = torch.bincount(cell_of_token[eligible], minlength=packed.num_cells)
    most = math.ceil(mask_ratio * config.num_positions)
    wanted = torch.ceil(counts.double() * mask_ratio).to(torch.int64).clamp(max=most)
    offsets = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32).numpy()
    cells = packed.cell_ids.numpy()
    chosen = _native.choose_tokens(offsets, cells, wanted.to(torch.int32).numpy(), 0, seed, epoch, _CHOOSE)
    asked = eligible[torch.from_numpy(chosen.view(np.bool_))]
    _, drawn = _native.mlm_mask(
        packed.token_ids.numpy(), packed.cu_seqlens.numpy(), cells, seed ^ _REPLACE, epoch, replaced, 0, 1, []
    )
    unseen = torch.zeros(packed.num_tokens, dtype=torch.bool)
    unseen[torch.from_numpy(drawn)] = True
    hidden = asked[unseen[asked]]
    masked = values.clone()
    masked[hidden] = config.mask_bin
    return HiddenBins(
        packed=replace(packed, values=masked),
        rows=cell_of_token[asked] * config.num_positions + packed.token_ids[asked].to(torch.int64),
        targets=values[asked].to(torch.int64),
    )


def hidden_bin_loss(model: Scbert, cells: HiddenBins, *, kmax_scope: KmaxScope = "cell") -> Tensor:
    """Mean cross-entropy in nats over the bins that are asked for."""
    return F.cross_entropy(_scores(model, cells, kmax_scope), cells.targets.to(model.device))


@torch.no_grad()
def hidden_bin_accuracy(model: Scbert, cells: HiddenBins, *, kmax_scope: KmaxScope = "cell") -> float:
    """Share of the bins asked for that the highest score among bins 1 and above names, as the authors count it."""
    guesses = _scores(model, cells, kmax_scope)[:, 1 : model.config.mask_bin].argmax(dim=1) + 1
    return float((guesses == cells.targets.to(model.device)).double().mean())


def _scores(model: Scbert, cells: HiddenBins, kmax_scope: KmaxScope) -> Tensor:
    hidden = model.forward(cells.packed, kmax_scope=kmax_scope).hidden
    return model.bin_scores(hidden[cells.rows.to(hidden.device)])


def class_numbers(model: Scbert, labels: Sequence[str]) -> Tensor:
    """int64 (C,): each label's place among the model's classes. Raises InvalidArgumentError naming those it lacks."""
    place = {name: number for number, name in enumerate(model.class_names)}
    unknown = sorted({str(label) for label in labels} - set(place))
    if unknown:
        raise InvalidArgumentError(
            f"{len(unknown):,} cell types are none of the model's {len(place):,} classes: {unknown[:5]}",
            where="labels",
            hint="Set model.class_names if the classes have no names yet, or add a head: model.add_annotation_head.",
        )
    return torch.tensor([place[str(label)] for label in labels], dtype=torch.int64)


def annotation_loss(
    model: Scbert,
    packed: PackedCells,
    classes: Tensor,
    *,
    class_weights: Tensor | None = None,
    focal_gamma: float = 0.0,
    kmax_scope: KmaxScope = "cell",
) -> Tensor:
    """Mean loss of the cells' classes, int64 (C,); with weights the weighted mean, as torch's cross-entropy has it."""
    scores = model.forward(packed, kmax_scope=kmax_scope).cls
    classes = classes.to(scores.device)
    losses = annotation_losses(scores, classes, focal_gamma=focal_gamma)
    if class_weights is None:
        return losses.mean()
    weights = class_weights.to(scores.device, scores.dtype)[classes]
    return (weights * losses).sum() / weights.sum()


def annotation_losses(scores: Tensor, classes: Tensor, *, focal_gamma: float = 0.0) -> Tensor:
    """Cross-entropy of each cell in nats, (C,); times (1 - p)^gamma with the focal loss, p of its class.

    scores: (C, num_classes); classes: int64 (C,). Raises InvalidArgumentError for classes that there are not.
    """
    num_classes = scores.shape[1]
    if classes.shape != scores.shape[:1] or bool(((classes < 0) | (classes >= num_classes)).any()):
        raise InvalidArgumentError(
            f"{classes.numel():,} numbers such as {classes.tolist()[:5]}; expected {len(scores):,} from 0 to "
            f"{num_classes - 1}",
            where="classes",
            hint="Does the head have another number of classes than the labels?",
        )
    losses = F.cross_entropy(scores, classes, reduction="none")
    return losses * (1.0 - torch.exp(-losses)).pow(focal_gamma) if focal_gamma else losses


def balanced_class_weights(classes: Tensor, num_classes: int) -> Tensor:
    """float32 (num_classes,): cells / (num_classes * cells of the class); 0 for a class without cells."""
    counts = torch.bincount(classes, minlength=num_classes).float()
    return torch.where(counts > 0, len(classes) / (num_classes * counts.clamp(min=1)), 0.0)


def freeze(model: Scbert, trained: Trained = "authors", *, num_blocks: int = 1) -> list[str]:
    """Choose what is trained; returns the names. The last norm and the heads always are; gene2vec never is.

    "authors": the block before the last one as well, as finetune.py does it (the last stays as it is); "last": the last
    ``num_blocks`` blocks; "head": no block, so that the states before the norm can be computed once; "all": everything.
    """
    blocks = model.performer.blocks()
    if trained not in ("authors", "head", "last", "all"):
        raise InvalidArgumentError(
            f'{trained!r}; expected "authors", "head", "last" or "all"', where="trained"
        )
    if trained == "last" and not 1 <= num_blocks <= len(blocks):
        raise InvalidArgumentError(f"{num_blocks}; expected 1 to {len(blocks)}", where="num_blocks")
    if trained == "authors" and len(blocks) < 2:
        raise InvalidArgumentError("there is no block before the last one", where="trained")
    open_blocks = {"authors": blocks[-2:-1], "head": [], "last": blocks[-num_blocks:], "all": blocks}[trained]
    heads = [head for head in (model.norm, model.to_out, model.annotation_head) if head is not None]
    for parameter in model.parameters():
        parameter.requires_grad_(trained == "all")
    for module in (*heads, *open_blocks):
        module.requires_grad_(True)
    if model.pos_emb is not None:
        model.pos_emb.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
