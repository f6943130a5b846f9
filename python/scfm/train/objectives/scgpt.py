"""scGPT's objectives: hidden expression, expression from the cell alone, and what a cell's embedding should be.

Fine-tuning adds up, each with its weight (0 leaves a part out, and its head uncomputed):

    expression     squared error of hidden tokens (the authors' GEP, or MLM)
    expressed      whether they are expressed at all, where the model has explicit zeros
    mvc            both once more from the cell's embedding alone (GEPC), the second as mvc_expressed
    ecs, cce       elastic cell similarity; contrast between two draws of dropout
    dab            which batch a cell is from; its gradient into the encoder is reversed by the model
    cls            the cell's class
    neighbors      expression from the cells around it (scGPT-spatial)

Generative pretraining gives a cell's first tokens and asks for the others, once from the tokens and once more with the
cell's embedding, cut from its history, in place of <cls>.

Both take a model, a pack and targets for the pack's tokens, and give the total with its parts. What a cell contributes
does not depend on padding, because there is none; that a mean over the batch depends on the batch is the objective's
nature. Source: the authors' fine-tuning scripts, trainer.py, and pretrain.py of the dev-temp branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.scgpt.model import Scgpt
from scfm.models.scgpt.output import ScgptOutput
from scfm.models.scgpt.spatial import impute_from_neighbors
from scfm.tokenize.scgpt_generative import split_for_generation
from scfm.tokenize.scgpt_masking import hide_share
from scfm.train.objectives.losses import (
    cell_similarity_loss,
    contrastive_cell_loss,
    expressed_loss,
    masked_mse,
)

__all__ = [
    "SECOND_PASS_AFTER",
    "ExpressionTargets",
    "FineTuningObjective",
    "GenerativeObjective",
    "GenerativeTargets",
    "ObjectiveLoss",
    "hide_expression",
    "split_expression",
]

SECOND_PASS_AFTER = 1000  # optimiser steps of pretraining before the authors add the second pass


@dataclass(frozen=True)
class ObjectiveLoss:
    """total: what to differentiate; parts: by name, without their weights."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class ExpressionTargets:
    """What a pack's tokens should be predicted as.

    values: float32 (T,), in the units of the pack's values (bins as numbers); scored: bool (T,), the tokens that count,
    which are the hidden ones in pretraining and integration and all of them for the perturbation generator.
    batch_labels, classes: int64 (C,), where the model or the objective asks for them; coordinates: (C, 2) on the slide.
    """

    values: Tensor
    scored: Tensor
    batch_labels: Tensor | None = None
    classes: Tensor | None = None
    coordinates: Tensor | None = None


