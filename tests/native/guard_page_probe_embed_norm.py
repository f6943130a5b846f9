"""Runs embed_norm with every array ending at the last byte before forbidden memory.

As guard_page_probe.py does for the CSR kernels: a script in a process of its own, with SCFM_ISA set; prints "ok".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from guard_page_probe import guarded

from scfm import _native as native

Array = np.ndarray[Any, np.dtype[Any]]


def at_the_edge(array: Array) -> Array:
    copy = guarded(array.ravel())
    copy.flags.writeable = True
    return copy.reshape(array.shape)


def main() -> None:
    rng = np.random.default_rng(0)
    for size in (*range(1, 36), 63, 64, 65, 127, 129, 257):
        for dtype in (np.float32, np.int16):

            def values(*shape: int, dtype: type = dtype) -> Array:
                return at_the_edge(rng.integers(0, 99, shape).astype(dtype))

            num_tokens = 1 + size % 70
            ids = [
                at_the_edge(rng.integers(0, rows, num_tokens).astype(t)) for rows, t in ((5, "i4"), (3, "i8"))
            ]
            tables, addend = [values(5, size), values(3, size)], values(num_tokens, size)
            weight, bias, d_weight, d_bias = (values(size, dtype=np.float32) for _ in range(4))
            mean, rstd = (values(num_tokens, dtype=np.float32) for _ in range(2))
            out, d_addend = (values(num_tokens, size) for _ in range(2))
            d_tables = [values(*x.shape, dtype=np.float32) for x in tables]
            native.embed_norm_forward(ids, tables, addend, weight, bias, out, mean, rstd, 1e-5)
            native.embed_norm_forward(ids, tables, None, None, None, out, mean, rstd, 1e-5)
            gradients = (d_tables, d_addend, d_weight, d_bias)
            native.embed_norm_backward(out, ids, tables, addend, weight, mean, rstd, *gradients)
            native.embed_norm_backward(out, ids, tables, None, None, mean, rstd, d_tables, None, None, None)
    print("ok")


if __name__ == "__main__":
    main()
