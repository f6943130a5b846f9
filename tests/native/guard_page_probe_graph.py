"""Runs sparse graph attention with every array ending at the last byte before forbidden memory.

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
    starts = np.arange(0, 42, 2, dtype=np.int64)
    columns = np.stack([np.arange(20) * 3 % 10, 10 + np.arange(20) * 7 % 10], 1).astype(np.int32).ravel()
    graph = [at_the_edge(x) for x in (starts, columns, np.arange(20) == 0)]
    for length in (1, 2, 17, 33, 64):
        ids = at_the_edge(rng.integers(0, 20, length).astype(np.int64))
        plan = [at_the_edge(x) for x in native.graph_plan(np.array([0, length], np.int32), ids, *graph)]
        for head_dim in (1, 3, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 256):
            for dtype in (np.float32, np.int16):
                q, k, v, upstream, out, dq, dk, dv = (
                    at_the_edge(rng.integers(0, 99, (length, 2, head_dim)).astype(dtype)) for _ in range(8)
                )
                lse = at_the_edge(np.zeros((length, 2), np.float32))
                native.graph_forward(q, k, v, out, lse, *plan[:2], 0.01)
                native.graph_backward(upstream, q, k, v, out, lse, dq, dk, dv, *plan, 0.01)
    print("ok")


if __name__ == "__main__":
    main()
