"""Geneformer's rank-value encoding on a GPU: the CPU's tokens to the last one, for whoever has a GPU to spare.

A block's counts are copied over and sorted there, and the tokens come back (8 bytes an entry out, 4 a token back: far
less than the link carries). Tensors that lie on the GPU already stay there. Equality with the native path is what
tests/cuda checks, kernel by kernel. Not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError, MissingDependencyError
from scfm.ops import cuda_kernels

__all__ = ["DeviceTokens", "GeneTableOnDevice", "RankOnDevice", "rank_on_device"]

_WHERE = "rank_value"
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class GeneTableOnDevice:
    """What rank_value looks up, on one device: see ``_cuda.gene_table``. arithmetic: multiply64, divide32 ..."""

    parts: tuple[Tensor, ...]
    arithmetic: str

    @classmethod
    def of(
        cls,
        column_slot: Array,
        slot_token: Array,
        slot_median: Array,
        num_single: int,
        arithmetic: str,
        device: torch.device | str,
    ) -> GeneTableOnDevice:
        """The slots of a ``GenePlan``. Raises InvalidArgumentError where they do not fit together."""
        *parts, used = cuda_kernels.module().gene_table(
            column_slot, slot_token, slot_median, num_single, arithmetic
        )
        return cls(tuple(torch.from_numpy(x).to(device) for x in parts), used)

    @property
    def num_genes(self) -> int:
        return self.parts[0].numel()

    @property
    def num_summed(self) -> int:
        return self.parts[2].numel()


@dataclass(frozen=True)
class DeviceTokens:
    """Packed tokens of a block of cells, all on one device; the fields of ``_native.RankValueResult``.

    token_ids: int32 (T,); counts: CP10k of each token, float64 (T,), or None; cu_seqlens: int64 (C + 1,);
    num_gene_tokens: int32 (C,), before cutting; mapped_counts, total_counts: float64 (C,).
    """

    token_ids: Tensor
    counts: Tensor | None
    cu_seqlens: Tensor
    num_gene_tokens: Tensor
    mapped_counts: Tensor
    total_counts: Tensor


def rank_on_device(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    table: GeneTableOnDevice,
    library_size: Tensor | None = None,
    *,
    keep_zeros: bool = True,
    max_tokens: int = -1,
    prefix_token: int = -1,
    suffix_token: int = -1,
    with_counts: bool = False,
) -> DeviceTokens:
    """Rank-value tokens of a CSR block (cells x genes) that lies on a GPU, on torch's current stream.

    indptr: int64 (C + 1,); indices: int32 or int64; data: raw counts, float32, float64 or any integer type. table: of
    the block's genes, on the same device. library_size: float64 (C,), None for the row sums. max_tokens: with special
    tokens, -1 for no limit; prefix_token, suffix_token: -1 for none. Raises InvalidArgumentError for broken offsets
    and columns out of range, naming them; CudaError where CUDA refuses.
    """
    cuda, num_rows = cuda_kernels.module(), indptr.numel() - 1
    with cuda_kernels.stream_on(data.device) as stream:
        checked, out_of_order = _checked(indptr, indices, data, table.num_genes, stream)
        if library_size is None:
            library_size = data.new_empty(num_rows, dtype=torch.float64)
            cuda.row_sums(indptr, data, library_size, stream)
        size = cuda.num_tokens_at_most(num_rows, data.numel(), max_tokens, prefix_token, suffix_token)
        result = DeviceTokens(
            token_ids=data.new_empty(size, dtype=torch.int32),
            counts=data.new_empty(size, dtype=torch.float64) if with_counts else None,
            cu_seqlens=data.new_empty(num_rows + 1, dtype=torch.int64),
            num_gene_tokens=data.new_empty(num_rows, dtype=torch.int32),
            mapped_counts=data.new_empty(num_rows, dtype=torch.float64),
            total_counts=data.new_empty(num_rows, dtype=torch.float64),
        )
        cuda.rank_value(
            indptr,
            indices,
            data,
            checked,
            out_of_order,
            library_size,
            table.parts,
            table.arithmetic,
            keep_zeros,
            max_tokens,
            prefix_token,
            suffix_token,
            _room(data, num_rows, checked, table.num_summed),
            tuple(vars(result).values()),
            stream,
        )
        num_tokens = int(result.cu_seqlens[-1])
    counts = None if result.counts is None else result.counts[:num_tokens]
    return replace(result, token_ids=result.token_ids[:num_tokens], counts=counts)


class RankOnDevice:
    """Takes the place of ``_native.rank_value``: numpy arrays in and out, the work on one GPU.

    Raises MissingDependencyError if the CUDA module cannot be used on that device.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        reason = _objection(self.device)
        if reason is not None:
            raise MissingDependencyError(
                f"tokens cannot be ranked on {self.device}: {reason}",
                where="device",
                hint="Leave device out: the CPU gives the same tokens.",
            )
        self._tables: dict[tuple[int, str], tuple[Array, GeneTableOnDevice]] = {}

    def __call__(
        self,
        indptr: Array,
        indices: Array,
        data: Array,
        library_size: Array,
        column_slot: Array,
        slot_token: Array,
        slot_median: Array,
        num_single: int,
        arithmetic: str,
        keep_zeros: bool,
        max_tokens: int,
        prefix_token: int,
        suffix_token: int,
        with_counts: bool,
    ) -> HostTokens:
        table = self._table(column_slot, slot_token, slot_median, num_single, arithmetic)
        tokens = rank_on_device(
            self._copied(indptr),
            self._copied(indices),
            self._copied(data),
            table,
            self._copied(library_size),
            keep_zeros=keep_zeros,
            max_tokens=max_tokens,
            prefix_token=prefix_token,
            suffix_token=suffix_token,
            with_counts=with_counts,
        )
        return HostTokens(
            token_ids=tokens.token_ids.cpu().numpy(),
            counts=None if tokens.counts is None else tokens.counts.cpu().numpy(),
            cu_seqlens=tokens.cu_seqlens.cpu().numpy(),
            num_gene_tokens=tokens.num_gene_tokens.cpu().numpy(),
            mapped_counts=tokens.mapped_counts.cpu().numpy(),
            total_counts=tokens.total_counts.cpu().numpy(),
        )

    def _copied(self, array: Array) -> Tensor:
        """On the device. Arrays over files may not be written, which torch would warn of."""
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)

    def _table(
        self, column_slot: Array, slot_token: Array, slot_median: Array, num_single: int, arithmetic: str
    ) -> GeneTableOnDevice:
        """The table of a plan, copied once: a plan's arrays are never changed, so their identity names it."""
        key = (id(column_slot), arithmetic)
        if key not in self._tables:
            slots = (column_slot, slot_token, slot_median, num_single)
            if len(self._tables) >= 16:
                self._tables.clear()
            self._tables[key] = (column_slot, GeneTableOnDevice.of(*slots, arithmetic, self.device))
        return self._tables[key][1]


