"""rank_value against its numpy definition, for every shape, type, arithmetic and instruction set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blocks import ARITHMETICS, DATA_TYPES, blocks, make_block
from hypothesis import HealthCheck, given, settings
from rank_value_oracle import Block, encode_cell

from scfm import _native as native


def assert_matches_oracle(block: Block) -> Any:
    result = native.rank_value(**block.arguments())
    lengths = np.diff(result.cu_seqlens)
    assert result.cu_seqlens.size == block.indptr.size
    assert result.token_ids.size == result.cu_seqlens[-1]
    assert (result.counts is not None) == block.with_counts
    for row in range(block.indptr.size - 1):
        tokens, counts, num_genes, mapped, total = encode_cell(block, row)
        here = slice(result.cu_seqlens[row], result.cu_seqlens[row + 1])
        assert lengths[row] == tokens.size
        np.testing.assert_array_equal(result.token_ids[here], tokens)
        if result.counts is not None:
            np.testing.assert_array_equal(result.counts[here], counts)
        assert result.num_gene_tokens[row] == num_genes
        np.testing.assert_allclose(result.mapped_counts[row], mapped, rtol=1e-12)
        np.testing.assert_allclose(result.total_counts[row], total, rtol=1e-12)
    return result


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block=blocks())
def test_any_block(isa: str, block: Block) -> None:
    assert_matches_oracle(block)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_large_rows(isa: str, data_type: str, arithmetic: str) -> None:
    lengths = [2000, 0, 1, 3999, 4000, 17]
    block = make_block(7, lengths, 4000, data_type, arithmetic=arithmetic, highest=100, prefix_token=2)
    assert_matches_oracle(block)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(isa: str, threads: int) -> None:
    rng = np.random.default_rng(0)
    block = make_block(1, rng.integers(0, 300, size=700).tolist(), 400, max_tokens=128, suffix_token=3)
    native.set_num_threads(threads)
    result = assert_matches_oracle(block)
    native.set_num_threads(1)
    again = native.rank_value(**block.arguments())
    for name in ("token_ids", "cu_seqlens", "counts", "num_gene_tokens", "mapped_counts", "total_counts"):
        np.testing.assert_array_equal(getattr(result, name), getattr(again, name))


def test_instruction_sets_agree_to_the_bit() -> None:
    block = make_block(3, [1500] * 20, 3000, "f4", num_summed=5, tidy=False)
    block.data *= np.float32(1 / 3)
    results = []
    for name in native.available_isas():
        native.set_isa(name)
        results.append(native.rank_value(**block.arguments()))
    for result in results[1:]:
        for name in ("token_ids", "counts", "mapped_counts", "total_counts"):
            assert getattr(result, name).tobytes() == getattr(results[0], name).tobytes()


@pytest.mark.parametrize("length", range(36))
def test_short_rows(isa: str, length: int) -> None:
    assert_matches_oracle(make_block(length, [length, 0, length], 60, prefix_token=2, suffix_token=3))


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("specials", [(-1, -1), (2, -1), (2, 3)])
def test_cut_at_the_limit(specials: tuple[int, int], extra: int) -> None:
    block = make_block(5, [200], 200, max_tokens=-1, prefix_token=specials[0], suffix_token=specials[1])
    whole = int(native.rank_value(**block.arguments()).cu_seqlens[-1])
    result = assert_matches_oracle(replace(block, max_tokens=whole + extra))
    assert result.cu_seqlens[-1] == min(whole, whole + extra)


@pytest.mark.parametrize(
    "kind", ["equal", "two values", "one outlier", "rising", "falling", "close", "huge range"]
)
def test_hard_distributions(isa: str, kind: str) -> None:
    """Inputs that crowd into few buckets, or that differ only in bits the sorting words have no room for."""
    num_genes = 40_000
    x = {
        "equal": np.ones(num_genes),
        "two values": np.where(np.arange(num_genes) % 7 == 0, 2.0, 1.0),
        "one outlier": np.where(np.arange(num_genes) == 5, 1e300, 1.0 + np.arange(num_genes) * 1e-9),
        "rising": 1.0 + np.arange(num_genes),
        "falling": 1.0 + np.arange(num_genes)[::-1],
        "close": 1.0 + np.random.default_rng(0).integers(0, 999, num_genes) * 2.0**-52,
        "huge range": 10.0 ** np.random.default_rng(1).uniform(-300, 290, num_genes),
    }[kind]
    x = np.concatenate([x, [1e-305]]) if kind == "close" else x
    block = Block(
        indptr=np.array([0, x.size]),
        indices=np.arange(x.size, dtype=np.int32),
        data=x,
        library_size=np.array([10_000.0]),
        column_slot=np.arange(x.size, dtype=np.int32),
        slot_token=np.arange(x.size, dtype=np.int32),
        slot_median=np.ones(x.size),
        num_single=x.size,
    )
    assert_matches_oracle(block)


def test_library_size_zero_ties_all(isa: str) -> None:
    block = make_block(2, [40, 40], 60, highest=3)
    block.library_size[0] = 0.0  # x / 0 is infinite for all that is expressed, 0 / 0 is not a number
    assert_matches_oracle(block)


def test_sorted_and_shuffled_rows_agree(isa: str) -> None:
    block = make_block(11, [300] * 5, 500, num_summed=4)
    rng = np.random.default_rng(4)
    order = np.concatenate([start + rng.permutation(300) for start in block.indptr[:-1]])
    shuffled = replace(block, indices=block.indices[order], data=block.data[order])
    a, b = (native.rank_value(**x.arguments()) for x in (block, shuffled))
    np.testing.assert_array_equal(a.token_ids, b.token_ids)
    np.testing.assert_array_equal(a.counts, b.counts)


def test_duplicate_entries_count_as_their_sum() -> None:
    block = make_block(12, [50], 50)
    doubled = replace(
        block,
        indptr=block.indptr * 2,
        indices=np.repeat(block.indices, 2),
        data=np.repeat(block.data / np.float32(2), 2),
    )
    a, b = (native.rank_value(**x.arguments()) for x in (block, doubled))
    np.testing.assert_array_equal(a.token_ids, b.token_ids)
    np.testing.assert_array_equal(a.counts, b.counts)


def test_summed_slot_of_zeros_is_no_token() -> None:
    block = Block(
        indptr=np.array([0, 3, 6]),
        indices=np.array([0, 1, 2, 0, 1, 2], np.int32),
        data=np.array([1, 0, 0, 0, 2, 0], np.float32),
        library_size=np.ones(2),
        column_slot=np.array([0, 1, 1], np.int32),
        slot_token=np.array([10, 11], np.int32),
        slot_median=np.ones(2),
        num_single=1,
    )
    result = assert_matches_oracle(block)
    assert result.token_ids.tolist() == [10, 11, 10]
    assert native.rank_value(**block.arguments(keep_zeros=False)).token_ids.tolist() == [10, 11]


def test_no_cells_and_no_genes() -> None:
    empty = Block(
        indptr=np.zeros(1, np.int64),
        indices=np.empty(0, np.int32),
        data=np.empty(0, np.float32),
        library_size=np.empty(0),
        column_slot=np.empty(0, np.int32),
        slot_token=np.empty(0, np.int32),
        slot_median=np.empty(0),
        num_single=0,
    )
    assert assert_matches_oracle(empty).cu_seqlens.tolist() == [0]
    three = replace(empty, indptr=np.zeros(4, np.int64), library_size=np.ones(3))
    assert assert_matches_oracle(three).cu_seqlens.tolist() == [0, 0, 0, 0]


def test_result_owns_its_memory() -> None:
    tokens = native.rank_value(**make_block(1, [20] * 50).arguments()).token_ids
    copy = tokens.copy()
    for seed in range(20):
        native.rank_value(**make_block(seed + 2, [20] * 50).arguments())
    np.testing.assert_array_equal(tokens, copy)
    assert tokens.flags.writeable
