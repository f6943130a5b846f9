"""What masked-gene prediction costs without a network: three counted models on packed rank tokens.

A loss in nats says little alone: half of a rank sequence is predictable from which genes are common, and
much of the rest from the genes ranked next to the gap. Each baseline is counted on TRAIN cells:

- unigram: P(t) by add-one smoothed frequency;
- rank-conditional: P(t | rank bin), Dirichlet-smoothed with the unigram;
- neighbour-bigram: the nearest visible token on either side, as a product of experts
  ``P(t | left) P(t | right) / P(t)``, raised to a power and renormalised over the vocabulary.

Bins, smoothing and power are chosen on a slice of the train cells that the counts leave out (then
everything is recounted); test cells choose nothing.

The comparison is generous to the baselines in two ways. They know which positions were selected, so they
only read tokens known to be true, while a model must doubt every token. And at a selected position that
shows a gene (of 100: 80 show <mask>, 10 a random token, 10 the true one) they use it as well as can be: by
Bayes, ``P(t | shown x) = P(t) (1[t = x] + 1/V) / (P(x) + 1/V)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm.errors import InvalidArgumentError
from scfm.evaluate.counted_models import BigramModel, CountedModel, Gaps, RankModel, RankTokens, UnigramModel
from scfm.evaluate.split import keyed_generator

__all__ = ["MaskedScore", "masked_gene_baselines"]

TUNING_FRACTION = 0.1
MAX_TUNING_CELLS = 1_000
MASK_RATIO = 0.15
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
POWERS = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
RANK_BINS: tuple[tuple[str, int], ...] = (
    ("relative", 16),
    ("relative", 64),
    ("absolute", 32),
    ("absolute", 128),
)


@dataclass(frozen=True)
class MaskedScore:
    """Mean cross entropy (nats) and accuracy over masked positions; ``losses`` and ``correct``: (M,)."""

    loss_nats: float
    accuracy: float
    num_masked: int
    losses: NDArray[np.float64]
    correct: NDArray[np.bool_]
    settings: str = ""

    def where(self, chosen: NDArray[np.bool_]) -> MaskedScore:
        """The score over some of the positions only."""
        return _score(self.losses[chosen], self.correct[chosen], self.settings)


def masked_gene_baselines(
    train_token_ids: ArrayLike,
    train_cu_seqlens: ArrayLike,
    masked_token_ids: ArrayLike,
    cu_seqlens: ArrayLike,
    masked_positions: ArrayLike,
    targets: ArrayLike,
    vocab_size: int,
    num_special: int,
    mask_token: int,
    *,
    use_shown_tokens: bool = True,
    seed: int = 0,
) -> dict[str, MaskedScore]:
    """Scores of "unigram", "rank-conditional" and "neighbour-bigram" on the given masked positions.

    train_token_ids (T,), train_cu_seqlens (C + 1,): cells to count on, unmasked. masked_token_ids (T',),
    cu_seqlens (C' + 1,): what a model is shown of the test cells. masked_positions (M,): selected positions
    in it, ascending or not; targets (M,): the true tokens. num_special: ids below it are special; one that
    never occurs in train gets probability 0 (so a target among them is refused). Every other token has a
    probability above 0 and each baseline's sum to 1. Raises InvalidArgumentError when arrays contradict
    each other.
    """
    train = RankTokens.checked(train_token_ids, train_cu_seqlens, vocab_size, "train")
    test = RankTokens.checked(masked_token_ids, cu_seqlens, vocab_size, "masked")
    gaps = Gaps.of(test, masked_positions, num_tokens=vocab_size)
    truth = np.asarray(targets, dtype=np.int64)
    if truth.shape != gaps.positions.shape:
        raise InvalidArgumentError(
            f"targets has shape {truth.shape}, masked_positions {gaps.positions.shape}"
        )
    unigram = UnigramModel.count(train, vocab_size, num_special)
    if truth.size and (
        truth.min() < 0 or truth.max() >= vocab_size or unigram.probability[truth].min() <= 0.0
    ):
        raise InvalidArgumentError(
            f"targets are outside 0..{vocab_size - 1} or special tokens that no train cell has",
            where="targets",
        )
    rank_choice, bigram_choice = _choose(train, vocab_size, num_special, seed)
    models: dict[str, CountedModel] = {
        "unigram": unigram,
        "rank-conditional": RankModel.count(train, unigram, *rank_choice),
        "neighbour-bigram": BigramModel.count(train, unigram, *bigram_choice),
    }
    shown = (
        test.token_ids[gaps.positions]
        if use_shown_tokens
        else np.full(truth.size, mask_token, dtype=np.int64)
    )
    return {
        name: _evaluate(model, gaps, truth, shown, mask_token, vocab_size) for name, model in models.items()
    }


def _evaluate(
    model: CountedModel,
    gaps: Gaps,
    targets: NDArray[np.int64],
    shown: NDArray[np.int64],
    mask_token: int,
    vocab_size: int,
) -> MaskedScore:
    log_prob, best, best_log_prob = model.predict(gaps, targets)
    visible = shown != mask_token
    if visible.any():
        # Bayes with the objective's own corruption: what is shown is true or uniform over V, equally often.
        part = gaps.take(visible)
        log_shown = model.predict(part, shown[visible])[0]
        log_v = np.log(float(vocab_size))
        same = targets[visible] == shown[visible]
        evidence = np.logaddexp(log_shown, -log_v)
        log_prob = log_prob.copy()
        log_prob[visible] += np.where(same, np.log1p(1.0 / vocab_size), -log_v) - evidence
        keep = log_shown + np.log1p(vocab_size) > best_log_prob[visible]
        best = best.copy()
        best[visible] = np.where(keep, shown[visible], best[visible])
    return _score(-log_prob, best == targets, model.settings)


def _score(losses: NDArray[np.float64], correct: NDArray[np.bool_], settings: str) -> MaskedScore:
    some = losses.size > 0
    return MaskedScore(
        loss_nats=float(losses.mean()) if some else float("nan"),
        accuracy=float(correct.mean()) if some else float("nan"),
        num_masked=losses.size,
        losses=losses,
        correct=correct,
        settings=settings,
    )


def _choose(
    train: RankTokens, vocab_size: int, num_special: int, seed: int
) -> tuple[tuple[str, int, float], tuple[float, float]]:
    """Rank bins, smoothing and power with the lowest loss on a slice of the train cells."""
    generator = keyed_generator(seed, "tuning")
    num_held = min(max(round(train.num_cells * TUNING_FRACTION), 1), MAX_TUNING_CELLS)
    if train.num_cells < 2:
        return ("relative", 16, 100.0), (30.0, 0.75)
    order = generator.permutation(train.num_cells)
    held, counted = train.select(np.sort(order[:num_held])), train.select(np.sort(order[num_held:]))
    unigram = UnigramModel.count(counted, vocab_size, num_special)
    hidden = np.flatnonzero(generator.random(held.token_ids.size) < MASK_RATIO)
    hidden = hidden[unigram.probability[held.token_ids[hidden]] > 0.0]
    if hidden.size == 0:
        return ("relative", 16, 100.0), (30.0, 0.75)
    targets = held.token_ids[hidden]
    gaps = Gaps.of(held, hidden, num_tokens=vocab_size)

    def loss(model: CountedModel) -> float:
        return -float(model.predict(gaps, targets)[0].mean())

    rank = min(
        ((kind, bins, strength) for kind, bins in RANK_BINS for strength in STRENGTHS),
        key=lambda choice: loss(RankModel.count(counted, unigram, *choice)),
    )
    bigram = BigramModel.count(counted, unigram, STRENGTHS[0], POWERS[-1])
    pair = min(
        ((strength, power) for strength in STRENGTHS for power in POWERS),
        key=lambda choice: loss(bigram.with_smoothing(*choice)),
    )
    return rank, pair
