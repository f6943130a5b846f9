"""Runs the CSR kernels with every array ending at the last byte before forbidden memory.

The sanitizers do not see masked vector accesses; the processor does: a read one byte too far is a signal. Run
as a script in a process of its own, with SCFM_ISA set; prints "ok".
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import fields, replace
from typing import Any

import numpy as np
from blocks import make_block
from rank_value_oracle import Block, encode_cell

from scfm import _native as native

Array = np.ndarray[Any, np.dtype[Any]]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_kept: list[mmap.mmap] = []


def guarded(array: Array) -> Array:
    """A copy of the array that ends where a page begins that nobody may touch; read-only."""
    page = mmap.PAGESIZE
    whole = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, whole + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(start + whole, page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy: Array = np.frombuffer(memory, dtype=array.dtype, count=array.size, offset=whole - array.nbytes)
    copy[:] = array
    copy.flags.writeable = False
    _kept.append(memory)
    return copy


def guarded_block(block: Block) -> Block:
    values: dict[str, Any] = {f.name: getattr(block, f.name) for f in fields(block)}
    return replace(block, **{k: guarded(v) for k, v in values.items() if isinstance(v, np.ndarray)})


def main() -> None:
    for length in [*range(20), 31, 32, 33, 63, 64, 65, 127, 1000, 1023]:
        for data_type in ("f4", "f8", "i1", "u2"):
            for index_type in ("i4", "i8"):
                plain = make_block(length, [3, length], 1024, data_type, index_type, num_summed=length % 2)
                block = guarded_block(plain)
                assert native.check_csr(block.indptr, block.indices, block.data, 1024).error == ""
                native.row_sums(block.indptr, block.data)
                tokens = native.rank_value(**block.arguments()).token_ids
                expected = np.concatenate([encode_cell(plain, row)[0] for row in (0, 1)])
                np.testing.assert_array_equal(tokens, expected)
    print("ok")


if __name__ == "__main__":
    main()
