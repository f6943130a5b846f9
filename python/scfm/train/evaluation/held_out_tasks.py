"""The same held-out items for a model and for what needs none: which are asked for, and what each method loses on them.

    geneformer     chosen genes            nats, accuracy     unigram, rank-conditional, neighbour-bigram
    scbert         hidden bins             nats, accuracy     frequencies of the bins, of each gene's bins
    scgpt          hidden values           squared error      each gene's mean, at the cell's depth, at the cell's level
                   cells (a contrast)      nats, accuracy     chance, principal components (held_out_contrast.py)
    scfoundation   hidden genes            squared error      each gene's mean, at the target's depth

Items are drawn as in training, for an epoch that no training reaches, so they are the same at every step. Where
training shows some asked values as they are, to keep a model from trusting what it sees, these are left out here:
finding what is shown is no score. (Geneformer's stay in, for there the baselines make use of them too.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.evaluate import masked_gene_baselines
from scfm.evaluate.gene_value_baselines import (
    GeneValues,
    gene_bin_baselines,
    gene_mean_baselines,
    scaled_to_cells,
)
from scfm.models.base import FoundationModel
from scfm.models.geneformer.model import Geneformer
from scfm.models.scbert.model import Scbert
from scfm.models.scfoundation.model import Scfoundation
from scfm.models.scgpt.model import Scgpt
from scfm.train.evaluation.held_out_contrast import CellContrast, is_contrast_alone
from scfm.train.objectives.geneformer import evaluate_masked
from scfm.train.objectives.scbert import hide_bins
from scfm.train.objectives.scfoundation import HiddenGenes, hide_genes
from scfm.train.objectives.scgpt_pretraining import ScgptGenerative, ScgptMasked
from scfm.train.objectives.settings import (
    GeneformerSettings,
    ObjectiveSettings,
    ScbertSettings,
    ScfoundationSettings,
    ScgptSettings,
)

__all__ = ["HeldOutTask", "ItemScores", "held_out_task"]

_EPOCH = 2**32 - 1  # no training reaches it


@dataclass(frozen=True)
class ItemScores:
    """losses: float64 (N,), nats or squared errors; correct: bool (N,), where there is a best guess."""

    losses: NDArray[np.float64]
    correct: NDArray[np.bool_] | None = None


class HeldOutTask(Protocol):
    """items: what is asked for, in words; cells: int64 (N,), whose each item is; baselines: their scores."""

    items: str
    cells: NDArray[np.int64]
    baselines: dict[str, ItemScores]

    def score(self, model: FoundationModel) -> dict[str, ItemScores]:
        """The model's scores by the head that gives them; the first is the one that counts."""
        ...


def held_out_task(
    model: FoundationModel,
    settings: ObjectiveSettings,
    held_out: PackedCells,
    training: PackedCells,
    *,
    seed: int,
    token_budget: int,
    batch_labels: NDArray[np.int64] | None = None,
) -> HeldOutTask:
    """model: of the run, for its vocabulary and shape; its weights are not read. training: cells for the baselines.

    batch_labels: int64 (cells of the corpus,), for scGPTs that take them.
    """
    cells = _Cells(held_out, training, seed, token_budget)
    if isinstance(model, Geneformer) and isinstance(settings, GeneformerSettings):
        return _ChosenGenes(model, settings, cells)
    if isinstance(model, Scbert) and isinstance(settings, ScbertSettings):
        return _HiddenBins(model, settings, cells)
    if isinstance(model, Scgpt) and isinstance(settings, ScgptSettings):
        if is_contrast_alone(settings):
            return _KnownCells(model, settings, cells, batch_labels)
        return _HiddenValues(model, settings, cells, batch_labels)
    assert isinstance(model, Scfoundation) and isinstance(settings, ScfoundationSettings)
    return _HiddenGenes(model, settings, cells)


