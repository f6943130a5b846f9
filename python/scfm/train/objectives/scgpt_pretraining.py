"""scGPT's pretraining, as sums that any number of ranks can add up. There are two kinds.

"generative", the authors' for the released models: of each cell some genes are given and the others' bins asked for.

    expression     squared errors of the unknown genes, from the tokens
    mvc            the same from the cell's embedding
    second_pass    from the tokens with the cell's embedding, cut from its history, as <cls>; after 1,000 steps

"masked": some values of each cell are hidden; the parts are those of the fine-tuning objective, over the hidden genes
(expression, expressed, mvc, mvc_expressed), pairs of cells (ecs) and cells (cce, dab). The contrast's two views are two
draws of dropout, as the authors have it, or two samples of the cell's genes (cell_views.py).

Pairs of cells and contrasts are those of a microbatch, so for ecs and cce a step depends on how cells were packed, as
the original's does on its batch. Heads compute the rows that are scored and no others. Source: pretrain.py of the
dev-temp branch; finetune_integration.py; trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.data.packed import PackedCells, concatenate
from scfm.errors import ConfigError, InvalidArgumentError
from scfm.models.scgpt.decoders import Expression
from scfm.models.scgpt.model import Scgpt
from scfm.models.scgpt.output import ScgptOutput
from scfm.tokenize.scgpt_masking import hide_share
from scfm.train.objectives.cell_views import GeneSamples, cut, thinned, two_views, view_lengths
from scfm.train.objectives.losses import (
    cell_similarity_losses,
    contrastive_cell_losses,
    expressed_losses,
    squared_errors,
)
from scfm.train.objectives.prepared import Prepared
from scfm.train.objectives.scgpt import split_expression
from scfm.train.objectives.settings import ScgptSettings

__all__ = ["HiddenExpression", "ScgptGenerative", "ScgptMasked", "UnknownExpression"]

_SECOND_VIEW = 0x7365636F  # "seco": what the second view hides is drawn apart from the first's


@dataclass(frozen=True)
class UnknownExpression(Prepared):
    """num_known: int32 (C,); rows: int64 (M,), the unknown tokens of the pack; targets: float32 (M,), their bins."""

    num_known: Tensor
    rows: Tensor
    targets: Tensor

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model's forward takes beside the pack."""
        return {"num_known": self.num_known}


class ScgptGenerative:
    """Generative pretraining; see the head of this file and PretrainingObjective."""

    family = "scgpt"

    def __init__(self, model: Scgpt, settings: ScgptSettings, *, seed: int) -> None:
        self.model = model
        self.settings = settings
        self.seed = seed
        if not model.config.has_flags:
            raise ConfigError(
                "the model has no table of flags, so it cannot generate", where="model.has_flags"
            )
        if model.config.explicit_zeros:
            raise ConfigError(
                "generation has no part that would train the decoder of zeros", where="model.explicit_zeros"
            )
        _expect_heads(model, settings)
        self.weights = self.at_step(0)

    def at_step(self, step: int) -> dict[str, float]:
        late = step > self.settings.second_pass_after
        names = ("expression", "mvc", "second_pass") if late else ("expression", "mvc")
        self.weights = {name: getattr(self.settings, name) for name in names if getattr(self.settings, name)}
        return self.weights

    def lengths_of(self, packed: PackedCells) -> Tensor:
        return packed.lengths.to(torch.int64)

    def prepare(self, packed: PackedCells, *, epoch: int) -> UnknownExpression:
        cells, targets = split_expression(
            packed, mask_ratio=self.settings.known_ratios(), seed=self.seed, epoch=epoch
        )
        lengths = cells.lengths.to(torch.int64)
        first_unknown = cells.cu_seqlens[:-1].to(torch.int64) + targets.num_known
        unknown = torch.arange(cells.num_tokens) >= torch.repeat_interleave(first_unknown, lengths)
        rows = unknown.nonzero().flatten()
        counts = dict.fromkeys(("expression", "mvc", "second_pass"), len(rows))
        return UnknownExpression(
            cells, counts, cells.num_tokens, targets.num_known, rows, targets.values[rows]
        )

    def losses(self, prepared: Prepared) -> dict[str, Tensor]:
        assert isinstance(prepared, UnknownExpression)
        device = self.model.device
        rows, targets = prepared.rows.to(device), prepared.targets.to(device)
        out = self.model(prepared.packed, **prepared.inputs)
        found = {}
        if "expression" in self.weights:
            found["expression"] = squared_errors(out.expression_at(rows).prediction, targets).sum()
        if "mvc" in self.weights:
            found["mvc"] = squared_errors(out.mvc_at(rows).prediction, targets).sum()
        if "second_pass" in self.weights:
            first_states = out.cell_embeddings.detach()
            again = self.model(prepared.packed, first_states=first_states, **prepared.inputs)
            found["second_pass"] = squared_errors(again.expression_at(rows).prediction, targets).sum()
        return found


