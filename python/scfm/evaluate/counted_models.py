"""Probability models counted from packed rank tokens, without dense vocabulary-by-vocabulary tables.

A vocabulary of 60,000 genes has 3.6e9 ordered pairs; a corpus shows a small share of them. Smoothing adds a
multiple of the unigram to every row, so each conditional is ``P(t) (1 + sparse)`` and sums over the
vocabulary are one plus a sum over stored pairs: exact, and never dense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from scfm.errors import InvalidArgumentError

__all__ = ["BigramModel", "CountedModel", "Gaps", "RankModel", "RankTokens", "UnigramModel"]

Prediction = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]
PAIRS_IN_CHUNK = 2_000_000  # stored pairs gathered at once: about 100 MB of temporaries


@dataclass(frozen=True)
class RankTokens:
    """Packed cells: token_ids int64 (T,), cu_seqlens int64 (C + 1,)."""

    token_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int64]

    @classmethod
    def checked(cls, token_ids: ArrayLike, cu_seqlens: ArrayLike, vocab_size: int, where: str) -> RankTokens:
        tokens = np.asarray(token_ids, dtype=np.int64)
        bounds = np.asarray(cu_seqlens, dtype=np.int64)
        if (
            bounds.ndim != 1
            or bounds.size < 2
            or bounds[0] != 0
            or bounds[-1] != tokens.size
            or (np.diff(bounds) < 0).any()
        ):
            raise InvalidArgumentError(
                f"cu_seqlens must rise from 0 to the {tokens.size} tokens and hold at least one cell",
                where=where,
            )
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
            raise InvalidArgumentError(
                f"token ids reach from {tokens.min()} to {tokens.max()}; the vocabulary has {vocab_size}",
                where=where,
            )
        return cls(tokens, bounds)

    @property
    def num_cells(self) -> int:
        return self.cu_seqlens.size - 1

    @property
    def cell_of_token(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(self.num_cells), np.diff(self.cu_seqlens))

    def select(self, cells: NDArray[np.int64]) -> RankTokens:
        lengths = np.diff(self.cu_seqlens)[cells]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(bounds[-1]) + np.repeat(self.cu_seqlens[cells] - bounds[:-1], lengths)
        return RankTokens(self.token_ids[positions], bounds)


@dataclass(frozen=True)
class Gaps:
    """Masked positions (M,) with what stands around them.

    left, right: nearest visible token, or ``num_tokens`` (cell start) and ``num_tokens + 1`` (cell end)
    where the cell has none on that side; rank, length: position in its cell and tokens of the cell.
    """

    positions: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    rank: NDArray[np.int64]
    length: NDArray[np.int64]

    @classmethod
    def of(cls, cells: RankTokens, masked_positions: ArrayLike, *, num_tokens: int) -> Gaps:
        positions = np.asarray(masked_positions, dtype=np.int64)
        total = cells.token_ids.size
        if positions.ndim != 1 or (positions.size and (positions.min() < 0 or positions.max() >= total)):
            raise InvalidArgumentError(
                f"masked_positions must lie in 0..{total - 1}", where="masked_positions"
            )
        if np.unique(positions).size != positions.size:
            raise InvalidArgumentError("masked_positions names a position twice", where="masked_positions")
        visible = np.ones(total, dtype=bool)
        visible[positions] = False
        index = np.arange(total)
        before = np.maximum.accumulate(np.where(visible, index, -1))[positions]
        after = np.minimum.accumulate(np.where(visible, index, total)[::-1])[::-1][positions]
        cell = cells.cell_of_token[positions]
        start, end = cells.cu_seqlens[cell], cells.cu_seqlens[cell + 1]
        tokens = np.append(
            cells.token_ids, 0
        )  # the appended entry is read only where the result is discarded
        return cls(
            positions=positions,
            left=np.where(before >= start, tokens[before], num_tokens),
            right=np.where(after < end, tokens[after], num_tokens + 1),
            rank=positions - start,
            length=end - start,
        )

    def take(self, chosen: NDArray[np.bool_] | slice) -> Gaps:
        return Gaps(
            self.positions[chosen],
            self.left[chosen],
            self.right[chosen],
            self.rank[chosen],
            self.length[chosen],
        )


class CountedModel(Protocol):
    """A distribution over tokens for each gap."""

    @property
    def settings(self) -> str: ...

    def predict(self, gaps: Gaps, tokens: NDArray[np.int64]) -> Prediction:
        """log P(tokens[i] | gap i), each gap's most probable token and its log probability: (M,) each."""
        ...


