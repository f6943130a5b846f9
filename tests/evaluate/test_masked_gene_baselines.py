"""Counted models against hand counts and dense arithmetic: they sum to one and know no test cell."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.errors import InvalidArgumentError
from scfm.evaluate import masked_gene_baselines
from scfm.evaluate.counted_models import BigramModel, Gaps, RankModel, RankTokens, UnigramModel
from scfm.evaluate.counted_models import _chunks as chunks

MASK = 1


def packed(cells):
    lengths = [len(cell) for cell in cells]
    return np.array([t for cell in cells for t in cell], dtype=np.int32), np.cumsum([0, *lengths])


def tokens(cells, vocab_size):
    return RankTokens.checked(*packed(cells), vocab_size, "test")


def gaps_for(cells, positions, vocab_size):
    return Gaps.of(tokens(cells, vocab_size), positions, num_tokens=vocab_size)


def all_probabilities(model, gaps, index, vocab_size):
    chosen = np.zeros(gaps.positions.size, dtype=bool)
    chosen[index] = True
    one = gaps.take(chosen)
    return np.exp([model.predict(one, np.array([t]))[0][0] for t in range(vocab_size)])


def test_unigram_is_add_one_over_tokens_that_can_occur():
    # Vocabulary of 6: <pad> 0 and <mask> 1 never occur, <cls> 2 does, genes 3..5.
    unigram = UnigramModel.count(tokens([[2, 3, 3, 4], [2, 3]], 6), 6, num_special=3)
    np.testing.assert_allclose(unigram.probability, np.array([0, 0, 3, 4, 2, 1]) / 10)


def test_rank_model_by_hand():
    train = tokens([[3, 4], [3, 5]], 6)
    unigram = UnigramModel.count(train, 6, num_special=3)  # 3/7, 2/7, 2/7 for tokens 3, 4, 5
    model = RankModel.count(train, unigram, "relative", 2, 7.0)
    np.testing.assert_allclose(model.table[0], np.array([0, 0, 0, 2 + 3, 0 + 2, 0 + 2]) / 9)
    np.testing.assert_allclose(model.table[1], np.array([0, 0, 0, 0 + 3, 1 + 2, 1 + 2]) / 9)


def test_gaps_look_past_other_gaps_and_stop_at_the_cell():
    cells = [[3, 4, 5, 3], [4, 5], [5]]
    gaps = gaps_for(cells, [1, 2, 3, 4, 6], 6)
    start, end = 6, 7
    assert gaps.left.tolist() == [3, 3, 3, start, start]
    assert gaps.right.tolist() == [end, end, end, 5, end]
    assert gaps.rank.tolist() == [1, 2, 3, 0, 0]
    assert gaps.length.tolist() == [4, 4, 4, 2, 1]


@pytest.mark.parametrize(("strength", "power"), [(1.0, 1.0), (3.0, 0.5), (1000.0, 0.25)])
def test_bigram_equals_dense_arithmetic_and_sums_to_one(strength, power):
    rng = np.random.default_rng(0)
    vocab_size = 9
    cells = [[2, *rng.permutation(np.arange(4, 9))[: rng.integers(1, 6)], 3] for _ in range(12)] + [[]]
    train = tokens(cells, vocab_size)
    unigram = UnigramModel.count(train, vocab_size, num_special=4)
    model = BigramModel.count(train, unigram, strength, power)
    test = [[2, 4, 8, 7, 3], [8, 6], [5]]
    gaps = gaps_for(test, [0, 2, 3, 4, 5, 7], vocab_size)
    p = unigram.probability
    follows = np.zeros((vocab_size + 2, vocab_size))
    precedes = np.zeros((vocab_size + 2, vocab_size))
    for cell in cells:
        for i, token in enumerate(cell):
            follows[cell[i - 1] if i else vocab_size, token] += 1
            precedes[cell[i + 1] if i + 1 < len(cell) else vocab_size + 1, token] += 1
    for index in range(gaps.positions.size):
        left, right = gaps.left[index], gaps.right[index]
        given_left = (follows[left] + strength * p) / (follows[left].sum() + strength)
        given_right = (precedes[right] + strength * p) / (precedes[right].sum() + strength)
        ratio = np.divide(given_left * given_right, p**2, out=np.zeros_like(p), where=p > 0)
        dense = p * ratio**power
        dense /= dense.sum()
        got = all_probabilities(model, gaps, index, vocab_size)
        np.testing.assert_allclose(got, dense, rtol=1e-9)
        assert got.sum() == pytest.approx(1.0)
        _, best, best_log_prob = model.predict(gaps, np.full(gaps.positions.size, 4))
        assert dense[best[index]] == pytest.approx(dense.max())
        assert np.exp(best_log_prob[index]) == pytest.approx(dense.max())


def test_bigram_in_chunks_equals_bigram_at_once(monkeypatch):
    rng = np.random.default_rng(3)
    cells = [rng.integers(4, 30, 40).tolist() for _ in range(20)]
    train = tokens(cells, 30)
    model = BigramModel.count(train, UnigramModel.count(train, 30, 4), 5.0, 0.75)
    hidden = np.flatnonzero(rng.random(800) < 0.2)
    gaps = gaps_for(cells, hidden, 30)
    whole = model.predict(gaps, train.token_ids[hidden])
    monkeypatch.setattr("scfm.evaluate.counted_models.PAIRS_IN_CHUNK", 50)
    assert len(chunks(np.full(100, 20))) > 10
    for one, other in zip(whole, model.predict(gaps, train.token_ids[hidden]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def chain(num_cells, length, seed, vocab_size=24, noise=0.1):
    """Cells whose gene i is followed by gene i + 1 (mod 20), save for some noise."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 20, (num_cells, 1))
    genes = (start + np.arange(length)) % 20
    genes = np.where(rng.random(genes.shape) < noise, rng.integers(0, 20, genes.shape), genes)
    return (genes + 4).tolist()


