"""Runs attention inside packed cells with every array ending at the last byte before forbidden memory.

As guard_page_probe.py does for the CSR kernels: a script in a process of its own, with SCFM_ISA set; prints "ok".
"""

from __future__ import annotations

import numpy as np
from guard_page_probe_graph import at_the_edge

from scfm import _native as native


def main() -> None:
    rng = np.random.default_rng(0)
    for lengths in ([1], [2, 17], [47, 48, 49], [97]):
        offsets = at_the_edge(np.cumsum([0, *lengths]).astype(np.int32))
        known = at_the_edge(rng.integers(0, np.array(lengths) + 1).astype(np.int32))
        total = sum(lengths)
        for head_dim in (1, 3, 8, 15, 16, 17, 31, 33, 63, 64, 65, 129, 255, 256):
            for dtype in (np.float32, np.int16):
                for num_known in (None, known):
                    q, k, v, upstream, out, dq, dk, dv = (
                        at_the_edge(rng.integers(0, 99, (total, 2, head_dim)).astype(dtype)) for _ in range(8)
                    )
                    lse = at_the_edge(np.zeros((total, 2), np.float32))
                    cells = (offsets, offsets, num_known)
                    native.varlen_forward(q, k, v, out, lse, *cells, 0.01)
                    native.varlen_backward(upstream, q, k, v, out, lse, dq, dk, dv, *cells, 0.01)
    print("ok")


if __name__ == "__main__":
    main()