@dataclass(frozen=True)
class FineTuningObjective:
    """Weights of the parts; see the head of this file. Called with a model, a pack whose hidden values are already
    masked, and its targets, it gives an ObjectiveLoss; other arguments go to the model's forward. num_neighbors: the
    cells around each that "neighbors" reads.

    expressed and mvc_expressed count only for models with explicit zeros.
    """

    expression: float = 1.0
    expressed: float = 1.0
    mvc: float = 0.0
    mvc_expressed: float = 1.0
    ecs: float = 0.0
    cce: float = 0.0
    dab: float = 0.0
    cls: float = 0.0
    neighbors: float = 0.0
    num_neighbors: int = 5

    @classmethod
    def integration(cls, *, dab_weight: float = 1.0) -> FineTuningObjective:
        """The authors' for batch integration: GEP + GEPC, with explicit zeros, + 10 ECS + dab_weight DAB."""
        return cls(mvc=1.0, ecs=10.0, dab=dab_weight)

    @classmethod
    def annotation(cls) -> FineTuningObjective:
        """The authors' for cell types: the class alone, nothing hidden."""
        return cls(expression=0.0, cls=1.0)

    @classmethod
    def perturbation(cls) -> FineTuningObjective:
        """The authors' for the perturbation generator: squared error of every gene."""
        return cls()

    def __call__(
        self, model: Scgpt, packed: PackedCells, targets: ExpressionTargets, **inputs: Any
    ) -> ObjectiveLoss:
        """Raises InvalidArgumentError for targets that do not fit the pack or that a part lacks."""
        targets = _on_device(targets, packed, model.device)
        if model.config.num_batch_labels:
            inputs["batch_labels"] = targets.batch_labels
        out = model.forward(packed, **inputs)
        values, scored = targets.values, targets.scored
        explicit_zeros = model.config.explicit_zeros
        losses: dict[str, Callable[[], Tensor]] = {
            "expression": lambda: masked_mse(out.expression, values, scored),
            "expressed": lambda: expressed_loss(out.zero_probabilities, values, scored),
            "mvc": lambda: masked_mse(out.mvc, values, scored),
            "mvc_expressed": lambda: expressed_loss(out.mvc_zero_probabilities, values, scored),
            "ecs": lambda: cell_similarity_loss(out.cell_embeddings, model.config.ecs_threshold),
            "cce": lambda: contrastive_cell_loss(
                out.cell_embeddings, model.forward(packed, **inputs).cell_embeddings
            ),
            "dab": lambda: F.cross_entropy(out.batch_logits, _required(targets.batch_labels, "batch_labels")),
            "cls": lambda: F.cross_entropy(out.cls, _classes(targets, out)),
            "neighbors": lambda: masked_mse(
                self._from_neighbors(model, packed, out, targets), values, scored
            ),
        }
        parts = {
            name: loss() for name, loss in losses.items() if self._counts(name, explicit_zeros=explicit_zeros)
        }
        if not parts:
            raise InvalidArgumentError("every part has weight 0", where="FineTuningObjective")
        return ObjectiveLoss(_weighted(parts, self), parts)

    def _counts(self, name: str, *, explicit_zeros: bool) -> bool:
        """A zero likelihood stands beside its squared error and only where the model has it."""
        if name == "expressed":
            return explicit_zeros and bool(self.expression and self.expressed)
        if name == "mvc_expressed":
            return explicit_zeros and bool(self.mvc and self.mvc_expressed)
        return bool(getattr(self, name))

    def _from_neighbors(
        self, model: Scgpt, packed: PackedCells, out: ScgptOutput, targets: ExpressionTargets
    ) -> Tensor:
        places = _required(targets.coordinates, "coordinates")
        return impute_from_neighbors(
            model, packed, out.cell_embeddings, places, num_neighbors=self.num_neighbors
        )


@dataclass(frozen=True)
class GenerativeTargets:
    """values: float32 (T,), bins as numbers; num_known: whole numbers (C,), how many tokens of each cell are given."""

    values: Tensor
    num_known: Tensor


@dataclass(frozen=True)
class GenerativeObjective:
    """Squared errors of the tokens that are not given: from the tokens ("expression"), from the cell's embedding
    ("mvc"), and from the tokens again with the cell's embedding as <cls> ("second_pass"). No weights.

    mvc, second_pass: whether they are part of it.
    """

    mvc: bool = True
    second_pass: bool = True

    @classmethod
    def at_step(cls, step: int) -> GenerativeObjective:
        """The authors' at an optimiser step: the second pass joins after SECOND_PASS_AFTER of them."""
        return cls(second_pass=step > SECOND_PASS_AFTER)

    def __call__(
        self, model: Scgpt, packed: PackedCells, targets: GenerativeTargets, **inputs: Any
    ) -> ObjectiveLoss:
        """packed: each cell's known tokens first; the values of the others are not read."""
        inputs["num_known"] = targets.num_known
        out = model.forward(packed, **inputs)
        unknown = _unknown(packed, targets.num_known).to(model.device)
        values = targets.values.to(model.device)
        _expect_tokens("values", values, packed)
        parts = {"expression": masked_mse(out.expression, values, unknown)}
        if self.mvc:
            parts["mvc"] = masked_mse(out.mvc, values, unknown)
        if self.second_pass:
            again = model.forward(packed, first_states=out.cell_embeddings.detach(), **inputs)
            parts["second_pass"] = masked_mse(again.expression, values, unknown)
        return ObjectiveLoss(torch.stack([*parts.values()]).sum(), parts)