def masked(cells, seed, vocab_size):
    rng = np.random.default_rng(seed)
    ids, bounds = packed(cells)
    positions = np.flatnonzero(rng.random(ids.size) < 0.15)
    shown, fate = ids.copy(), rng.random(positions.size)
    shown[positions[fate < 0.8]] = MASK
    some = positions[(fate >= 0.8) & (fate < 0.9)]
    shown[some] = rng.integers(0, vocab_size, some.size)
    return shown, bounds, positions, ids[positions].astype(np.int64)


def score(train, test_arguments, vocab_size=24, **options):
    return masked_gene_baselines(*packed(train), *test_arguments, vocab_size, 4, MASK, **options)


def test_a_chain_is_for_the_bigram():
    found = score(chain(200, 30, 0), masked(chain(50, 30, 1), 2, 24), use_shown_tokens=False)
    assert found["unigram"].loss_nats == pytest.approx(np.log(20), abs=0.05)
    assert found["neighbour-bigram"].loss_nats < 0.5 * found["unigram"].loss_nats
    assert found["neighbour-bigram"].accuracy > 0.65 > 0.2 > found["unigram"].accuracy


def test_ranks_are_for_the_rank_model():
    rng = np.random.default_rng(0)

    # Each rank has its own two genes; neighbours add nothing that the rank does not say.
    def cells(n):
        return (2 * np.arange(10) + rng.integers(0, 2, (n, 10)) + 4).tolist()

    found = score(cells(300), masked(cells(60), 1, 24), use_shown_tokens=False)
    assert found["rank-conditional"].loss_nats == pytest.approx(np.log(2), abs=0.15)
    assert found["unigram"].loss_nats == pytest.approx(np.log(20), abs=0.1)


