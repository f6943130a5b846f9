"""Blocks of cells for the tests of the native module: by hypothesis for shapes nobody thinks of, and by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from rank_value_oracle import Block

DATA_TYPES = ["f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
ARITHMETICS = ["multiply64", "multiply32", "divide64", "divide32"]


def slots_for(rng: np.random.Generator, num_genes: int, num_summed: int) -> dict[str, Any]:
    """Slots as the tokenizer makes them: some columns unknown, some merged into sums, medians with many ties."""
    kind = rng.choice(3, size=num_genes, p=[0.2, 0.5, 0.3] if num_summed else [0.25, 0.75, 0.0])
    column_slot = np.full(num_genes, -1, np.int32)
    single = np.flatnonzero(kind == 1)
    column_slot[single] = np.arange(single.size, dtype=np.int32)
    merged = np.flatnonzero(kind == 2)
    if num_summed:
        column_slot[merged] = single.size + rng.integers(num_summed, size=merged.size)
    num_slots = single.size + num_summed
    return {
        "column_slot": column_slot,
        "slot_token": rng.permutation(num_slots).astype(np.int32) + 4,
        "slot_median": rng.choice([0.1, 0.3, 0.5, 1.0, 1.105969024047805, 7.158e-07, 3.7], size=num_slots),
        "num_single": int(single.size),
    }


def make_block(
    seed: int,
    lengths: list[int],
    num_genes: int = 50,
    data_type: str = "f4",
    index_type: str = "i4",
    num_summed: int = 0,
    tidy: bool = True,
    highest: int = 9,
    **options: Any,
) -> Block:
    """A block with rows of the given lengths. Tidy rows are sorted and free of duplicates."""
    rng = np.random.default_rng(seed)
    rows = [
        np.sort(rng.choice(num_genes, size=length, replace=False))
        if tidy and length <= num_genes
        else rng.integers(num_genes, size=length)
        for length in lengths
    ]
    indices = np.concatenate([*rows, np.empty(0, np.int64)]).astype(index_type)
    data = rng.integers(0, highest, size=indices.size).astype(data_type)
    if data_type.startswith("f") and rng.random() < 0.5:
        data *= 0.37
    return Block(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        indices=indices,
        data=data,
        library_size=rng.integers(1, 5000, size=len(lengths)).astype(np.float64),
        **slots_for(rng, num_genes, num_summed),
        **options,
    )


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Any block that check_csr would pass, and any options."""
    num_genes = draw(st.integers(1, 90))
    prefix = draw(st.sampled_from([-1, 2]))
    suffix = draw(st.sampled_from([-1, 3]))
    specials = (prefix >= 0) + (suffix >= 0)
    return make_block(
        seed=draw(st.integers(0, 2**32 - 1)),
        lengths=draw(st.lists(st.integers(0, 140), min_size=0, max_size=6)),
        num_genes=num_genes,
        data_type=draw(st.sampled_from(DATA_TYPES)),
        index_type=draw(st.sampled_from(["i4", "i8"])),
        num_summed=draw(st.sampled_from([0, 0, 1, 3])),
        tidy=draw(st.booleans()),
        highest=draw(st.sampled_from([2, 5, 120])),
        arithmetic=draw(st.sampled_from(ARITHMETICS)),
        keep_zeros=draw(st.booleans()),
        max_tokens=draw(st.one_of(st.just(-1), st.integers(specials + 1, 100))),
        prefix_token=prefix,
        suffix_token=suffix,
        with_counts=draw(st.booleans()),
    )
