"""What the check runs: every operator on packs of hostile shapes, as calls with their formula beside them.

A call knows the operator, the plain formula and its inputs; ``alone`` gives the same for one cell of the pack, whose
bits must not depend on its company. Inputs are drawn on the CPU, so a seed means the same numbers on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scfm import ops

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """inputs: what gradients are taken of.

    alone: (the operator for a part by itself, the part's inputs, its rows of the whole's output), or None; whole:
    whether these are the rows of every input and gradient, too (of tables, weights and lone queries they are not).
    """

    inputs: tuple[Tensor, ...]
    upstream: Tensor
    operator: Function
    formula: Function
    alone: tuple[Function, tuple[Tensor, ...], slice] | None = None
    whole: bool = True


@dataclass(frozen=True)
class Case:
    """One shape of one operator. make(dtype, device, generator) draws its inputs."""

    operator: str
    name: str
    make: Callable[[torch.dtype, str, torch.Generator], Call]


@dataclass(frozen=True)
class Pack:
    """Packed cells: q, k, v are views of one (T, 3, H, D) tensor, as models give them."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    token_ids: Tensor
    num_known: Tensor

    def cell(self, index: int) -> Pack:
        """One cell by itself."""
        rows = self.rows(index)
        offsets = self.cu_seqlens.new_tensor([0, rows.stop - rows.start])
        known = self.num_known[index : index + 1]
        return Pack(self.q[rows], self.k[rows], self.v[rows], offsets, self.token_ids[rows], known)

    def rows(self, index: int) -> slice:
        begin, end = self.cu_seqlens[index : index + 2].tolist()
        return slice(begin, end)


Bind = Callable[[Pack], tuple[Function, Function]]


# ---- attention of packed cells ----------------------------------------------------------------------------------


