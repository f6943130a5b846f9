"""Held-out cells of a run whose objective is a contrast alone: is a cell known again from other genes of its own?

The views are those of the objective (objectives/cell_views.py), drawn for an epoch that no training reaches. A cell is
told from 63 others, of its own batch where the objective says so. Beside the model stand chance and principal
components of the training cells (evaluate/cell_contrast.py).
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scfm.data.packed import PackedCells
from scfm.evaluate.cell_contrast import NUM_COMPONENTS, TEMPERATURES, GenePca, contrast_scores
from scfm.models.base import FoundationModel
from scfm.models.scgpt.model import Scgpt
from scfm.train.objectives.scgpt_pretraining import HiddenExpression, ScgptMasked
from scfm.train.objectives.settings import ScgptSettings

__all__ = ["CellContrast", "is_contrast_alone"]

GROUP = 64
_TUNING = 5  # of so many training cells one is not fitted to, but chooses the number of components and the temperature
_EPOCH = 2**32 - 1

Scores = tuple[NDArray[np.float64], NDArray[np.bool_]]


def is_contrast_alone(settings: ScgptSettings) -> bool:
    """Whether nothing but a contrast of gene samples could be scored."""
    has_values = settings.expression or settings.mvc
    return settings.kind == "masked" and bool(settings.cce) and settings.views != "dropout" and not has_values


class CellContrast:
    """held_out, training: tokens; token_budget: computed at once. ``baselines``: their scores of the held-out cells."""

    def __init__(
        self,
        model: Scgpt,
        settings: ScgptSettings,
        held_out: PackedCells,
        training: PackedCells,
        *,
        seed: int,
        token_budget: int,
        batch_labels: NDArray[np.int64] | None,
    ) -> None:
        self._settings = settings
        self._seed = seed
        self._labels = batch_labels
        self._token_budget = token_budget
        self._held_out = held_out
        self.groups = self._groups_of(held_out)
        self.baselines = {"chance": self._chance()}
        if training.num_cells > 2 * _TUNING:
            self.baselines["PCA of training cells"] = self._pca(model, training)

    def score(self, model: Scgpt) -> Scores:
        """Of the model's cell embeddings, as in training: at the objective's temperature."""
        cells: list[NDArray[np.float64]] = [np.empty((0, model.config.hidden_size))] * 2
        starts = self._starts(self._objective(model), self._held_out)
        for start, stop in itertools.pairwise(starts):
            asked = self._views(model, self._held_out.select(slice(start, stop)))
            found = model.forward(asked.packed, **asked.inputs).cell_embeddings.double().cpu().numpy()
            cells = [np.concatenate(pair) for pair in zip(cells, np.split(found, 2), strict=True)]
        return self._scores(cells[0], cells[1], self.groups, self._settings.temperature)

    def _objective(self, model: Scgpt) -> ScgptMasked:
        return ScgptMasked(model, self._settings, seed=self._seed, batch_labels=self._labels)

    def _views(self, model: FoundationModel, packed: PackedCells) -> HiddenExpression:
        assert isinstance(model, Scgpt)
        return self._objective(model).prepare(packed, epoch=_EPOCH)

    def _starts(self, objective: ScgptMasked, packed: PackedCells) -> list[int]:
        """Where batches within the budget begin, and the end."""
        starts, total = [0], 0
        for cell, length in enumerate(objective.lengths_of(packed).tolist()):
            if cell > starts[-1] and total + length > self._token_budget:
                starts.append(cell)
                total = 0
            total += length
        return [*starts, packed.num_cells]

    def _scores(
        self, first: NDArray[np.float64], second: NDArray[np.float64], groups: NDArray[np.int64], heat: float
    ) -> Scores:
        return contrast_scores(first, second, groups, temperature=heat, symmetric=self._settings.symmetric)

    def _groups_of(self, packed: PackedCells) -> NDArray[np.int64]:
        """Cells in order, GROUP by GROUP, those of a batch by themselves where the objective tells them apart so."""
        labels = np.zeros(packed.num_cells, dtype=np.int64)
        if self._settings.within_batch and self._labels is not None:
            labels = self._labels[packed.cell_ids.numpy()]
        groups = np.zeros(packed.num_cells, dtype=np.int64)
        for label in np.unique(labels):
            cells = np.flatnonzero(labels == label)
            groups[cells] = groups.max(initial=0) + 1 + np.arange(len(cells)) // GROUP
        return groups

    def _chance(self) -> Scores:
        _, place, sizes = np.unique(self.groups, return_inverse=True, return_counts=True)
        size = sizes[place]
        first_of_group = np.zeros(len(size), dtype=bool)
        first_of_group[np.unique(self.groups, return_index=True)[1]] = True  # guesses the first cell for all
        return np.log(size), first_of_group

    def _pca(self, model: Scgpt, training: PackedCells) -> Scores:
        every = np.arange(training.num_cells)
        tuning = training.select(every % _TUNING == 0)
        pca = self._fitted(model, training.select(every % _TUNING != 0))
        groups, views = self._groups_of(tuning), self._halves(model, tuning)

        def loss(choice: tuple[int, float]) -> float:
            return float(
                self._scores(*_projected(pca, views, groups, choice[0]), groups, choice[1])[0].mean()
            )

        size, heat = min(itertools.product(NUM_COMPONENTS, TEMPERATURES), key=loss)
        halves = self._halves(model, self._held_out)
        found = _projected(self._fitted(model, training), halves, self.groups, size)
        return self._scores(*found, self.groups, heat)

    def _fitted(self, model: Scgpt, training: PackedCells) -> GenePca:
        return GenePca(_matrix(training, model.config.vocab_size))

    def _halves(self, model: Scgpt, packed: PackedCells) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """Values by token of both views, (cells, vocabulary)."""
        asked = self._views(model, packed).packed
        half, size = asked.num_cells // 2, model.config.vocab_size
        return _matrix(asked.select(slice(0, half)), size), _matrix(asked.select(slice(half, None)), size)


def _projected(
    pca: GenePca,
    views: tuple[sparse.csr_matrix, sparse.csr_matrix],
    groups: NDArray[np.int64],
    num_components: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return pca.of(views[0], groups, num_components), pca.of(views[1], groups, num_components)


def _matrix(packed: PackedCells, num_tokens: int) -> sparse.csr_matrix:
    """Values by token, (cells, num_tokens), without each cell's first token."""
    assert packed.values is not None
    values = packed.values.numpy().astype(np.float64)
    values[packed.cu_seqlens[:-1].numpy()] = 0.0
    arrays = (values, packed.token_ids.numpy(), packed.cu_seqlens.numpy())
    found = sparse.csr_matrix(arrays, shape=(packed.num_cells, num_tokens), copy=True)
    found.eliminate_zeros()
    return found