@dataclass(frozen=True)
class _Cells:
    held_out: PackedCells
    training: PackedCells
    seed: int
    token_budget: int

    def batches(self, positions: Tensor) -> Iterator[tuple[int, PackedCells]]:
        """The held-out cells in order, within the budget, with the number of each batch's first cell.

        positions: how many each cell costs.
        """
        start, total = 0, 0
        for cell, length in enumerate(positions.tolist()):
            if cell > start and total + length > self.token_budget:
                yield start, self.held_out.select(slice(start, cell))
                start, total = cell, 0
            total += length
        if start < self.held_out.num_cells:
            yield start, self.held_out.select(slice(start, self.held_out.num_cells))


class _ChosenGenes:
    """Geneformer's."""

    items = "chosen genes"

    def __init__(self, model: Geneformer, settings: GeneformerSettings, cells: _Cells) -> None:
        self._settings = settings
        self._cells = cells
        self.baselines: dict[str, ItemScores] = {}
        self.cells: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    @torch.no_grad()
    def score(self, model: FoundationModel) -> dict[str, ItemScores]:
        assert isinstance(model, Geneformer)
        packed = self._cells.held_out
        found = evaluate_masked(
            model,
            packed,
            seed=self._cells.seed,
            mask_ratio=self._settings.mask_ratio,
            token_budget=self._cells.token_budget,
        )
        if not self.baselines:
            vocab = model.vocab
            assert vocab is not None
            self.cells = np.searchsorted(packed.cu_seqlens.numpy(), found.masked_positions, side="right") - 1
            counted = masked_gene_baselines(
                self._cells.training.token_ids.numpy(),
                self._cells.training.cu_seqlens.numpy(),
                found.masked_token_ids,
                packed.cu_seqlens.numpy(),
                found.masked_positions,
                found.targets,
                vocab_size=model.config.vocab_size,
                num_special=sum(name.startswith("<") for name in vocab.token),
                mask_token=vocab.token["<mask>"],
                seed=self._cells.seed,
            )
            self.baselines = {name: ItemScores(one.losses, one.correct) for name, one in counted.items()}
        return {"": ItemScores(found.losses, found.correct)}


class _HiddenBins:
    """scBERT's."""

    items = "hidden bins"

    def __init__(self, model: Scbert, settings: ScbertSettings, cells: _Cells) -> None:
        self._settings = settings
        self._cells = cells
        size = model.config.num_positions
        asked = [(first, *self._hidden(model, batch)[1:]) for first, batch in self._batches(model)]
        rows = np.concatenate([rows.numpy() + first * size for first, rows, _ in asked])
        bins = np.concatenate([targets.numpy() for *_, targets in asked])
        self.cells = rows // size
        test = GeneValues(rows % size, self.cells, bins.astype(np.float64))
        train = _gene_values(cells.training)
        bins_only = (train.values > 0) & (train.values < model.config.mask_bin)
        found = gene_bin_baselines(
            train.take(bins_only), test, num_genes=size, num_bins=model.config.mask_bin, seed=cells.seed
        )
        self.baselines = {name: ItemScores(one.losses, one.correct) for name, one in found.items()}

    def _batches(self, model: Scbert) -> Iterator[tuple[int, PackedCells]]:
        return self._cells.batches(torch.full((self._cells.held_out.num_cells,), model.config.num_positions))

    def _hidden(self, model: Scbert, batch: PackedCells) -> tuple[PackedCells, Tensor, Tensor]:
        ratio = self._settings.mask_ratio
        asked = hide_bins(batch, model, seed=self._cells.seed, epoch=_EPOCH, mask_ratio=ratio, replaced=1.0)
        return asked.packed, asked.rows, asked.targets

    @torch.no_grad()
    def score(self, model: FoundationModel) -> dict[str, ItemScores]:
        assert isinstance(model, Scbert)
        losses, correct = [], []
        for _, batch in self._batches(model):
            packed, rows, targets = self._hidden(model, batch)
            hidden = model.forward(packed, kmax_scope=self._settings.kmax_scope).hidden
            scores = model.bin_scores(hidden[rows.to(hidden.device)]).double().cpu()
            losses.append(F.cross_entropy(scores, targets, reduction="none").numpy())
            # Bin 0 and the mask are never asked for, and the authors' guess leaves them out too.
            correct.append((scores[:, 1 : model.config.mask_bin].argmax(dim=1) + 1 == targets).numpy())
        return {"": ItemScores(np.concatenate(losses), np.concatenate(correct))}