def attention_case(
    operator: str,
    name: str,
    bind: Bind,
    lengths: Sequence[int],
    heads: int,
    dim: int,
    *,
    cells_are_apart: bool = True,
) -> Case:
    """bind(pack) -> (operator, formula), both functions of q, k and v."""

    def make(dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
        pack = _pack(lengths, heads, dim, dtype, device, generator)
        run, formula = bind(pack)
        upstream = torch.randn(pack.q.shape, generator=generator).to(device, dtype)
        alone = None
        filled = [cell for cell, length in enumerate(lengths) if length]
        if cells_are_apart and len(filled) > 1:  # the last: what comes before moves its place in memory
            part = pack.cell(filled[-1])
            alone = bind(part)[0], (part.q, part.k, part.v), pack.rows(filled[-1])
        return Call((pack.q, pack.k, pack.v), upstream, run, formula, alone)

    return Case(operator, f"{name}, {heads}x{dim}", make)


def _pack(
    lengths: Sequence[int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
) -> Pack:
    counts = torch.tensor(lengths, dtype=torch.int64)
    total = int(counts.sum())
    qkv = torch.randn(total, 3, heads, dim, generator=generator).to(device, dtype)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device, torch.int32)
    ids = torch.randint(NUM_GENES, (total,), generator=generator, dtype=torch.int32)
    shares = torch.rand(len(lengths), generator=generator)
    if len(lengths) > 2:
        shares[0], shares[-1] = 0.0, 1.0  # nothing known, everything known
    known = (counts * shares).round().to(device, torch.int32)
    return Pack(*qkv.unbind(1), offsets, ids.to(device), known)


def bind_varlen(pack: Pack) -> tuple[Function, Function]:
    return (
        lambda q, k, v: ops.varlen_attention(q, k, v, pack.cu_seqlens),
        lambda q, k, v: ops.varlen_attention_reference(q, k, v, pack.cu_seqlens),
    )


def bind_generative(pack: Pack) -> tuple[Function, Function]:
    return (
        lambda q, k, v: ops.generative_attention(q, k, v, pack.cu_seqlens, pack.num_known),
        lambda q, k, v: ops.generative_attention_reference(q, k, v, pack.cu_seqlens, pack.num_known),
    )


NUM_GENES = 199  # few enough for a short cell's genes to see each other


def gene_graph() -> ops.GeneGraph:
    """A directed graph of about 8 neighbours a gene, with two genes that see and are seen by all."""
    generator = torch.Generator().manual_seed(7)
    edges = torch.randint(NUM_GENES, (2, 8 * NUM_GENES), generator=generator)
    return ops.GeneGraph.from_edges(NUM_GENES, edges[0], edges[1], global_ids=[2, 3])


def bind_graph(pack: Pack) -> tuple[Function, Function]:
    plan = gene_graph().plan(pack.token_ids, pack.cu_seqlens)
    return (
        lambda q, k, v: ops.graph_attention(q, k, v, plan),
        lambda q, k, v: ops.graph_attention_reference(q, k, v, plan),
    )


def bind_favor(num_features: int, scope: Any) -> Bind:
    def bind(pack: Pack) -> tuple[Function, Function]:
        generator = torch.Generator().manual_seed(3)
        projection = torch.randn(num_features, pack.q.shape[2], generator=generator).to(pack.q.device)
        cells = pack.cu_seqlens
        return (
            lambda q, k, v: ops.favor_attention(q, k, v, projection, cells, kmax_scope=scope),
            lambda q, k, v: ops.favor_attention_reference(
                q, k, v, projection.to(q.dtype), cells, kmax_scope=scope
            ),
        )

    return bind


def one_query_case(name: str, lengths: Sequence[int], heads: int, dim: int) -> Case:
    """varlen_attention with cu_seqlens_q: one query a cell, as a cls embedding asks for."""

    def make(dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
        pack = _pack(lengths, heads, dim, dtype, device, generator)
        num_cells = len(lengths)
        q = torch.randn(num_cells, heads, dim, generator=generator).to(device, dtype)
        each = torch.arange(num_cells + 1, dtype=torch.int32, device=device)
        upstream = torch.randn(q.shape, generator=generator).to(device, dtype)
        last = pack.cell(num_cells - 1)

        def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.varlen_attention(q, k, v, last.cu_seqlens, cu_seqlens_q=each[:2])

        return Call(
            (q, pack.k, pack.v),
            upstream,
            lambda q, k, v: ops.varlen_attention(q, k, v, pack.cu_seqlens, cu_seqlens_q=each),
            lambda q, k, v: ops.varlen_attention_reference(q, k, v, pack.cu_seqlens, cu_seqlens_q=each),
            (alone, (q[-1:], last.k, last.v), slice(num_cells - 1, num_cells)),
            whole=False,
        )

    return Case("varlen_attention", f"{name}, one query a cell, {heads}x{dim}", make)


# ---- tokens in, losses out --------------------------------------------------------------------------------------


def embed_case(
    name: str, num_tokens: int, size: int, rows: Sequence[int], *, addend: bool = False, norm: bool = True
) -> Case:
    """embed_norm with one table for each of ``rows``; a table of one row gathers every token's gradient."""

    def make(dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
        ids = [torch.randint(n, (num_tokens,), generator=generator) for n in rows]
        ids = [index.to(device, (torch.int32, torch.int64)[n % 2]) for n, index in enumerate(ids)]
        shapes = [(n, size) for n in rows] + [(num_tokens, size)] * addend + [(size,), (size,)] * norm
        inputs = tuple(torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
        upstream = torch.randn(num_tokens, size, generator=generator).to(device, dtype)

        def call(function: Function, which: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
            tables, rest = list(given[: len(rows)]), list(given[len(rows) :])
            extra = {"addend": rest.pop(0)} if addend else {}
            weight, bias = rest if norm else (None, None)
            return function(which, tables, weight, bias, **extra)

        last = slice(num_tokens - 1, num_tokens)
        own = [x[last] if addend and i == len(rows) else x for i, x in enumerate(inputs)]
        return Call(
            inputs,
            upstream,
            lambda *given: call(ops.embed_norm, ids, given),
            lambda *given: call(ops.embed_norm_reference, ids, given),
            (lambda *given: call(ops.embed_norm, [x[last] for x in ids], given), tuple(own), last)
            if num_tokens > 1
            else None,
            whole=False,
        )

    return Case("embed_norm", name, make)


def head_case(name: str, num_rows: int, size: int, vocab_size: int, *, bias: bool = True) -> Case:
    def make(dtype: torch.dtype, device: str, generator: torch.Generator) -> Call:
        hidden = torch.randn(num_rows, size, generator=generator)
        weight = torch.randn(vocab_size, size, generator=generator) / size**0.5
        extra = [torch.randn(vocab_size, generator=generator)] * bias
        inputs = tuple(x.to(device, dtype) for x in (hidden, weight, *extra))
        targets = torch.randint(vocab_size, (num_rows,), generator=generator).to(device)
        upstream = torch.randn(num_rows, generator=generator).to(device)
        last = slice(num_rows - 1, num_rows)

        def call(function: Function, which: Tensor, given: Sequence[Tensor]) -> Tensor:
            return function(given[0], given[1], given[2] if bias else None, which)

        return Call(
            inputs,
            upstream,
            lambda *given: call(ops.masked_head_loss, targets, given),
            lambda *given: call(ops.masked_head_loss_reference, targets, given),
            (
                lambda *given: call(ops.masked_head_loss, targets[last], given),
                (inputs[0][last], *inputs[1:]),
                last,
            )
            if num_rows > 1
            else None,
            whole=False,
        )

    return Case("masked_head_loss", name, make)


# ---- the shapes -------------------------------------------------------------------------------------------------

_SMALL = {
    "no cell": [],
    "no token": [0, 0, 0],
    "one token": [1],
    "empty cells among others": [0, 3, 0, 17, 0],
}
_FULL = {
    **_SMALL,
    # Many times over: of a few numbers torch's own error may be next to nothing by chance, and twice that is no bound.
    "empty cells among others": [0, 3, 0, 17, 0] * 16,
    "around tiles": [15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257],
    "primes": [2, 3, 5, 7, 11, 13, 101, 251, 509, 1021],
    "1,000 tiny cells": [1 + i % 7 for i in range(1000)],
    "lengths of an atlas": [640, 1371, 2000, 3989],
    "4,096 tokens": [4096],
    "16,907 tokens": [16_907],
}
_TINY = {**_SMALL, "around tiles": [15, 17, 33]}
_OTHER_DIMS = ((3, 40), (1, 16), (2, 128), (1, 256))


def all_cases(*, tiny: bool) -> list[Case]:
    """tiny: what Triton's interpreter computes in seconds."""
    return [*_attention_cases(tiny), *_token_cases(tiny)]


def _attention_cases(tiny: bool) -> list[Case]:
    binds: list[tuple[str, str, Bind]] = [
        ("varlen_attention", "", bind_varlen),
        ("generative_attention", "", bind_generative),
        ("graph_attention", "", bind_graph),
        ("favor_attention", "", bind_favor(37 if tiny else 266, "cell")),
        ("favor_attention", ", maximum of the batch", bind_favor(37 if tiny else 266, "batch")),
    ]
    cases = []
    for operator, note, bind in binds:
        packs = _TINY if tiny else _FULL
        if note:
            packs = {name: packs[name] for name in ("no token", "empty cells among others", "around tiles")}
        for name, lengths in packs.items():
            heads, dim = (1, 16) if tiny else (1, 64) if sum(lengths) > 8000 else (2, 64)
            if not tiny and sum(lengths) == 1:
                heads = 32  # see above
            apart = not note
            cases.append(
                attention_case(operator, name + note, bind, lengths, heads, dim, cells_are_apart=apart)
            )
        if not tiny and not note:
            cases += [
                attention_case(operator, "other heads", bind, [37, 1, 130] * 4, *d) for d in _OTHER_DIMS
            ]
    lengths = [5, 0, 17, 33] if tiny else [5, 0, 17, 129, 2000]
    return [*cases, one_query_case("mixed", lengths, *((1, 16) if tiny else (2, 64)))]


def _token_cases(tiny: bool) -> list[Case]:
    if tiny:
        return [
            embed_case("no token", 0, 24, [7, 3]),
            embed_case("three tables", 19, 24, [7, 1, 19]),
            embed_case("an addend, no norm", 5, 40, [11], addend=True, norm=False),
            head_case("no row", 0, 16, 9),
            head_case("odd sizes", 13, 24, 131),
        ]
    return [
        embed_case("no token", 0, 768, [20_275, 2]),
        embed_case("one token", 1, 768, [20_275, 2, 4096]),
        embed_case("Geneformer's", 16_411, 768, [20_275, 2, 4096]),
        embed_case("scGPT's", 9601, 512, [60_697], addend=True),
        embed_case("scBERT's", 16_907, 200, [7, 16_907]),
        embed_case("five tables, odd width", 1021, 37, [101, 1, 3, 7, 1021], addend=True),
        embed_case("no norm", 4097, 512, [997, 5], norm=False),
        head_case("no row", 0, 768, 20_275),
        head_case("one row", 1, 768, 20_275),
        head_case("Geneformer's", 1021, 768, 20_275),
        head_case("scGPT's, no bias", 509, 512, 60_697, bias=False),
        head_case("odd sizes", 131, 37, 997),
        head_case("two genes", 4096, 64, 2),
    ]
