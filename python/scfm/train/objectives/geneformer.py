"""Geneformer's objective: predict masked genes from the rest of the cell.

Of 15 % of the tokens 80 % become <mask>, 10 % a random token and 10 % stay; the loss is the mean cross-entropy
over all of them. The vocabulary-wide head runs on those rows only. Which tokens are masked is keyed by (seed,
epoch, cell), never by batch or order. Source: the authors' pretrainer (Hugging Face's masked-language collator).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfm import _native
from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.engine import default_token_budget, packed_batches
from scfm.models.geneformer.model import Geneformer

_EVALUATION_EPOCH = 2**32 - 1  # an epoch no training reaches: evaluation masks differ from all training masks


@dataclass(frozen=True)
class MaskedCells:
    """Cells with some tokens hidden. positions: int64 (M,) into the pack's tokens; targets: int64 (M,)."""

    packed: PackedCells
    positions: Tensor
    targets: Tensor


@dataclass(frozen=True)
class MaskedEvaluation:
    """Held-out masked-gene prediction. loss: nats a masked token; losses: float64 (M,), correct: bool (M,), of each."""

    loss: float
    accuracy: float
    num_masked: int
    masked_token_ids: np.ndarray
    masked_positions: np.ndarray
    targets: np.ndarray
    losses: np.ndarray
    correct: np.ndarray


def mask_genes(
    packed: PackedCells, model: Geneformer, *, seed: int, epoch: int, mask_ratio: float = 0.15
) -> MaskedCells:
    """Hide ``mask_ratio`` of the tokens, as the authors do: <pad> and <mask> never, <cls> and <eos> too."""
    if model.vocab is None:
        raise InvalidArgumentError(
            "masking needs the <mask> token of the model's dictionaries", where="model"
        )
    mask_token = model.vocab.token["<mask>"]
    tokens = packed.token_ids.cpu().numpy()
    masked, positions = _native.mlm_mask(
        tokens,
        packed.cu_seqlens.cpu().numpy(),
        packed.cell_ids.cpu().numpy(),
        seed,
        epoch,
        mask_ratio,
        mask_token,
        model.config.vocab_size,
        [model.config.pad_token_id, mask_token],
    )
    return MaskedCells(
        packed=PackedCells(
            torch.from_numpy(masked), packed.values, packed.cu_seqlens.cpu(), packed.cell_ids.cpu()
        ),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(tokens[positions].astype(np.int64)),
    )


def masked_gene_loss(model: Geneformer, cells: MaskedCells) -> Tensor:
    """Sum of cross-entropies over the masked tokens, in nats; divide by their number for the authors' loss."""
    hidden = model.forward(cells.packed).hidden
    rows = hidden[cells.positions.to(hidden.device)]
    return model.masked_gene_losses(rows, cells.targets.to(hidden.device)).sum()


@torch.inference_mode()
def evaluate_masked(
    model: Geneformer,
    packed: PackedCells,
    *,
    seed: int = 0,
    mask_ratio: float = 0.15,
    token_budget: int | None = None,
) -> MaskedEvaluation:
    """Loss and accuracy of masked-gene prediction on held-out cells, under one fixed mask a cell."""
    was_training = model.training
    model.eval()
    whole = mask_genes(packed, model, seed=seed, epoch=_EVALUATION_EPOCH, mask_ratio=mask_ratio)
    losses = np.empty(len(whole.positions))
    correct = np.zeros(len(whole.positions), dtype=bool)
    cell_of_token = np.repeat(np.arange(packed.num_cells), packed.lengths.numpy())
    order = torch.arange(packed.num_cells, dtype=torch.int64)
    numbered = PackedCells(whole.packed.token_ids, None, whole.packed.cu_seqlens, order)
    for batch in packed_batches(numbered, token_budget or default_token_budget(model.device)):
        here, positions = _masked_rows(whole, batch, cell_of_token)
        logits = _masked_logits(model, MaskedCells(batch, positions, whole.targets[here])).float().cpu()
        targets = whole.targets[here]
        losses[here] = F.cross_entropy(logits, targets, reduction="none").double().numpy()
        correct[here] = (logits.argmax(1) == targets).numpy()
    model.train(was_training)
    count = len(losses)
    return MaskedEvaluation(
        loss=float(losses.mean()) if count else float("nan"),
        accuracy=float(correct.mean()) if count else float("nan"),
        num_masked=count,
        masked_token_ids=whole.packed.token_ids.numpy(),
        masked_positions=whole.positions.numpy(),
        targets=whole.targets.numpy(),
        losses=losses,
        correct=correct,
    )


def _masked_logits(model: Geneformer, cells: MaskedCells) -> Tensor:
    hidden = model.forward(cells.packed).hidden
    return model.masked_gene_logits(hidden[cells.positions.to(hidden.device)])


def _masked_rows(
    whole: MaskedCells, batch: PackedCells, cell_of_token: np.ndarray
) -> tuple[np.ndarray, Tensor]:
    """Which masked tokens of the whole lie in the batch (indices into ``positions``), and where there."""
    cells = batch.cell_ids.numpy()
    place = np.full(whole.packed.num_cells, -1, dtype=np.int64)
    place[cells] = np.arange(len(cells))
    positions = whole.positions.numpy()
    owner = cell_of_token[positions]
    here = np.flatnonzero(place[owner] >= 0)
    starts_there = whole.packed.cu_seqlens.numpy()[owner[here]]
    starts_here = batch.cu_seqlens.numpy()[place[owner[here]]]
    return here, torch.from_numpy(positions[here] - starts_there + starts_here.astype(np.int64))
