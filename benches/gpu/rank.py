"""Rank-value tokens on the GPU against their definition, cell by cell, in float64 on the CPU: equal to the last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scfm.ops import cuda_kernels
from scfm.tokenize.rank_on_device import DeviceTokens, GeneTableOnDevice, rank_on_device

NUM_GENES, NUM_SLOTS = 20_000, 17_000  # columns of a file, of which these are tokens
CLS, EOS, MAX_TOKENS = 2, 3, 4096


@dataclass(frozen=True)
class Block:
    """Raw counts of cells x NUM_GENES in CSR; slots: column -> place in tokens and medians, or -1."""

    indptr: Tensor
    indices: Tensor
    data: Tensor
    slots: Tensor
    tokens: Tensor
    medians: Tensor


# {shape: (counts a cell has, the largest count, whether its columns are in order)}
SHAPES: dict[str, tuple[list[int], int, bool]] = {
    "no cell": ([], 9, True),
    "empty cells among others": ([0, 3, 0, 1, 0], 9, True),
    "lengths about the steps of a sort": (
        [1, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097],
        50,
        True,
    ),
    "ties": ([2000, 700], 1, True),
    "columns out of order": ([1500, 2, 0, 300], 50, False),
    "every gene": ([NUM_GENES, 10, NUM_GENES], 30, True),
    "200 cells of an atlas": ([840 + 37 * (i % 60) for i in range(200)], 200, True),
}


def lines_of(device: str, seed: int) -> Iterator[str]:
    title = "rank_value cuda"
    if (objection := cuda_kernels.objection(torch.empty(1, 1, 1, device=device))) is not None:
        yield f"skip   {title}: {objection}"
        return
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.int32):
            block = random_block(*shape, dtype, seed)
            try:
                wrong = _complaint(block, device)
            except Exception as error:  # whatever it raises is its result
                wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            shown = f"{title} {str(dtype).removeprefix('torch.')}, {name}"
            yield f"FAILED {shown}: {wrong}" if wrong else f"ok     {shown}: every token, the same bits twice"


def random_block(lengths: list[int], highest: int, tidy: bool, dtype: torch.dtype, seed: int) -> Block:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randperm(NUM_GENES, generator=generator)[:length] for length in lengths]
    columns = [x.sort().values if tidy else x for x in columns]
    counts = torch.tensor([0, *lengths]).cumsum(0)
    data = torch.randint(1, highest + 1, (int(counts[-1]),), generator=generator).to(dtype)
    slots = torch.full((NUM_GENES,), -1, dtype=torch.int32)
    known = torch.randperm(NUM_GENES, generator=generator)[:NUM_SLOTS].sort().values
    slots[known] = torch.arange(NUM_SLOTS, dtype=torch.int32)
    medians = torch.rand(NUM_SLOTS, generator=generator, dtype=torch.float64) + 0.5
    tokens = torch.arange(4, 4 + NUM_SLOTS, dtype=torch.int32)
    indices = torch.cat([torch.zeros(0, dtype=torch.int64), *columns]).to(torch.int32)
    return Block(counts, indices, data, slots, tokens, medians)


def expected(block: Block) -> tuple[list[Tensor], list[float], list[float]]:
    """Of every cell: its tokens, the sum of its counts of known genes, and of all. Ties go to the lower column."""
    tokens, mapped, totals = [], [], []
    for begin, end in zip(block.indptr[:-1].tolist(), block.indptr[1:].tolist(), strict=True):
        columns, order = block.indices[begin:end].long().sort()
        counts = block.data[begin:end][order].double()
        total = float(counts.sum())
        known = block.slots[columns] >= 0
        slots, own = block.slots[columns][known].long(), counts[known]
        ranked = own * (1.0 / total) * 10_000 * (1.0 / block.medians[slots]) if len(own) else own
        best = torch.sort(-ranked, stable=True).indices[: MAX_TOKENS - 2]
        middle = block.tokens[slots[best]].tolist()
        tokens.append(torch.tensor([CLS, *middle, EOS] if middle else [], dtype=torch.int32))
        mapped.append(float(own.sum()))
        totals.append(total)
    return tokens, mapped, totals


def _complaint(block: Block, device: str) -> str | None:
    slots, medians = block.slots.numpy(), block.medians.numpy().astype(np.float64)
    table = GeneTableOnDevice.of(slots, block.tokens.numpy(), medians, NUM_SLOTS, "multiply64", device)
    found = [_ranked(block, table, device) for _ in range(2)]
    for one, other in zip(vars(found[0]).values(), vars(found[1]).values(), strict=True):
        if one is not None and not torch.equal(one, other):
            return "two calls differ"
    tokens, mapped, totals = expected(block)
    cells = found[0].cu_seqlens.tolist()
    for cell, want in enumerate(tokens):
        have = found[0].token_ids[cells[cell] : cells[cell + 1]].cpu()
        if not torch.equal(have, want):
            return f"cell {cell} has {len(have)} tokens, expected {len(want)}, or others than these"
    if found[0].mapped_counts.tolist() != mapped or found[0].total_counts.tolist() != totals:
        return "sums of counts differ"
    return None


def _ranked(block: Block, table: GeneTableOnDevice, device: str) -> DeviceTokens:
    counts = (x.to(device) for x in (block.indptr, block.indices, block.data))
    return rank_on_device(*counts, table, max_tokens=MAX_TOKENS, prefix_token=CLS, suffix_token=EOS)
