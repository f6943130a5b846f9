"""Hidden values and generative splits: right in number, uniform, and the same for a cell in any batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from scfm.data.packed import PackedCells
from scfm.errors import BadCellError, InvalidArgumentError
from scfm.ops import generative_attention
from scfm.tokenize.scgpt_binning import bin_matrix, bin_packed
from scfm.tokenize.scgpt_generative import GenerativeCells, split_as_upstream, split_for_generation
from scfm.tokenize.scgpt_masking import HiddenValues, hide_each, hide_share

CLS = 999


def cells(*lengths: int) -> PackedCells:
    """Cells of <cls> and so many genes, with values that tell the genes apart."""
    return PackedCells.from_lists(
        [[CLS, *range(length)] for length in lengths],
        [[-2.0, *np.arange(1.0, length + 1)] for length in lengths],
    )


def test_the_share_that_is_hidden_is_exact_and_spares_cls() -> None:
    packed = cells(9, 0, 30, 1)
    shown = hide_share(packed, 0.4, seed=3)
    assert torch.segment_reduce(shown.hidden.float(), "sum", lengths=packed.lengths.long()).tolist() == [
        4,
        0,
        12,
        0,
    ]
    assert (shown.packed.values[shown.hidden] == -1).all()
    assert torch.equal(shown.packed.values[~shown.hidden], packed.values[~shown.hidden])
    assert not shown.hidden[packed.cu_seqlens[:-1].long()].any()
    assert hide_share(packed, 1.0, seed=0).hidden.sum() == 40
    assert hide_share(packed, 0.4, seed=0, num_spared=0).hidden.sum() == 4 + 0 + 12 + 0
    assert hide_share(packed, 0.4, seed=3, mask_value=52.0).packed.values[shown.hidden].eq(52).all()


@pytest.mark.parametrize("hide", [hide_share, hide_each])
def test_what_is_hidden_belongs_to_seed_epoch_and_cell(hide: Callable[..., HiddenValues]) -> None:
    packed = cells(*range(20, 60))
    whole = hide(packed, 0.3, seed=1, epoch=2)
    order = [30, 4, 17]
    part = hide(packed.select(order), 0.3, seed=1, epoch=2)
    assert torch.equal(part.packed.values, whole.packed.select(order).values)
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not torch.equal(hide(packed, 0.3, **other).hidden, whole.hidden)


def test_every_set_of_hidden_values_is_equally_likely() -> None:
    found = Counter(
        tuple(hide_share(cells(5), 0.4, seed=seed).hidden.nonzero().flatten().tolist())
        for seed in range(3000)
    )
    assert set(found) == set(combinations(range(1, 6), 2))
    assert chisquare(list(found.values())).pvalue > 1e-4


def test_each_value_is_hidden_with_its_probability_and_by_itself() -> None:
    packed = cells(*[40] * 200)
    hidden = torch.stack([hide_each(packed, 0.15, seed=seed).hidden for seed in range(10)]).reshape(-1, 41)
    assert not hidden[:, 0].any()
    rates = hidden[:, 1:].float().mean(0)
    assert ((rates - 0.15).abs() < 5 * (0.15 * 0.85 / len(hidden)) ** 0.5).all()
    numbers = hidden.sum(1).float()
    assert numbers.var() == pytest.approx(40 * 0.15 * 0.85, rel=0.15)  # that of independent draws


def test_a_split_puts_known_genes_first_and_keeps_all_values() -> None:
    packed = cells(20, 3, 0, 41)
    split = split_for_generation(packed, 0.25, seed=0)
    assert split.num_known.tolist() == [21 - 5, 4 - 0, 1, 42 - 10] and split.num_known.dtype == torch.int32
    assert torch.equal(split.packed.lengths, packed.lengths)
    for cell in range(4):
        ours, theirs, known = split.packed.select([cell]), packed.select([cell]), int(split.num_known[cell])
        assert ours.token_ids[0] == CLS and ours.values[0] == -2
        for side in (ours.token_ids[1:known], ours.token_ids[known:]):
            assert side.tolist() == sorted(side.tolist())
        assert sorted(ours.to_lists()[0]) == sorted(theirs.to_lists()[0])
        genes = ours.token_ids[1:]
        assert torch.equal(ours.values[1:], genes.float() + 1)
    part = split_for_generation(packed.select([3, 0]), 0.25, seed=0)
    assert torch.equal(part.packed.values, split.packed.select([3, 0]).values)
    q = torch.randn(split.packed.num_tokens, 2, 8)
    generative_attention(q, q, q, split.packed.cu_seqlens, split.num_known)


def test_every_split_is_equally_likely() -> None:
    splits = (split_for_generation(cells(5), 0.4, seed=seed) for seed in range(3000))
    found = Counter(tuple(split.packed.token_ids[int(split.num_known[0]) :].tolist()) for split in splits)
    assert set(found) == set(combinations(range(5), 2))
    assert chisquare(list(found.values())).pvalue > 1e-4


def test_of_several_shares_each_cell_draws_its_own() -> None:
    packed = cells(*[20] * 600)
    split = split_for_generation(packed, [0.25, 0.5, 0.75], seed=4)
    found = Counter((21 - split.num_known).tolist())
    assert set(found) == {5, 10, 15} and chisquare(list(found.values())).pvalue > 1e-4
    part = split_for_generation(packed.select([7, 400]), [0.25, 0.5, 0.75], seed=4)
    assert torch.equal(part.packed.token_ids, split.packed.select([7, 400]).token_ids)


def test_upstreams_split_has_the_same_law_as_ours() -> None:
    """Of a cell cut to length: how often each gene is known or unknown, and how many there are."""
    whole, cut = cells(30), 12
    torch.manual_seed(0)
    ours, theirs = np.zeros((2, 30)), np.zeros((2, 30))

    def count(split: GenerativeCells, into: np.ndarray) -> None:
        known = int(split.num_known[0])
        into[0, split.packed.token_ids[1:known]] += 1
        into[1, split.packed.token_ids[known:]] += 1

    for seed in range(2000):
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(30, generator=generator)[: cut - 1].sort().values.tolist()
        part = PackedCells.from_lists([[CLS, *sample]], [[-2.0, *map(float, sample)]])
        count(split_for_generation(part, 0.5, seed=seed), ours)
        count(split_as_upstream(whole, 0.5, max_tokens=cut), theirs)
    assert ours.sum(1).tolist() == theirs.sum(1).tolist() == [12_000, 10_000]
    assert chisquare(ours.ravel()[:30]).pvalue > 1e-4 and chisquare(ours.ravel()[30:]).pvalue > 1e-4
    assert chisquare(theirs.ravel()[:30]).pvalue > 1e-4 and chisquare(theirs.ravel()[30:]).pvalue > 1e-4


def test_binning_of_packed_cells_spares_cls_and_zeros() -> None:
    packed = PackedCells.from_lists([[CLS, 1, 2, 3], [CLS], [CLS, 4]], [[-2.0, 5, 0, 1], [-2.0], [-2.0, 3]])
    binned = bin_packed(packed, num_bins=11, binning="pretrain")
    assert binned.values.tolist() == [-2.0, 10.0, 0.0, 1.0, -2.0, -2.0, 10.0]
    alone = bin_packed(packed.select([2]), seed=9)
    assert torch.equal(alone.values, bin_packed(packed, seed=9).select([2]).values)
    with pytest.raises(BadCellError, match="row 1: token or column 4 has value -3"):
        bin_packed(PackedCells.from_lists([[CLS], [CLS, 4]], [[-2.0], [-2.0, -3.0]]))
    with pytest.raises(InvalidArgumentError, match="no values"):
        bin_packed(PackedCells.from_lists([[1]]))


def test_a_matrix_with_impossible_values_names_its_row() -> None:
    matrix = np.ones((3, 4))
    matrix[1, 2] = np.nan
    with pytest.raises(BadCellError, match="row 1: token or column 2 has value nan"):
        bin_matrix(matrix)
    for options, words in (({"num_bins": 1}, "num_bins"), ({"binning": "any"}, "binning")):
        with pytest.raises(InvalidArgumentError, match=words):
            bin_matrix(np.ones((1, 2)), **options)


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_shares_that_make_no_sense_are_named(ratio: float) -> None:
    for hide, name in (
        (hide_share, "mask_ratio"),
        (hide_each, "probability"),
        (split_for_generation, "mask_ratio"),
    ):
        with pytest.raises(InvalidArgumentError, match=name):
            hide(cells(3), ratio, seed=0)
    for function in (hide_share, split_for_generation):
        with pytest.raises(InvalidArgumentError, match="no values"):
            function(PackedCells.from_lists([[1]]), 0.5, seed=0)
    with pytest.raises(InvalidArgumentError, match="cell 1 has no token"):
        split_for_generation(PackedCells.from_lists([[1], []], [[0.0], []]), 0.5, seed=0)
