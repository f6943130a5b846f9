"""A gene-gene graph over a vocabulary, and which tokens of a pack see which by it.

The graph says which genes a gene attends to: a regulatory prior, co-expression neighbours, or the nearest in some
space. In a cell only the genes that it expresses are there, so every pack has a plan: for each token the positions
it sees, and for each token who sees it (for the backward). A plan is built once a pack and serves every head and
layer; attention then costs edges, not tokens squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError
from scfm.ops import native
from scfm.ops.arguments import check_offsets

_SIMILARITY_ROWS = 1024


@dataclass(frozen=True)
class GraphPlan:
    """Who sees whom in one pack of T tokens, E pairs in all.

    Token i sees tokens columns[row_offsets[i] : row_offsets[i + 1]], sorted and unique; token j is seen by
    rows[col_offsets[j] : col_offsets[j + 1]]. Offsets int64 (T + 1,), positions int32 (E,).
    """

    row_offsets: Tensor
    columns: Tensor
    col_offsets: Tensor
    rows: Tensor

    @property
    def num_tokens(self) -> int:
        return self.row_offsets.numel() - 1

    @property
    def num_edges(self) -> int:
        return self.columns.numel()

    def to(self, device: torch.device | str) -> GraphPlan:
        return GraphPlan(
            *(x.to(device) for x in (self.row_offsets, self.columns, self.col_offsets, self.rows))
        )

    def dense_mask(self) -> Tensor:
        """bool (T, T): whether token i sees token j. For tests and small packs."""
        seen = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool, device=self.columns.device)
        seen[_row_of_each(self.row_offsets), self.columns.long()] = True
        return seen


class GeneGraph:
    """Neighbours of every gene of a vocabulary of V tokens, in CSR, and the tokens that see and are seen by all.

    A gene always attends to its own tokens and to the global ones, listed or not. offsets: int64 (V + 1,); columns:
    int32, sorted and unique in each row; is_global: bool (V,). Directed: a row holds what its gene attends to.
    """

    def __init__(self, offsets: Tensor, columns: Tensor, is_global: Tensor) -> None:
        self.offsets, self.columns, self.is_global = offsets, columns, is_global
        _check_graph(offsets, columns, is_global)

    @property
    def num_genes(self) -> int:
        """Rows of the graph: the size of the vocabulary."""
        return self.offsets.numel() - 1

    @property
    def num_edges(self) -> int:
        return self.columns.numel()

    @classmethod
    def from_edges(
        cls,
        num_genes: int,
        source: Tensor | np.ndarray | Sequence[int],
        target: Tensor | np.ndarray | Sequence[int],
        *,
        global_ids: Sequence[int] = (),
        symmetric: bool = False,
    ) -> GeneGraph:
        """Edges in any order, repeats allowed: gene ``source[e]`` attends to gene ``target[e]``.

        symmetric: add each edge's reverse. global_ids: tokens such as <cls>, which see and are seen by all.
        Raises InvalidArgumentError for ids outside 0 to num_genes - 1.
        """
        a, b = (torch.as_tensor(x, dtype=torch.int64).flatten() for x in (source, target))
        specials = torch.as_tensor(list(global_ids), dtype=torch.int64)
        if a.numel() != b.numel():
            raise InvalidArgumentError(f"{a.numel()} sources and {b.numel()} targets", where="GeneGraph")
        for name, ids in (("source", a), ("target", b), ("global_ids", specials)):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_genes:
                raise InvalidArgumentError(
                    f"{name} runs from {int(ids.min())} to {int(ids.max())}; expected 0 to {num_genes - 1}",
                    where="GeneGraph",
                )
        if symmetric:
            a, b = torch.cat([a, b]), torch.cat([b, a])
        pairs = torch.unique(a * num_genes + b)
        offsets = _offsets_of(pairs // max(num_genes, 1), num_genes)
        is_global = torch.zeros(num_genes, dtype=torch.bool)
        is_global[specials] = True
        return cls(offsets, (pairs % max(num_genes, 1)).to(torch.int32), is_global)

    @classmethod
    def nearest(
        cls, vectors: Tensor | np.ndarray, num_neighbors: int, *, global_ids: Sequence[int] = ()
    ) -> GeneGraph:
        """Each gene's ``num_neighbors`` most similar genes by cosine, ties to the lower id.

        vectors: (V, n), one row a token: gene embeddings, or expression profiles less their mean (the cosine is
        then the correlation). Global tokens and rows of zeros are nobody's neighbours and have none.
        """
        rows = torch.as_tensor(vectors, dtype=torch.float32)
        if rows.dim() != 2 or not 1 <= num_neighbors < max(len(rows), 2):
            raise InvalidArgumentError(
                f"vectors {tuple(rows.shape)}, num_neighbors {num_neighbors}; expected (genes, n) and 1 to genes - 1",
                where="GeneGraph.nearest",
            )
        norms = rows.norm(dim=1)
        usable = norms > 0
        usable[torch.as_tensor(list(global_ids), dtype=torch.int64)] = False
        unit = rows / norms.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        sources, targets = [], []
        for start in range(0, len(unit), _SIMILARITY_ROWS):
            block = unit[start : start + _SIMILARITY_ROWS]
            similarity = (block @ unit.T).masked_fill_(~usable, -torch.inf)
            own = torch.arange(start, start + len(block))
            similarity[torch.arange(len(block)), own] = -torch.inf
            value, order = torch.sort(similarity, dim=1, descending=True, stable=True)
            value, order = value[:, :num_neighbors], order[:, :num_neighbors]
            keep = torch.isfinite(value) & usable[own][:, None]
            sources.append(own[:, None].expand_as(order)[keep])
            targets.append(order[keep])
        return cls.from_edges(len(rows), torch.cat(sources), torch.cat(targets), global_ids=global_ids)

    def plan(self, token_ids: Tensor, cu_seqlens: Tensor) -> GraphPlan:
        """Who sees whom in a pack. token_ids: int32 (T,) below V; cu_seqlens: int32 (C + 1,); on one device.

        Raises InvalidArgumentError for ids outside the vocabulary.
        """
        check_offsets("GeneGraph.plan", "cu_seqlens", cu_seqlens, token_ids.numel(), token_ids.device)
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.num_genes:
            raise InvalidArgumentError(
                f"token ids run from {int(token_ids.min())} to {int(token_ids.max())}; the graph has genes 0 to "
                f"{self.num_genes - 1}",
                where="GeneGraph.plan",
            )
        if token_ids.device.type == "cpu" and native.missing("graph_plan") is None:
            from scfm import _native

            inputs = (cu_seqlens, token_ids.to(torch.int32), self.offsets, self.columns, self.is_global)
            arrays = [native.array(x.cpu().contiguous()) for x in inputs]
            parts = native.with_torch_threads(_native.graph_plan, *arrays)
            return GraphPlan(*(torch.from_numpy(x) for x in parts))
        return plan_by_sorting(self, token_ids, cu_seqlens)


def plan_by_sorting(graph: GeneGraph, token_ids: Tensor, cu_seqlens: Tensor) -> GraphPlan:
    """The plan in torch alone, on any device: pairs of every rule, looked up by (cell, gene), sorted, made unique."""
    device, num_tokens = token_ids.device, token_ids.numel()
    offsets, columns = graph.offsets.to(device), graph.columns.to(device, torch.int64)
    genes, size = token_ids.to(torch.int64), max(graph.num_genes, 1)
    lengths = cu_seqlens.diff().to(torch.int64)
    cell = torch.repeat_interleave(torch.arange(lengths.numel(), device=device), lengths)
    key, order = torch.sort(cell * size + genes, stable=True)

    def tokens_of(readers: Tensor, wanted: Tensor) -> Tensor:
        """Pairs (reader, token of the wanted gene in the reader's cell) as one number each."""
        sought = cell[readers] * size + wanted
        first, last = torch.searchsorted(key, sought), torch.searchsorted(key, sought, right=True)
        found = order[_ranges(first, last)]
        return torch.repeat_interleave(readers, last - first) * num_tokens + found

    everyone = torch.arange(num_tokens, device=device)
    begin, end = offsets[genes], offsets[genes + 1]
    pairs = [tokens_of(everyone, genes)]
    pairs.append(tokens_of(torch.repeat_interleave(everyone, end - begin), columns[_ranges(begin, end)]))
    specials = everyone[graph.is_global.to(device)[genes]]
    starts = cu_seqlens[:-1].to(torch.int64)[cell[specials]]
    company = _ranges(starts, starts + lengths[cell[specials]])
    special = torch.repeat_interleave(specials, lengths[cell[specials]])
    pairs += [special * num_tokens + company, company * num_tokens + special]
    unique = torch.unique(torch.cat(pairs))
    row, column = unique // max(num_tokens, 1), unique % max(num_tokens, 1)
    by_column = torch.argsort(column, stable=True)
    return GraphPlan(
        _offsets_of(row, num_tokens),
        column.to(torch.int32),
        _offsets_of(column[by_column], num_tokens),
        row[by_column].to(torch.int32),
    )


def _ranges(first: Tensor, last: Tensor) -> Tensor:
    """first[0], first[0] + 1, ... last[0] - 1, first[1], ...: the ranges end to end."""
    counts = last - first
    before = torch.cumsum(counts, 0) - counts
    return torch.arange(int(counts.sum()), device=first.device) + torch.repeat_interleave(
        first - before, counts
    )


def _offsets_of(sorted_rows: Tensor, num_rows: int) -> Tensor:
    counts = torch.bincount(sorted_rows, minlength=num_rows)[:num_rows]
    return torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)])