@dataclass(frozen=True)
class UnigramModel:
    """P(t) = (count + 1) / (total + tokens that can occur). Special tokens unseen in train cannot occur."""

    probability: NDArray[np.float64]

    @classmethod
    def count(cls, cells: RankTokens, vocab_size: int, num_special: int) -> UnigramModel:
        if not 0 <= num_special < vocab_size:
            raise InvalidArgumentError(
                f"num_special is {num_special}, the vocabulary has {vocab_size} tokens"
            )
        counts = np.bincount(cells.token_ids, minlength=vocab_size).astype(np.float64)
        can_occur = (np.arange(vocab_size) >= num_special) | (counts > 0.0)
        smoothed = np.where(can_occur, counts + 1.0, 0.0)
        return cls(smoothed / smoothed.sum())

    @property
    def settings(self) -> str:
        return "add-one"

    def predict(self, gaps: Gaps, tokens: NDArray[np.int64]) -> Prediction:
        best = int(self.probability.argmax())
        count = tokens.size
        return (
            _log(self.probability[tokens]),
            np.full(count, best, dtype=np.int64),
            np.full(count, np.log(self.probability[best])),
        )


@dataclass(frozen=True)
class RankModel:
    """P(t | bin) = (count + strength P(t)) / (bin total + strength); bins of relative or absolute rank.

    Relative: equal shares of the cell's length. Absolute: equal on a log scale of rank 1..2^13, as ranks
    near the top tell most.
    """

    table: NDArray[np.float64]
    kind: str
    strength: float

    @classmethod
    def count(
        cls, cells: RankTokens, unigram: UnigramModel, kind: str, num_bins: int, strength: float
    ) -> RankModel:
        vocab_size = unigram.probability.size
        cell = cells.cell_of_token
        rank = np.arange(cells.token_ids.size) - cells.cu_seqlens[cell]
        bins = _rank_bin(rank, np.diff(cells.cu_seqlens)[cell], kind, num_bins)
        counts = np.bincount(bins * vocab_size + cells.token_ids, minlength=num_bins * vocab_size)
        table = counts.reshape(num_bins, vocab_size) + strength * unigram.probability
        return cls(table / table.sum(axis=1, keepdims=True), kind, strength)

    @property
    def settings(self) -> str:
        return f"{len(self.table)} {self.kind} bins, smoothing {self.strength:g}"

    def predict(self, gaps: Gaps, tokens: NDArray[np.int64]) -> Prediction:
        bins = _rank_bin(gaps.rank, gaps.length, self.kind, len(self.table))
        best = self.table.argmax(axis=1)[bins]
        return _log(self.table[bins, tokens]), best, _log(self.table[bins, best])