@dataclass(frozen=True)
class HiddenExpression(Prepared):
    """rows: int64 (M,), the hidden tokens of the pack; targets: float32 (M,), their values; mvc_rows, mvc_targets: the
    same of those that the cells' embeddings are asked for; num_views: the pack holds the cells this many times, all of
    one view, then all of the next; most_tokens: num_tokens with nothing thinned away; batch_labels: int64 (cells of the
    pack,) or None; inputs: what the model's forward takes beside the pack.
    """

    rows: Tensor
    targets: Tensor
    mvc_rows: Tensor
    mvc_targets: Tensor
    num_views: int
    most_tokens: int
    batch_labels: Tensor | None
    inputs: dict[str, Any]

    @property
    def planned_tokens(self) -> int:
        return self.most_tokens

    @property
    def num_cells(self) -> int:
        return self.packed.num_cells // self.num_views

    @property
    def cell_ids(self) -> Tensor:
        return self.packed.cell_ids[: self.num_cells]


class ScgptMasked:
    """Masked expression with the losses of cells; see the head of this file and PretrainingObjective.

    batch_labels: int64 (cells of the corpus,), for "dab" and for models that take them.
    """

    family = "scgpt"

    def __init__(
        self, model: Scgpt, settings: ScgptSettings, *, seed: int, batch_labels: np.ndarray | None = None
    ) -> None:
        self.model = model
        self.settings = settings
        self.seed = seed
        self.batch_labels = None if batch_labels is None else torch.from_numpy(batch_labels.astype(np.int64))
        _expect_heads(model, settings)
        if self.batch_labels is None and (settings.dab or settings.within_batch or _reads_labels(model)):
            raise ConfigError("needs the cells' batches", where="objective.batch")
        zeros = model.config.explicit_zeros
        names = ("expression", "expressed", "mvc", "mvc_expressed", "ecs", "cce", "dab")
        self.weights = {name: getattr(settings, name) for name in names if _counts(name, settings, zeros)}

    def at_step(self, step: int) -> dict[str, float]:
        return self.weights

    @property
    def _samples(self) -> GeneSamples | None:
        """How the genes of two views are chosen; None where there is one view, or two of dropout alone."""
        views = self.settings.views
        return None if views == "dropout" or not self.settings.cce else views

    @property
    def _num_passes(self) -> int:
        return 2 if self.settings.cce and self._samples is None else 1

    def lengths_of(self, packed: PackedCells) -> Tensor:
        if self._samples is None:
            return packed.lengths.to(torch.int64) * self._num_passes
        share, most = self.settings.view_share, self.settings.view_tokens
        return view_lengths(packed.lengths, self._samples, share, most)

    def prepare(self, packed: PackedCells, *, epoch: int) -> HiddenExpression:
        shown, values, hidden = [], [], []
        for number, view in enumerate(self._views(packed, epoch)):
            masked = hide_share(
                view,
                self.settings.hidden_ratio(),
                seed=self.seed ^ (number * _SECOND_VIEW),
                epoch=epoch,
                mask_value=self.model.config.mask_value,
            )
            assert view.values is not None
            shown.append(masked.packed)
            values.append(view.values)
            hidden.append(masked.hidden)
        cells, real = concatenate(shown), torch.cat(values)
        rows = torch.cat(hidden).nonzero().flatten()
        mvc_rows = _genes_of(cells) if self.settings.cross_mvc else rows
        labels = None if self.batch_labels is None else self.batch_labels[cells.cell_ids]
        counts = dict.fromkeys(("expression", "expressed"), len(rows))
        counts |= dict.fromkeys(("mvc", "mvc_expressed"), len(mvc_rows))
        counts |= {"ecs": packed.num_cells**2, "cce": packed.num_cells, "dab": cells.num_cells}
        return HiddenExpression(
            cells,
            {name: counts[name] for name in self.weights},
            cells.num_tokens * self._num_passes,
            rows=rows,
            targets=real[rows],
            mvc_rows=mvc_rows,
            mvc_targets=real[mvc_rows],
            num_views=len(shown),
            most_tokens=int(self.lengths_of(packed).sum()),
            batch_labels=labels,
            inputs={"batch_labels": labels} if labels is not None and _reads_labels(self.model) else {},
        )

    def _views(self, packed: PackedCells, epoch: int) -> list[PackedCells]:
        if self._samples is None:
            return [packed]
        settings, seed = self.settings, self.seed
        keys = {"seed": seed, "epoch": epoch}
        views = list(two_views(packed, self._samples, share=settings.view_share, **keys))
        logged = self.model.config.input_style == "log1p"
        for view in (0, 1):
            if settings.depths is not None:
                views[view] = thinned(
                    views[view], settings.depths, settings.most_kept, logged=logged, view=view, **keys
                )
            if settings.view_tokens is not None:
                views[view] = cut(views[view], settings.view_tokens, view=view, **keys)
        return views

    def losses(self, prepared: Prepared) -> dict[str, Tensor]:
        assert isinstance(prepared, HiddenExpression)
        device = self.model.device
        out = self.model(prepared.packed, **prepared.inputs)
        rows, targets = prepared.rows.to(device), prepared.targets.to(device)
        found: dict[str, Tensor] = {}
        if "expression" in self.weights:
            self._add(found, "expression", "expressed", out.expression_at(rows), targets)
        if "mvc" in self.weights:
            cells = out.cell_embeddings
            if self.settings.cross_mvc:
                cells = cells.roll(prepared.num_cells, 0)
            predicted = out.mvc_at(prepared.mvc_rows.to(device), cells)
            self._add(found, "mvc", "mvc_expressed", predicted, prepared.mvc_targets.to(device))
        losses: dict[str, Callable[[], Tensor]] = {
            "ecs": lambda: cell_similarity_losses(
                out.cell_embeddings[: prepared.num_cells], self.model.config.ecs_threshold
            ).sum(),
            "cce": lambda: self._contrast(out, prepared),
            "dab": lambda: F.cross_entropy(out.batch_logits, _labels(prepared).to(device), reduction="sum"),
        }
        return found | {name: loss() for name, loss in losses.items() if name in self.weights}

    def _add(
        self, found: dict[str, Tensor], error: str, likelihood: str, expression: Expression, targets: Tensor
    ) -> None:
        found[error] = squared_errors(expression.prediction, targets).sum()
        if likelihood in self.weights:
            assert expression.zero_probability is not None
            found[likelihood] = expressed_losses(expression.zero_probability, targets).sum()

    def _contrast(self, out: ScgptOutput, prepared: HiddenExpression) -> Tensor:
        if self._samples is None:
            first, second = (
                out.cell_embeddings,
                self.model(prepared.packed, **prepared.inputs).cell_embeddings,
            )
        else:
            first, second = out.cell_embeddings.chunk(2)
        temperature = self.settings.temperature
        groups = None
        if self.settings.within_batch:
            groups = _labels(prepared)[: prepared.num_cells].to(first.device)
        found = contrastive_cell_losses(first, second, temperature, groups=groups).sum()
        if self.settings.symmetric:
            found = (found + contrastive_cell_losses(second, first, temperature, groups=groups).sum()) / 2
        return found


