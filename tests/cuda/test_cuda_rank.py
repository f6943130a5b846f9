"""The tokenization kernels, run on the host: bit for bit what the CPU's rank_value gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from blocks import ARITHMETICS, DATA_TYPES, blocks, make_block
from cuda_emulator import Emulator
from hypothesis import HealthCheck, given, settings
from rank_value_oracle import Block

from scfm import _native as native

FACTS = ("token_ids", "cu_seqlens", "num_gene_tokens", "mapped_counts", "total_counts", "counts")


def check(emulator: Emulator, block: Block, **how) -> None:
    expected, found = native.rank_value(**block.arguments()), emulator.rank_value(block, **how)
    for name in FACTS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype, name
            np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8), err_msg=name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block=blocks())
def test_any_block(emulator: Emulator, block: Block) -> None:
    check(emulator, block)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_every_type_and_arithmetic(emulator: Emulator, data_type: str, arithmetic: str) -> None:
    block = make_block(7, [300, 0, 1, 17], 400, data_type, "i8", arithmetic=arithmetic, highest=100)
    check(emulator, replace(block, prefix_token=2, suffix_token=3))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(emulator: Emulator, order: int) -> None:
    """A barrier that is missing shows in some order: within a row, between rows of a block, between steps."""
    with emulator.order(order):
        check(emulator, make_block(1, [700, 0, 64, 65, 1, 33], 900, num_summed=9, highest=4, suffix_token=3))
        check(emulator, make_block(2, [120, 1300], 800, num_summed=3, tidy=False, highest=3))
        check(emulator, make_block(3, [200, 90, 150, 70], 300, highest=50), num_blocks=1)
        check(emulator, make_block(8, [1, 2] * 1100, 5))


@pytest.mark.parametrize(
    "length", [2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025]
)
def test_lengths_about_the_steps_of_the_sort(emulator: Emulator, length: int) -> None:
    check(emulator, make_block(length, [length, length - 1], 1100, highest=50, prefix_token=2))


@pytest.mark.parametrize("kind", ["equal", "rising", "falling", "close", "huge range", "two values"])
def test_hard_distributions(emulator: Emulator, kind: str) -> None:
    num_genes = 1500
    generator = np.random.default_rng(0)
    x = {
        "equal": np.ones(num_genes),
        "rising": 1.0 + np.arange(num_genes),
        "falling": 1.0 + np.arange(num_genes)[::-1],
        "close": 1.0 + generator.integers(0, 99, num_genes) * 2.0**-52,
        "huge range": 10.0 ** generator.uniform(-300, 290, num_genes),
        "two values": np.where(np.arange(num_genes) % 7 == 0, 2.0, 1.0),
    }[kind]
    block = make_block(1, [num_genes], num_genes, "f8")
    check(emulator, replace(block, data=x))


def test_rows_longer_than_shared_memory(emulator: Emulator) -> None:
    block = make_block(
        3, [4096, 4097, 5, 6000, 0], 7000, highest=20, num_summed=4, prefix_token=2, max_tokens=2048
    )
    check(emulator, block)
    check(emulator, replace(block, max_tokens=-1), num_blocks=1)  # one after another in the same room


def test_long_rows_out_of_order_with_repeated_columns(emulator: Emulator) -> None:
    block = make_block(4, [5000, 4500, 3], 2500, "f4", num_summed=3, tidy=False, highest=30)
    check(emulator, replace(block, data=block.data * np.float32(1 / 3)))


def test_more_slots_than_short_ids_can_name(emulator: Emulator) -> None:
    """Ids of 16 bits count entries and summed slots: with 65,600 slots the rows take the general path."""
    num_slots = 65_600
    block = make_block(5, [40, 3], 2 * num_slots, highest=9)
    slots = np.repeat(np.arange(num_slots, dtype=np.int32), 2)
    tokens, medians = np.arange(num_slots, dtype=np.int32), np.ones(num_slots)
    check(emulator, replace(block, column_slot=slots, slot_token=tokens, slot_median=medians, num_single=0))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [1] * 300])
def test_blocks_of_nothing_and_of_single_entries(emulator: Emulator, lengths: list[int]) -> None:
    check(emulator, make_block(6, lengths, 12, prefix_token=2, suffix_token=3, keep_zeros=False))


def test_more_rows_than_one_step_of_the_offsets(emulator: Emulator) -> None:
    generator = np.random.default_rng(5)
    check(emulator, make_block(8, generator.integers(0, 3, 2300).tolist(), 5))


@pytest.mark.parametrize("size", [0.0, np.inf, 5e-324, 1e300])
def test_library_sizes_at_the_edges(emulator: Emulator, size: float) -> None:
    block = make_block(2, [40, 40], 60, highest=3)
    for arithmetic in ARITHMETICS:
        block.library_size[0] = size
        check(emulator, replace(block, arithmetic=arithmetic))


def test_values_that_are_no_numbers_rank_as_on_the_cpu(emulator: Emulator) -> None:
    block = make_block(9, [60], 60, "f8", num_summed=2)
    block.data[[3, 9, 20]] = [np.nan, -2.0, np.inf]
    check(emulator, block)


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_row_sums(emulator: Emulator, data_type: str) -> None:
    block = make_block(10, [7, 0, 8, 9, 1000, 1], 1200, data_type, highest=100)
    found = emulator.row_sums(block)
    np.testing.assert_array_equal(found, native.row_sums(block.indptr, block.data))


# ---- what check_rows finds ------------------------------------------------------------------------------------------


def test_a_good_block(emulator: Emulator) -> None:
    block = make_block(1, [3, 0, 9], 20)
    assert emulator.check_rows(block)[0] == [-1, -1, 0, 9]
    order = np.arange(12)
    order[[4, 5]] = [5, 4]
    found, flags = emulator.check_rows(replace(block, indices=block.indices[order]))
    assert found == [-1, -1, 1, 9] and flags.tolist() == [0, 0, 1]
    repeated = block.indices.copy()
    repeated[1] = repeated[0]
    found, flags = emulator.check_rows(replace(block, indices=repeated))
    assert found == [-1, -1, 1, 9] and flags.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("indptr", "bad_offset"),
    [
        ([1, 3, 12], 0),
        ([-1, 3, 12], 0),
        ([0, 5, 4, 12], 2),
        ([0, 13, 12], 1),
        ([0, 3, 11], 2),
        ([0, -5, 12], 1),
        ([0, 2**62, 12], 1),
        ([0], -1),
    ],
)
def test_broken_offsets_are_found_and_not_followed(
    emulator: Emulator, indptr: list[int], bad_offset: int
) -> None:
    block = replace(make_block(1, [12], 20), indptr=np.array(indptr, np.int64))
    if bad_offset == -1:
        block = replace(block, indices=block.indices[:0], data=block.data[:0])
    assert emulator.check_rows(block)[0][0] == bad_offset


@pytest.mark.parametrize("column", [-1, 20, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("index_type", ["i4", "i8"])
def test_columns_out_of_range_are_found(emulator: Emulator, column: int, index_type: str) -> None:
    block = make_block(1, [5, 7, 30], 20, index_type=index_type)
    block.indices[[8, 11]] = column
    assert emulator.check_rows(block)[0][1] == 8


def test_a_column_of_64_bits_that_would_fit_if_cut(emulator: Emulator) -> None:
    block = make_block(1, [5], 20, index_type="i8")
    block.indices[2] = 2**32 + 3
    assert emulator.check_rows(block)[0][1] == 2
