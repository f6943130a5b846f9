"""Philox against Random123's known answers, and mlm_mask against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm import _native as native

Array = np.ndarray[Any, np.dtype[Any]]

# philox4x32 with 10 rounds, from kat_vectors of Random123 (counter, key, words).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> Array:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    np.testing.assert_array_equal(native.philox4x32(words(counter), words(key)), words(answer))


def philox(counter: Array, key: Array) -> Array:
    """Ten rounds for all counters (n, 4) at once."""
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
        c0, c1, c2, c3 = (
            (p1 >> high) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> high) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def expected_mask(
    tokens: Array, lengths: Array, cells: Array, seed: int, epoch: int, probability: float, mask: int, vocab: int,
    never: list[int],
) -> tuple[Array, Array]:  # fmt: skip
    position = np.concatenate([np.arange(length) for length in lengths] + [np.empty(0, int)])
    cell = np.repeat(cells.astype(np.uint64), lengths)
    counter = np.stack(
        [position, cell & np.uint64(0xFFFFFFFF), cell >> np.uint64(32), np.full(position.size, epoch)], axis=1
    )
    key = np.array([(seed & 0xFFFFFFFF) ^ 0x6D6C6D00, seed >> 32], np.uint64)
    r = philox(counter, key)
    selected = (r[:, 0] < int(probability * 2**32)) & ~np.isin(tokens, never)
    to_mask = selected & (r[:, 1] < int(0.8 * 2**32))
    to_random = selected & ~to_mask & (r[:, 1] < int(0.9 * 2**32))
    out = tokens.copy()
    out[to_mask] = mask
    out[to_random] = ((r[:, 2] * np.uint64(vocab)) >> np.uint64(32)).astype(np.int32)[to_random]
    return out, np.flatnonzero(selected)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 60), max_size=40),
    probability=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    vocab=st.sampled_from([1, 5, 20_275, 2**31 - 1]),
    never=st.sampled_from([[], [0, 1], [0, 1, 2, 3]]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_any_mask(
    seed: int, epoch: int, lengths: list[int], probability: float, vocab: int, never: list[int], threads: int
) -> None:
    native.set_num_threads(threads)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 30, size=sum(lengths)).astype(np.int32)
    cells = rng.integers(0, 2**62, size=len(lengths))
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    found = native.mlm_mask(tokens, cu_seqlens, cells, seed, epoch, probability, 1, vocab, never)
    expected = expected_mask(tokens, np.array(lengths, int), cells, seed, epoch, probability, 1, vocab, never)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[1].dtype == np.int64


def test_shares() -> None:
    """15% selected; of these 80% masked, 10% random, 10% kept: within five standard deviations."""
    tokens = np.full(400_000, 7, np.int32)
    masked, selected = native.mlm_mask(
        tokens, np.array([0, tokens.size], np.int32), np.array([3]), 1, 0, 0.15, 1, 20_275, [0, 1]
    )
    assert abs(selected.size / tokens.size - 0.15) < 5 * np.sqrt(0.15 * 0.85 / tokens.size)
    shares = [np.mean(masked[selected] == 1), np.mean(masked[selected] == 7)]
    np.testing.assert_allclose(shares, [0.8, 0.1], atol=5 * np.sqrt(0.16 / selected.size))
    assert np.all(masked[np.setdiff1d(np.arange(tokens.size), selected)] == 7)


def test_mask_of_a_cell_does_not_depend_on_its_batch() -> None:
    tokens = np.arange(300, dtype=np.int32)
    whole, _ = native.mlm_mask(
        tokens, np.array([0, 100, 300], np.int32), np.array([4, 9]), 5, 2, 0.3, 1, 99, []
    )
    alone, _ = native.mlm_mask(
        tokens[100:], np.array([0, 200], np.int32), np.array([9]), 5, 2, 0.3, 1, 99, []
    )
    other, _ = native.mlm_mask(
        tokens[100:], np.array([0, 200], np.int32), np.array([9]), 5, 3, 0.3, 1, 99, []
    )
    np.testing.assert_array_equal(whole[100:], alone)
    assert not np.array_equal(alone, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": np.array([0, 4, 3, 6], np.int32)}, "cu_seqlens"),
        ({"cu_seqlens": np.array([0, 3, 5, 7], np.int32)}, "cu_seqlens ends"),
        ({"cu_seqlens": np.array([1, 3, 5, 6], np.int32)}, r"cu_seqlens\[0\]"),
        ({"cu_seqlens": np.array([0, 6], np.int32)}, "cu_seqlens"),
        ({"cu_seqlens": np.empty(0, np.int32)}, "cu_seqlens"),
        ({"probability": 1.5}, "probability"),
        ({"probability": float("nan")}, "probability"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "token_ids": np.arange(6, dtype=np.int32),
        "cu_seqlens": np.array([0, 2, 4, 6], np.int32),
        "cell_ids": np.arange(3),
        "seed": 0,
        "epoch": 0,
        "probability": 0.5,
        "mask_token": 1,
        "vocab_size": 9,
        "never_masked": [],
    }
    native.mlm_mask(**arguments)
    with pytest.raises(ValueError, match=message):
        native.mlm_mask(**{**arguments, **change})