@dataclass(frozen=True)
class BigramModel:
    """P(t | left, right) proportional to P(t) (P(t|left) / P(t))^power (P(t|right) / P(t))^power.

    P(t|left) = (pairs + strength P(t)) / (pairs of left + strength), likewise on the right. With power 1
    this is exact when both neighbours are independent given t; a lower power answers that they are not.
    ``after`` and ``before`` hold pair counts (vocabulary + 2, vocabulary): row = the neighbour (or cell
    start and end), column = the token.
    """

    after: sparse.csr_matrix
    before: sparse.csr_matrix
    probability: NDArray[np.float64]
    strength: float
    power: float

    @classmethod
    def count(cls, cells: RankTokens, unigram: UnigramModel, strength: float, power: float) -> BigramModel:
        vocab_size = unigram.probability.size
        shape = (vocab_size + 2, vocab_size)
        tokens, bounds = cells.token_ids, cells.cu_seqlens
        filled = np.diff(bounds) > 0
        first, last = bounds[:-1][filled], bounds[1:][filled] - 1
        left, right = np.roll(tokens, 1), np.roll(tokens, -1)
        left[first], right[last] = vocab_size, vocab_size + 1
        ones = np.ones(tokens.size)
        return cls(
            after=sparse.csr_matrix((ones, (left, tokens)), shape=shape),
            before=sparse.csr_matrix((ones, (right, tokens)), shape=shape),
            probability=unigram.probability,
            strength=strength,
            power=power,
        )

    def with_smoothing(self, strength: float, power: float) -> BigramModel:
        """The same counts with other constants."""
        return replace(self, strength=strength, power=power)

    @property
    def settings(self) -> str:
        return f"smoothing {self.strength:g}, power {self.power:g}"

    def predict(self, gaps: Gaps, tokens: NDArray[np.int64]) -> Prediction:
        lift_left, lift_right = self._lift(self.after), self._lift(self.before)
        top = int(self.probability.argmax())
        log_prob = np.empty(tokens.size)
        best = np.empty(tokens.size, dtype=np.int64)
        best_log_prob = np.empty(tokens.size)
        width = np.diff(lift_left.indptr)[gaps.left] + np.diff(lift_right.indptr)[gaps.right]
        for rows in _chunks(width):
            both = _combined(lift_left[gaps.left[rows]], lift_right[gaps.right[rows]])
            log_total = np.log1p(both @ self.probability)
            lift = np.asarray(both[np.arange(both.shape[0]), tokens[rows]]).ravel()
            log_prob[rows] = _log(self.probability[tokens[rows]]) + np.log1p(lift) - log_total
            best[rows], weight = self._most_probable(both, top)
            best_log_prob[rows] = np.log(weight) - log_total
        return log_prob, best, best_log_prob

    def _lift(self, pairs: sparse.csr_matrix) -> sparse.csr_matrix:
        """(1 + pairs / (strength P(t)))^power - 1: zero where no pair was seen; row constants cancel."""
        lift = pairs.copy()
        lift.data = np.expm1(
            self.power * np.log1p(lift.data / (self.strength * self.probability[lift.indices]))
        )
        return lift

    def _most_probable(
        self, both: sparse.csr_matrix, top: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Each row's most probable token (a seen pair's or the commonest) and its P(t) (1 + lift)."""
        weight = both.copy()
        weight.data = (weight.data + 1.0) * self.probability[weight.indices]
        best = np.asarray(weight.argmax(axis=1)).ravel().astype(np.int64)
        value = np.asarray(weight[np.arange(best.size), best]).ravel()
        common = self.probability[top]
        return np.where(value >= common, best, top), np.maximum(value, common)


def _combined(left: sparse.csr_matrix, right: sparse.csr_matrix) -> sparse.csr_matrix:
    """(1 + left)(1 + right) - 1, sparse."""
    return sparse.csr_matrix(left + right + left.multiply(right))


def _chunks(width: NDArray[np.int64]) -> list[slice]:
    """Consecutive rows whose stored pairs together stay near PAIRS_IN_CHUNK."""
    if width.size == 0:
        return []
    chunk = np.cumsum(width) // PAIRS_IN_CHUNK
    starts = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), width.size]
    return [slice(first, last) for first, last in pairwise(starts)]


def _rank_bin(
    rank: NDArray[np.int64], length: NDArray[np.int64], kind: str, num_bins: int
) -> NDArray[np.int64]:
    if kind == "relative":
        relative = rank * num_bins // np.maximum(length, 1)
        return np.asarray(np.minimum(relative, num_bins - 1), dtype=np.int64)
    scaled = np.log2(rank + 1.0) * (num_bins / 13.0)
    return np.asarray(np.minimum(scaled, num_bins - 1), dtype=np.int64)


def _log(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(probability))