def _genes_of(packed: PackedCells) -> Tensor:
    """Rows of all tokens but each cell's first, int64."""
    genes = torch.ones(packed.num_tokens, dtype=torch.bool)
    genes[packed.cu_seqlens[:-1].to(torch.int64)] = False
    return genes.nonzero().flatten()


def _counts(name: str, settings: ScgptSettings, explicit_zeros: bool) -> bool:
    """A zero likelihood stands beside its squared error and only where the model has it."""
    if name == "expressed":
        return explicit_zeros and bool(settings.expression and settings.expressed)
    if name == "mvc_expressed":
        return explicit_zeros and bool(settings.mvc and settings.mvc_expressed)
    return bool(getattr(settings, name))


def _expect_heads(model: Scgpt, settings: ScgptSettings) -> None:
    if settings.mvc and model.mvc_decoder is None:
        raise ConfigError(
            "the model has no decoder from cell embeddings",
            where="model.mvc_style",
            hint="Or objective.mvc=0.",
        )
    if settings.depths is not None and model.config.input_style == "binned":
        raise ConfigError(
            "bins tell no counts", where="objective.depths", hint='Set model.input_style="log1p".'
        )
    if settings.dab and model.grad_reverse_discriminator is None:
        raise ConfigError("the model has no classifier of batches", where="model.adversary")


def _reads_labels(model: Scgpt) -> bool:
    return model.batch_encoder is not None or model.dsbn is not None


def _labels(prepared: HiddenExpression) -> Tensor:
    if prepared.batch_labels is None:
        raise InvalidArgumentError("has no batch labels", where="prepared")
    return prepared.batch_labels