class _HiddenValues:
    """scGPT's: from the tokens, and from the cell's embedding alone."""

    items = "hidden values"

    def __init__(
        self, model: Scgpt, settings: ScgptSettings, cells: _Cells, batch_labels: NDArray[np.int64] | None
    ) -> None:
        self._has_expression = bool(settings.expression)
        # Whole cells, whatever views a contrast has; and where training hides nothing, as much as it does by default.
        self._settings = replace(
            settings,
            mask_ratio=settings.mask_ratio or None,
            expression=1.0,
            ecs=0.0,
            cce=0.0,
            dab=0.0,
            views="dropout",
            view_tokens=None,
            depths=None,
            cross_mvc=False,
            within_batch=False,
        )
        self._cells = cells
        self._labels = batch_labels
        genes, owners, values, visible = [], [], [], []
        for first, batch in cells.batches(cells.held_out.lengths):
            asked = self._objective(model).prepare(batch, epoch=_EPOCH)
            every = _gene_values(asked.packed, first)
            rows = np.zeros(asked.packed.num_tokens, dtype=bool)
            rows[asked.rows.numpy()] = True
            genes.append(every.genes[rows])
            owners.append(every.cells[rows])
            values.append(asked.targets.numpy())
            visible.append(every.take(~rows & ~_first_tokens(asked.packed)))
        self.cells = np.concatenate(owners)
        depth = cells.held_out.lengths.numpy().astype(np.float64)
        test = GeneValues(
            np.concatenate(genes),
            self.cells,
            np.concatenate(values).astype(np.float64),
            depth[self.cells],
        )
        train = _gene_values(cells.training, depths=cells.training.lengths.numpy())
        train = train.take(~_first_tokens(cells.training))
        size = model.config.vocab_size
        found = gene_mean_baselines(train, test, num_genes=size, seed=cells.seed)
        shown = _joined(visible)
        if len(shown.genes):
            plain = replace(train, depths=None)
            means = gene_mean_baselines(plain, shown, num_genes=size, seed=cells.seed)["gene mean"]
            found["gene mean, cell's level"] = scaled_to_cells(found["gene mean"], test, shown, means)
        self.baselines = _squared(found, test)

    def _objective(self, model: Scgpt) -> ScgptGenerative | ScgptMasked:
        seed = self._cells.seed
        if self._settings.kind == "generative":
            return ScgptGenerative(model, self._settings, seed=seed)
        return ScgptMasked(model, self._settings, seed=seed, batch_labels=self._labels)

    @torch.no_grad()
    def score(self, model: FoundationModel) -> dict[str, ItemScores]:
        assert isinstance(model, Scgpt)
        heads: dict[str, list[NDArray[np.float64]]] = {}
        for _, batch in self._cells.batches(self._cells.held_out.lengths):
            asked = self._objective(model).prepare(batch, epoch=_EPOCH)
            out = model.forward(asked.packed, **asked.inputs)
            rows = asked.rows.to(model.device)
            found = {"": out.expression_at(rows).prediction} if self._has_expression else {}
            if model.mvc_decoder is not None:
                found["from the cell's embedding" if found else ""] = out.mvc_at(rows).prediction
            for name, prediction in found.items():
                errors = (prediction.double().cpu() - asked.targets.double()).square()
                heads.setdefault(name, []).append(errors.numpy())
        return {name: ItemScores(np.concatenate(errors)) for name, errors in heads.items()}


class _KnownCells:
    """scGPT's where the objective is a contrast alone."""

    items = "cells that must be known again"

    def __init__(
        self, model: Scgpt, settings: ScgptSettings, cells: _Cells, batch_labels: NDArray[np.int64] | None
    ) -> None:
        self._contrast = CellContrast(
            model,
            settings,
            cells.held_out,
            cells.training,
            seed=cells.seed,
            token_budget=cells.token_budget,
            batch_labels=batch_labels,
        )
        self.cells = np.arange(cells.held_out.num_cells)
        self.baselines = {name: ItemScores(*one) for name, one in self._contrast.baselines.items()}

    @torch.no_grad()
    def score(self, model: FoundationModel) -> dict[str, ItemScores]:
        assert isinstance(model, Scgpt)
        return {"": ItemScores(*self._contrast.score(model))}


