"""Geneformer's masks and masked-gene losses: keyed by cell, the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scfm.train.objectives import evaluate_masked, mask_genes, masked_gene_loss


def test_masks_belong_to_cells_not_to_batches(tiny_model, tiny_adata) -> None:
    packed = tiny_model.tokenize(tiny_adata)
    whole = mask_genes(packed, tiny_model, seed=3, epoch=2)
    order = np.random.default_rng(0).permutation(packed.num_cells)
    shuffled = mask_genes(packed.select(order), tiny_model, seed=3, epoch=2)
    cells = whole.packed.to_lists()
    assert shuffled.packed.to_lists() == [cells[i] for i in order]
    assert len(shuffled.positions) == len(whole.positions)
    other_epoch = mask_genes(packed, tiny_model, seed=3, epoch=3)
    assert not torch.equal(other_epoch.packed.token_ids, whole.packed.token_ids)


def test_the_head_on_masked_rows_equals_the_whole_head(tiny_model, tiny_adata) -> None:
    packed = tiny_model.tokenize(tiny_adata)
    cells = mask_genes(packed, tiny_model, seed=0, epoch=0)
    logits = tiny_model.forward(cells.packed).logits[cells.positions]
    whole = torch.nn.functional.cross_entropy(logits, cells.targets, reduction="sum")
    torch.testing.assert_close(masked_gene_loss(tiny_model, cells), whole, rtol=1e-5, atol=1e-4)


def test_evaluation_does_not_depend_on_batches(tiny_model, tiny_adata) -> None:
    packed = tiny_model.tokenize(tiny_adata)
    one = evaluate_masked(tiny_model, packed, seed=1, token_budget=60)
    two = evaluate_masked(tiny_model, packed, seed=1)
    np.testing.assert_allclose(one.losses, two.losses, atol=1e-5)
    assert one.num_masked == len(one.losses) == len(one.targets)
    assert one.loss == pytest.approx(one.losses.mean())
    with torch.inference_mode():
        cells = mask_genes(packed, tiny_model, seed=1, epoch=2**32 - 1)
        total = float(masked_gene_loss(tiny_model, cells))
    assert one.loss * one.num_masked == pytest.approx(total, rel=1e-5)