def test_shown_tokens_follow_bayes():
    train, arguments = chain(100, 20, 0), masked(chain(300, 20, 1), 2, 24)
    shown, _, positions, targets = arguments
    plain, used = score(train, arguments, use_shown_tokens=False), score(train, arguments)
    visible = shown[positions] != MASK
    x, t, v = shown[positions][visible], targets[visible], 24
    unigram = UnigramModel.count(RankTokens.checked(*packed(train), 24, ""), 24, 4).probability
    expected = unigram[t] * ((t == x) + 1 / v) / (unigram[x] + 1 / v)
    np.testing.assert_allclose(np.exp(-used["unigram"].losses[visible]), expected, rtol=1e-9)
    for name in plain:
        assert np.array_equal(plain[name].losses[~visible], used[name].losses[~visible])
        assert used[name].loss_nats < plain[name].loss_nats
        part = used[name].where(~visible)
        assert part.num_masked == (~visible).sum() and part.loss_nats == plain[name].where(~visible).loss_nats


def test_what_is_shown_at_selected_positions_is_no_neighbour():
    train, (shown, bounds, positions, targets) = chain(50, 20, 0), masked(chain(20, 20, 1), 2, 24)
    other = shown.copy()
    other[positions] = MASK
    first = score(train, (shown, bounds, positions, targets), use_shown_tokens=False)
    second = score(train, (other, bounds, positions, targets), use_shown_tokens=False)
    for name in first:
        assert np.array_equal(first[name].losses, second[name].losses)


def test_each_cell_is_scored_as_if_alone_so_test_cells_teach_nothing():
    train, test = chain(60, 20, 0), chain(12, 20, 1)
    shown, bounds, positions, targets = masked(test, 2, 24)
    together = score(train, (shown, bounds, positions, targets))
    half = bounds[6]
    inside = positions < half
    alone = score(train, (shown[:half], bounds[:7], positions[inside], targets[inside]))
    for name in together:
        assert np.array_equal(together[name].losses[inside], alone[name].losses)
        assert together[name].settings == alone[name].settings


def test_order_of_positions_does_not_matter():
    train, (shown, bounds, positions, targets) = chain(50, 20, 0), masked(chain(20, 20, 1), 2, 24)
    order = np.random.default_rng(0).permutation(positions.size)
    first = score(train, (shown, bounds, positions, targets))
    second = score(train, (shown, bounds, positions[order], targets[order]))
    for name in first:
        np.testing.assert_allclose(first[name].losses[order], second[name].losses, rtol=1e-12)


def test_a_gene_never_seen_in_train_has_a_finite_loss():
    found = score([[4, 5, 6]] * 30, ([4, MASK, 6], [0, 3], [1], [23]))
    assert all(np.isfinite(one.loss_nats) for one in found.values())


def test_one_train_cell_and_no_masked_position_do_not_crash():
    found = score([[4, 5, 6]], ([4, 5, 6], [0, 3], [], np.empty(0)))
    assert [one.num_masked for one in found.values()] == [0, 0, 0]
    assert np.isnan(found["unigram"].loss_nats)


def test_a_vocabulary_of_sixty_thousand_stays_sparse():
    rng = np.random.default_rng(0)
    train = rng.zipf(1.3, (200, 300)) % 59_996 + 4
    found = score(train.tolist(), masked((rng.zipf(1.3, (20, 300)) % 59_996 + 4).tolist(), 1, 60_000), 60_000)
    assert found["unigram"].loss_nats < np.log(60_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: [0, 1]}, "masked_positions names a position twice|targets has shape"),
        ({2: [3]}, "must lie in 0..2"),
        ({2: [1, 1], 3: [5, 5]}, "twice"),
        ({3: [0]}, "targets are outside"),
        ({3: [24]}, "targets are outside"),
        ({1: [0, 2]}, "cu_seqlens must rise"),
        ({1: [0, 4, 3]}, "cu_seqlens must rise"),
        ({0: [4, 99, 6]}, "token ids reach"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = [[4, MASK, 6], [0, 3], [1], [5]]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(InvalidArgumentError, match=message):
        score([[4, 5, 6]] * 5, arguments)
