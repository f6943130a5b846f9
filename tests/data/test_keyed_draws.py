"""Array draws are Philox4x32-10's: the published known answers, and counters that do not know of each other."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.data.keyed_draws import words_at

# Random123's kat_vectors: counter, key, first word.
KNOWN = [
    ((0, 0, 0, 0), 0, 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, 0x408F276D),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0_A4093822, 0xD16CFE09),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter, key, want) -> None:
    assert words_at(counter, key).tolist() == [want]


def test_a_word_depends_on_its_counter_alone() -> None:
    places = np.arange(1000)
    whole = words_at((places, 7, places % 5, 2**32 - 1), 99)
    assert np.array_equal(words_at((places[::-3], 7, places[::-3] % 5, 2**32 - 1), 99), whole[::-3])
    assert len(np.unique(whole)) == 1000 and abs(whole.mean() / 2**31 - 1) < 0.1