@dataclass(frozen=True)
class HostTokens:
    """DeviceTokens brought back as numpy arrays."""

    token_ids: Array
    counts: Array | None
    cu_seqlens: Array
    num_gene_tokens: Array
    mapped_counts: Array
    total_counts: Array


def _objection(device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return cuda_kernels.objection(torch.empty(0, device=device))


def _checked(
    indptr: Tensor, indices: Tensor, data: Tensor, num_genes: int, stream: int
) -> tuple[tuple[int, ...], Tensor]:
    """What _cuda.check_rows found, read back, and which rows are out of order. Raises for a broken block."""
    found = data.new_empty(4, dtype=torch.int64)
    out_of_order = data.new_empty(max(indptr.numel() - 1, 0), dtype=torch.uint8)
    cuda_kernels.module().check_rows(indptr, indices, data, num_genes, found, out_of_order, stream)
    checked = tuple(found.tolist())
    _raise_for(checked, indptr, indices, data.numel(), num_genes)
    return checked, out_of_order


def _room(
    data: Tensor, num_rows: int, checked: tuple[int, ...], num_summed: int
) -> tuple[Tensor | None, ...]:
    """Scratch memory for rows that are out of order and for rows that do not fit shared memory."""
    _, _, num_unsorted, longest = checked
    ordered: tuple[Tensor | None, ...] = (None, None, None)
    if num_unsorted:
        sizes = ((data.numel(), torch.int32), (data.numel(), torch.float64), (num_rows, torch.int32))
        ordered = tuple(data.new_empty(size, dtype=dtype) for size, dtype in sizes)
    size = cuda_kernels.module().num_long_row_blocks(num_rows, longest, num_summed) * longest
    return (*ordered, data.new_empty(size, dtype=torch.int64), data.new_empty(size, dtype=torch.int32))


def _raise_for(
    checked: tuple[int, ...], indptr: Tensor, indices: Tensor, num_entries: int, num_genes: int
) -> None:
    bad_offset, bad_entry, _, _ = checked
    if bad_offset >= 0:
        found = f"indptr[{bad_offset}] = {int(indptr[bad_offset])}"
        before = f" after {int(indptr[bad_offset - 1])}" if bad_offset else ""
        raise InvalidArgumentError(
            f"{found}{before}; expected offsets that rise from 0 to {num_entries}, the number of entries",
            where=_WHERE,
        )
    if bad_entry >= 0:
        row = int(torch.searchsorted(indptr, bad_entry, right=True)) - 1
        raise InvalidArgumentError(
            f"row {row}: indices[{bad_entry}] = {int(indices[bad_entry])} is out of range for {num_genes} genes",
            where=_WHERE,
        )