def _row_of_each(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())


def _check_graph(offsets: Tensor, columns: Tensor, is_global: Tensor) -> None:
    num_genes = offsets.numel() - 1
    shapes_fit = offsets.dim() == columns.dim() == 1 and num_genes >= 0 and is_global.shape == (num_genes,)
    if not shapes_fit or offsets.dtype != torch.int64 or columns.dtype != torch.int32:
        raise InvalidArgumentError(
            f"offsets {offsets.dtype} {tuple(offsets.shape)}, columns {columns.dtype} {tuple(columns.shape)}, "
            f"is_global {tuple(is_global.shape)}; expected int64 (V + 1,), int32 (E,), bool (V,)",
            where="GeneGraph",
        )
    if int(offsets[0]) != 0 or int(offsets[-1]) != columns.numel() or bool((offsets.diff() < 0).any()):
        raise InvalidArgumentError(f"offsets must rise from 0 to {columns.numel()}", where="GeneGraph")
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < num_genes:
        raise InvalidArgumentError(
            f"columns run from {int(columns.min())} to {int(columns.max())}; expected 0 to {num_genes - 1}",
            where="GeneGraph",
        )
    same_row = _row_of_each(offsets).diff() == 0
    falls = (columns.diff() <= 0) & same_row
    if bool(falls.any()):
        row = int(_row_of_each(offsets)[int(falls.nonzero()[0])])
        raise InvalidArgumentError(
            f"the neighbours of gene {row} are not sorted and unique",
            where="GeneGraph",
            hint="GeneGraph.from_edges takes edges in any order.",
        )
