"""csrc/cuda on the host: built by a C++ compiler under emulation/, called through ctypes.

Everything that a kernel is handed lies in a buffer of its own with guard bytes before and behind it, what it is to
write is filled with poison first, and the guards are looked at after every call.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_value_oracle import Block
from torch import Tensor

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "emulation"
FLAGS = [
    *(
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-U_FORTIFY_SOURCE",
        "-Wall",
    ),
    *("-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{ROOT / 'csrc'}"),
]
STORAGE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ARITHMETICS = ["multiply64", "multiply32", "divide64", "divide32"]
DATA_TYPES = ["f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
GUARD = 64
Array = np.ndarray[Any, np.dtype[Any]]


def build(compiler: str, folder: Path) -> Path:
    """The kernels, and what they share with the CPU, as folder/emulated.so."""
    sources = [
        *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        *sorted((ROOT / "csrc" / "cuda").glob("*.cpp")),
        ROOT / "csrc" / "tokenize" / "gene_table.cpp",
        *sorted(HERE.glob("*.cpp")),
    ]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        subprocess.run([compiler, *FLAGS, "-x", "c++", "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "emulated.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    return library


@dataclass
class Guarded:
    """Memory with guard bytes around each piece, that ``check`` looks at."""

    pieces: list[Array] = field(default_factory=list)

    def like(self, values: Array) -> Array:
        """A guarded copy; empty arrays have an address too."""
        fresh = self.empty(values.shape, values.dtype, 0)
        fresh[...] = values
        return fresh

    def empty(self, shape: Sequence[int], dtype: Any, poison: int = 0xAB) -> Array:
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.full(num_bytes + 2 * GUARD + 64, 0xA5, np.uint8)
        shift = -raw.ctypes.data % 64
        whole = raw[shift : shift + num_bytes + 2 * GUARD]
        whole[GUARD:][:num_bytes] = poison
        self.pieces.append(whole)
        return whole[GUARD:][:num_bytes].view(dtype).reshape(shape)

    def check(self) -> None:
        for number, whole in enumerate(self.pieces):
            assert (whole[:GUARD] == 0xA5).all(), f"bytes before buffer {number} were written"
            assert (whole[-GUARD:] == 0xA5).all(), f"bytes behind buffer {number} were written"


def _as_c(x: Any) -> Any:
    """Arrays by address, whole numbers as int64; what has a C type already stays."""
    if x is None or isinstance(x, np.ndarray):
        return ctypes.c_void_p(None if x is None else x.ctypes.data)
    return ctypes.c_int64(x) if isinstance(x, int) else x


@dataclass
class Ranked:
    token_ids: Array
    counts: Array | None
    cu_seqlens: Array
    num_gene_tokens: Array
    mapped_counts: Array
    total_counts: Array


class Emulator:
    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("graph_forward", "graph_backward", "check_rows", "row_sums", "rank_value"):
            getattr(self._library, f"emulated_{name}").restype = ctypes.c_char_p
        self._library.emulated_num_long_row_blocks.restype = ctypes.c_int64

    @contextmanager
    def order(self, order: int) -> Iterator[None]:
        """Threads take turns from the first (0), from the last and warps run ahead (1), or shuffled."""
        self._library.emulated_order(ctypes.c_uint64(order))
        yield
        self._library.emulated_order(ctypes.c_uint64(0))

    def call(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError with what the emulation complains of."""
        failure = getattr(self._library, f"emulated_{name}")(*map(_as_c, arguments))
        if failure is not None:
            raise RuntimeError(failure.decode())

    # ---- attention ----------------------------------------------------------------------------------------------

    def graph(self, tensors: list[Tensor], plan: Sequence[Array], scale: float) -> list[Tensor]:
        """out, lse, dq, dk, dv of q, k, v and the upstream gradient, each (T, H, D)."""
        memory = Guarded()
        shape, dtype = tensors[0].shape, tensors[0].dtype
        kind = np.dtype(np.float32 if dtype == torch.float32 else np.uint16)
        skip = 16 // kind.itemsize  # between heads, so that strides are not those of a contiguous tensor

        def strided() -> Array:
            return memory.empty((shape[0], shape[1], shape[2] + skip), kind)

        def table(*arrays: Array) -> Array:
            rows = [(x.ctypes.data, x.strides[0] // x.itemsize, x.strides[1] // x.itemsize) for x in arrays]
            return np.array(rows, np.int64)

        inputs = [strided() for _ in range(4)]
        for array, tensor in zip(inputs, tensors, strict=True):
            array[..., : shape[2]] = (
                tensor.contiguous().view(torch.uint16 if kind.itemsize == 2 else dtype).numpy()
            )
        q, k, v, upstream = inputs
        out, dq, dk, dv = (strided() for _ in range(4))
        lse, delta = (memory.empty(shape[:2], np.float32) for _ in range(2))
        parts = [memory.like(x) for x in plan]
        sizes = (
            shape[0],
            shape[1],
            ctypes.c_int(shape[2]),
            ctypes.c_int(STORAGE[dtype]),
            ctypes.c_float(scale),
        )
        self.call("graph_forward", *sizes, table(q, k, v, out), lse, *parts[:2])
        self.call("graph_backward", *sizes, table(upstream, q, k, v, out, dq, dk, dv), lse, delta, *parts)
        memory.check()
        for array in (out, dq, dk, dv):
            assert (array[..., shape[2] :].view(np.uint8) == 0xAB).all(), "bytes between rows were written"

        def tensor_of(array: Array) -> Tensor:
            return torch.from_numpy(array[..., : shape[2]].copy()).view(dtype)

        return [tensor_of(out), torch.from_numpy(lse.copy()), *map(tensor_of, (dq, dk, dv))]

    # ---- tokens -------------------------------------------------------------------------------------------------

    def check_rows(self, block: Block) -> tuple[list[int], Array]:
        """(bad offset, bad entry, rows out of order, longest row), and which rows are out of order."""
        memory = Guarded()
        found, flags = memory.empty((4,), np.int64), memory.empty((block.indptr.size - 1,), np.uint8)
        arrays = [memory.like(x) for x in (block.indptr, block.indices, block.data)]
        self.call("check_rows", *self._csr(block, *arrays), block.column_slot.size, found, flags)
        memory.check()
        return found.tolist(), flags.copy()

    def row_sums(self, block: Block) -> Array:
        memory = Guarded()
        sums = memory.empty((block.indptr.size - 1,), np.float64)
        data_type = ctypes.c_int(DATA_TYPES.index(block.data.dtype.str[1:]))
        arrays = [memory.like(x) for x in (block.indptr, block.data)]
        self.call("row_sums", *arrays, data_type, block.indptr.size - 1, sums)
        memory.check()
        return sums.copy()

    def gene_table(
        self,
        column_slot: Array,
        slot_token: Array,
        slot_median: Array,
        num_single: int,
        arithmetic: str,
        memory: Guarded | None = None,
    ) -> tuple[Any, ...]:
        """As _cuda.gene_table."""
        memory = Guarded() if memory is None else memory
        num_genes, num_summed = column_slot.size, slot_token.size - num_single
        fed = int((column_slot >= num_single).sum())
        sizes = (num_genes, num_genes + num_summed, num_summed, num_summed + 1, fed)
        dtypes = (np.float64, np.int32, np.float64, np.int32, np.int32)
        parts = [memory.empty((size,), dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
        slots = (column_slot, num_genes, slot_token, slot_median, slot_token.size, num_single)
        code = ctypes.c_int(ARITHMETICS.index(arithmetic))
        used = self._library.emulated_gene_table(*map(_as_c, (*slots, code, *parts)))
        memory.check()
        return (*parts, ARITHMETICS[used])

    def num_long_row_blocks(self, num_rows: int, longest_row: int, num_summed: int) -> int:
        sizes = map(ctypes.c_int64, (num_rows, longest_row, num_summed))
        return int(self._library.emulated_num_long_row_blocks(*sizes))

    def rank_value(self, block: Block, *, num_blocks: int | None = None) -> Ranked:
        """Both calls, as the bindings make them; num_blocks overrules how many blocks have room for long rows."""
        checked, flags = self.check_rows(block)
        assert checked[:2] == [-1, -1]
        num_rows, num_entries, longest = block.indptr.size - 1, block.data.size, checked[3]
        num_summed = block.slot_token.size - block.num_single
        specials = (block.prefix_token >= 0) + (block.suffix_token >= 0)
        room = num_entries + num_rows * specials
        if block.max_tokens >= 0:
            room = min(room, num_rows * block.max_tokens)
        if num_blocks is None:
            num_blocks = self.num_long_row_blocks(num_rows, longest, num_summed)
        memory = Guarded()
        slots = (block.column_slot, block.slot_token, block.slot_median, block.num_single)
        *table, arithmetic = self.gene_table(*slots, block.arithmetic, memory)
        ordered: list[Array | None] = [None, None, None]
        if checked[2]:
            sizes = [(num_entries, np.int32), (num_entries, np.float64), (num_rows, np.int32)]
            ordered = [memory.empty((n,), dtype) for n, dtype in sizes]
        pairs = [memory.empty((num_blocks * longest,), dtype) for dtype in (np.uint64, np.uint32)]
        tokens = memory.empty((room,), np.int32)
        counts = memory.empty((room,), np.float64) if block.with_counts else None
        cu_seqlens = memory.empty((num_rows + 1,), np.int64)
        facts = [memory.empty((num_rows,), dtype) for dtype in (np.int32, np.float64, np.float64)]
        arrays = [memory.like(x) for x in (block.indptr, block.indices, block.data)]
        self.call(
            "rank_value",
            *self._csr(block, *arrays),
            np.array(checked, np.int64),
            memory.like(flags),
            memory.like(block.library_size),
            *table,
            block.column_slot.size,
            num_summed,
            ctypes.c_int(ARITHMETICS.index(arithmetic)),
            ctypes.c_int(block.keep_zeros),
            block.max_tokens,
            ctypes.c_int32(block.prefix_token),
            ctypes.c_int32(block.suffix_token),
            *ordered,
            *pairs,
            num_blocks,
            tokens,
            counts,
            cu_seqlens,
            *facts,
        )
        memory.check()
        end = int(cu_seqlens[-1])
        assert (tokens[end:].view(np.uint8) == 0xAB).all(), "tokens were written behind the last row's"
        return Ranked(tokens[:end], None if counts is None else counts[:end], cu_seqlens, *facts)

    @staticmethod
    def _csr(block: Block, indptr: Array, indices: Array, data: Array) -> list[Any]:
        column_type = ctypes.c_int({4: 0, 8: 1}[indices.itemsize])
        data_type = ctypes.c_int(DATA_TYPES.index(data.dtype.str[1:]))
        return [indptr, indices, column_type, data, data_type, indptr.size - 1, data.size]