class _HiddenGenes:
    """scFoundation's: the genes that the decoder sees masked."""

    items = "hidden genes"

    def __init__(self, model: Scfoundation, settings: ScfoundationSettings, cells: _Cells) -> None:
        self._settings = settings
        self._cells = cells
        test = _joined(
            [
                self._items(model, batch, self._hidden(model, batch), first)
                for first, batch in cells.batches(self._positions(model))
            ]
        )
        self.cells = test.cells
        # The baselines must know how often a gene that is hidden is expressed, as the model does.
        train = self._items(model, cells.training, self._hidden(model, cells.training))
        found = gene_mean_baselines(train, test, num_genes=model.config.num_genes, seed=cells.seed)
        self.baselines = _squared(found, test)

    def _positions(self, model: Scfoundation) -> Tensor:
        return self._cells.held_out.lengths + model.config.vocab_size

    def _hidden(self, model: Scfoundation, packed: PackedCells) -> HiddenGenes:
        return hide_genes(
            packed,
            model,
            seed=self._cells.seed,
            epoch=_EPOCH,
            deep_cell=self._settings.deep_cell,
            down_sampled=self._settings.down_sampled,
        )

    def _items(
        self, model: Scfoundation, packed: PackedCells, hidden: HiddenGenes, first: int = 0
    ) -> GeneValues:
        assert hidden.late.values is not None and packed.values is not None
        masked = hidden.late.values.numpy() == np.float32(model.config.mask_value)
        depths = packed.values.numpy()[packed.cu_seqlens[1:].numpy() - 1].astype(np.float64)
        cells = hidden.cells.numpy()
        every = GeneValues(
            hidden.positions.numpy(), cells + first, hidden.targets.numpy().astype(np.float64), depths[cells]
        )
        return every.take(masked)

    @torch.no_grad()
    def score(self, model: FoundationModel) -> dict[str, ItemScores]:
        assert isinstance(model, Scfoundation)
        errors = []
        for _, batch in self._cells.batches(self._positions(model)):
            hidden = self._hidden(model, batch)
            items = self._items(model, batch, hidden)
            out = model.forward(hidden.shown, late=hidden.late, kmax_scope=self._settings.kmax_scope)
            found = out.prediction.double().cpu().numpy()[items.cells, items.genes]
            errors.append((found - items.values) ** 2)
        return {"": ItemScores(np.concatenate(errors))}


def _squared(found: Mapping[str, NDArray[np.float64]], items: GeneValues) -> dict[str, ItemScores]:
    return {name: ItemScores((prediction - items.values) ** 2) for name, prediction in found.items()}


def _gene_values(
    packed: PackedCells, first: int = 0, *, depths: NDArray[np.integer] | None = None
) -> GeneValues:
    """Every token of the pack as an item; cells are counted from ``first``; depths: of its cells."""
    assert packed.values is not None
    cells = np.repeat(np.arange(packed.num_cells), packed.lengths.numpy())
    return GeneValues(
        packed.token_ids.numpy().astype(np.int64),
        cells + first,
        packed.values.numpy().astype(np.float64),
        None if depths is None else depths.astype(np.float64)[cells],
    )


def _first_tokens(packed: PackedCells) -> NDArray[np.bool_]:
    first = np.zeros(packed.num_tokens, dtype=bool)
    first[packed.cu_seqlens[:-1].numpy()] = True
    return first


def _joined(parts: list[GeneValues]) -> GeneValues:
    depths = [part.depths for part in parts if part.depths is not None]
    return GeneValues(
        np.concatenate([part.genes for part in parts]),
        np.concatenate([part.cells for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate(depths) if len(depths) == len(parts) else None,
    )