def hide_expression(
    model: Scgpt, packed: PackedCells, *, mask_ratio: float = 0.4, seed: int, epoch: int, **targets: Any
) -> tuple[PackedCells, ExpressionTargets]:
    """Cells with ``mask_ratio`` of their values hidden by the model's mask value, and these values as targets.

    Which ones depends on (seed, epoch, cell). targets: the other fields of ExpressionTargets. Raises
    InvalidArgumentError. Source: 0.4 in the authors' integration, 0.15 by default elsewhere.
    """
    shown = hide_share(packed, mask_ratio, seed=seed, epoch=epoch, mask_value=model.config.mask_value)
    assert packed.values is not None
    return shown.packed, ExpressionTargets(packed.values, shown.hidden, **targets)


def split_expression(
    packed: PackedCells,
    *,
    mask_ratio: float | Sequence[float] = (0.25, 0.5, 0.75),
    seed: int,
    epoch: int,
) -> tuple[PackedCells, GenerativeTargets]:
    """Cells with some genes known and the others to be generated, as GenerativeObjective takes them.

    Which ones, and where several shares are given which share, depends on (seed, epoch, cell); the authors draw one
    share a batch. Raises InvalidArgumentError.
    """
    split = split_for_generation(packed, mask_ratio, seed=seed, epoch=epoch)
    assert split.packed.values is not None
    return split.packed, GenerativeTargets(split.packed.values, split.num_known)


def _weighted(parts: dict[str, Tensor], objective: FineTuningObjective) -> Tensor:
    return torch.stack([getattr(objective, name) * loss for name, loss in parts.items()]).sum()


def _on_device(targets: ExpressionTargets, packed: PackedCells, device: torch.device) -> ExpressionTargets:
    _expect_tokens("values", targets.values, packed)
    _expect_tokens("scored", targets.scored, packed)
    if targets.scored.dtype != torch.bool:
        raise InvalidArgumentError(f"{targets.scored.dtype}; expected bool", where="targets.scored")
    return ExpressionTargets(
        targets.values.to(device),
        targets.scored.to(device),
        None if targets.batch_labels is None else targets.batch_labels.to(device),
        None if targets.classes is None else targets.classes.to(device),
        targets.coordinates,
    )


def _expect_tokens(name: str, given: Tensor, packed: PackedCells) -> None:
    if given.shape != (packed.num_tokens,):
        raise InvalidArgumentError(
            f"{tuple(given.shape)}; the pack has {packed.num_tokens} tokens", where=f"targets.{name}"
        )


def _required(given: Tensor | None, name: str) -> Tensor:
    if given is None:
        raise InvalidArgumentError("is needed by a part of this objective", where=f"targets.{name}")
    return given


def _classes(targets: ExpressionTargets, out: ScgptOutput) -> Tensor:
    classes = _required(targets.classes, "classes")
    num_classes = out.cls.shape[1]
    if len(classes) != len(out.cls):
        raise InvalidArgumentError(f"{len(classes)} for {len(out.cls)} cells", where="targets.classes")
    wrong = ((classes < 0) | (classes >= num_classes)).nonzero().flatten()
    if len(wrong):
        raise InvalidArgumentError(
            f"{int(classes[wrong[0]])} in cell {int(wrong[0])} of the pack; the model has {num_classes} classes",
            where="targets.classes",
        )
    return classes


def _unknown(packed: PackedCells, num_known: Tensor) -> Tensor:
    """bool (T,): the tokens behind the first ``num_known`` of their cell."""
    lengths = packed.lengths.to(torch.int64)
    first_unknown = packed.cu_seqlens[:-1].to(torch.int64) + num_known.to(lengths.device)
    ends = torch.repeat_interleave(first_unknown, lengths)
    return torch.arange(packed.num_tokens, device=lengths.device) >= ends
