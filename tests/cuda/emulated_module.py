"""scfm._cuda's face over the emulated kernels, for tensors on the CPU: what scfm.ops and the tokenizer call.

With it in the module's place, everything between a user's call and the kernels runs on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from cuda_emulator import ARITHMETICS, DATA_TYPES, STORAGE, Emulator
from torch import Tensor

_TYPES = {"float": "f", "int": "i", "uint": "u"}


class EmulatedModule:
    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self.calls: list[str] = []
        self.gene_table = emulator.gene_table
        self.num_long_row_blocks = emulator.num_long_row_blocks

    def _call(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        self._emulator.call(name, *(_pointer(x) if isinstance(x, Tensor) else x for x in arguments))

    def graph_forward(self, q, k, v, out, lse, row_offsets, columns, scale, stream) -> None:
        assert stream == 0
        self._call("graph_forward", *_sizes(q, scale), _table(q, k, v, out), lse, row_offsets, columns)

    def graph_backward(
        self,
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        delta,
        dq,
        dk,
        dv,
        row_offsets,
        columns,
        col_offsets,
        rows,
        scale,
        stream,
    ) -> None:
        table = _table(grad_out, q, k, v, out, dq, dk, dv)
        plan = (row_offsets, columns, col_offsets, rows)
        self._call("graph_backward", *_sizes(q, scale), table, lse, delta, *plan)

    def check_rows(self, indptr, indices, data, num_genes, found, out_of_order, stream) -> None:
        self._call("check_rows", *_csr(indptr, indices, data), num_genes, found, out_of_order)

    def row_sums(self, indptr, data, sums, stream) -> None:
        self._call("row_sums", indptr, data, _data_type(data), indptr.numel() - 1, sums)

    def num_tokens_at_most(self, num_rows, num_entries, max_tokens, prefix_token, suffix_token) -> int:
        most = num_entries + num_rows * ((prefix_token >= 0) + (suffix_token >= 0))
        return most if max_tokens < 0 else min(most, num_rows * max_tokens)

    def rank_value(
        self,
        indptr,
        indices,
        data,
        checked,
        out_of_order,
        library_size,
        table,
        arithmetic,
        keep_zeros,
        max_tokens,
        prefix_token,
        suffix_token,
        room,
        result,
        stream,
    ) -> None:
        num_genes, num_summed = table[0].numel(), table[2].numel()
        blocks = self.num_long_row_blocks(indptr.numel() - 1, checked[3], num_summed)
        self._call(
            "rank_value",
            *_csr(indptr, indices, data),
            np.array(checked, np.int64),
            out_of_order,
            library_size,
            *table,
            num_genes,
            num_summed,
            ctypes.c_int(ARITHMETICS.index(arithmetic)),
            ctypes.c_int(keep_zeros),
            max_tokens,
            ctypes.c_int32(prefix_token),
            ctypes.c_int32(suffix_token),
            *room,
            blocks,
            *result,
        )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _sizes(q: Tensor, scale: float) -> tuple[Any, ...]:
    num_tokens, num_heads, head_dim = q.shape
    return (
        num_tokens,
        num_heads,
        ctypes.c_int(head_dim),
        ctypes.c_int(STORAGE[q.dtype]),
        ctypes.c_float(scale),
    )


def _table(*tensors: Tensor) -> np.ndarray:
    assert all(x.shape == tensors[0].shape and x.dtype == tensors[0].dtype for x in tensors)
    return np.array([(x.data_ptr(), x.stride(0), x.stride(1)) for x in tensors], np.int64)


def _data_type(data: Tensor) -> ctypes.c_int:
    name = str(data.dtype).removeprefix("torch.")
    letters = name.rstrip("0123456789")
    return ctypes.c_int(DATA_TYPES.index(f"{_TYPES[letters]}{data.element_size()}"))


def _csr(indptr: Tensor, indices: Tensor, data: Tensor) -> tuple[Any, ...]:
    wide = ctypes.c_int(indices.element_size() == 8)
    return indptr, indices, wide, data, _data_type(data), indptr.numel() - 1, data.numel()
